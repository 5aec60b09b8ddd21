"""Streams: what writes and reads them, and what opens them."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import chain, fold, folded, graph, normal, refused, square, stream_of

from onnx_fold.algebra.expression import FoldedTensor, literal
from onnx_fold.algebra.precision import unit_roundoff
from onnx_fold.graph.edit import Editor
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.stream import Stream

D = 4
W = {name: normal(D, D, seed=i) for i, name in enumerate("OQKV")}


def openings(model: ir.Model, name: str = "p") -> str:
    return "\n".join(map(str, stream_of(model, name).openings))


def weights_of(layers) -> list[str]:
    return [layer.weight.leaf.name for layer in layers]


def test_writers_readers_and_constants():
    text = """(int64[n] ids, float[n, 4] a) => (float[n, 4] q, float[n, 4] k, float[n, 4] v) {
        e = Gather(E, ids)
        h = Gemm(a, O, c)
        s = Add(e, h)
        x = Add(b, s)
        q = MatMul(x, Q)
        k = MatMul(x, K)
        v = MatMul(x, V)
    }"""
    extra = {"E": normal(7, D), "b": normal(D), "c": normal(D)}
    stream = stream_of(graph(text, **W, **extra), "x")
    assert isinstance(stream, Stream)
    assert stream.is_closed
    assert stream.width == D
    assert set(weights_of(stream.writers)) == {"O"}
    assert weights_of(stream.readers) == ["Q", "K", "V"]
    assert set(weights_of(stream.constants)) == {"E", "b", "c"}
    assert weights_of(stream.tables) == ["E"]
    assert {value.name for value in stream.values} == {"e", "h", "s", "x"}


def test_shape_and_size_read_no_channels():
    model = graph(
        """(float[n, 4] x) => (float[n, 5] y, int64[2] s, int64 t)
        { p = MatMul(x, P) s = Shape(p) t = Size(p) y = MatMul(p, M) }""",
        P=normal(D, D), M=normal(D, 5),
    )  # fmt: skip
    assert [node.op_type for node in stream_of(model, "p").shape_readers] == ["Shape", "Size"]
    folded(model, removed=D * D)


def test_a_width_that_is_measured_must_stay():
    model = graph(
        "(float[n, 3] x) => (float[n, 5] y, int64[2] s)"
        " { p = MatMul(x, P) s = Shape(p) y = MatMul(p, M) }",
        P=normal(3, 6), M=normal(6, 5),
    )  # fmt: skip
    refused(model)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("m = LayerNormalization(p, g)", "'p' is read by LayerNormalization"),
        ("n = Mul(p, p) r = ReduceMean(n, last) m = Mul(p, r)", "'p' is read by Mul"),
        ("n = Pow(p, two) r = ReduceMean(n, last) m = Mul(p, r)", "'p' is read by Pow"),
        ("n = ReduceMean(p, last) m = Div(p, n)", "'p' is read by ReduceMean"),
        ("m = Sigmoid(p)", "'p' is read by Sigmoid"),
    ],
)  # fmt: skip
def test_norms_and_activations_open_it(body, reason):
    two = np.array(2.0, np.float32)
    model = chain(body, g=normal(D), two=two, last=np.array([-1]))
    refused(model, target="cpu")
    assert reason in openings(model)
    is_norm = any(opening.is_norm for opening in stream_of(model, "p").openings)
    assert is_norm == ("Sigmoid" not in body)


def test_a_gain_opens_it():
    model = chain("s = Mul(p, g) m = Sigmoid(s)", g=normal(D))
    refused(model, only=["merge", "absorb", "interpolate"])
    assert "has a gain of its own for each channel" in openings(model)
    assert not any(opening.is_norm for opening in stream_of(model, "p").openings)


def test_the_report_says_what_can_be_done_while_a_norm_stays():
    reasons = refused(chain("m = LayerNormalization(p, g)", g=normal(D)), target="cpu")
    assert "'p' is read by LayerNormalization" in reasons
    assert "a norm between MatMul -> p and MatMul -> y; norms kept: 0.375 d² by" in reasons


def test_what_nothing_uses_opens_nothing():
    model = chain("n = LayerNormalization(p, g) m = Identity(p)", g=normal(D))
    folded(model, D * D)


OPEN = {
    "graph output": (
        "(float[n, 4] x) => (float[n, 5] y, float[n, 4] p) { p = MatMul(x, P) y = MatMul(p, M) }",
        "'p' is a graph output",
    ),
    "graph input": (
        "(float[n, 4] x, float[n, 4] z) => (float[n, 5] y)"
        " { h = MatMul(x, P) p = Add(h, z) y = MatMul(p, M) }",
        "'z' is a graph input",
    ),
    "overridable bias": (
        "(float[n, 4] x, float[4] c) => (float[n, 5] y)"
        " { h = MatMul(x, P) p = Add(h, c) y = MatMul(p, M) }",
        "'c' is also a graph input, so a caller can override it",
    ),
    "overridable Gemm bias": (
        "(float[n, 4] x, float[4] c) => (float[n, 5] y) { p = Gemm(x, P, c) y = MatMul(p, M) }",
        "'c' is also a graph input, so a caller can override it",
    ),
    "subgraph": (
        "(float[n, 4] x, bool t) => (float[n, 5] y, float[n, 4] z)"
        " { p = MatMul(x, P)"
        " y = MatMul(p, M) z = If(t) <then_branch = a () => (float[n, 4] q) { q = Identity(p) },"
        " else_branch = b () => (float[n, 4] r) { r = Identity(x) }> }",
        "'p' is used inside the body of a control-flow operator",
    ),
    "another axis": (
        "(float[4, 4] x) => (float[4, 5] y, float[4, 4] z)"
        " { p = MatMul(x, P) y = MatMul(p, M) z = MatMul(P, p) }",
        "'p' is read along another axis",
    ),
    "residual": (
        "(float[n, 4] x) => (float[n, 5] y)"
        " { h = MatMul(x, P) g = MatMul(h, W) p = Add(g, h) y = MatMul(p, M) }",
        "is both read and written",
    ),
    "Gemm bias of the stream": (
        "(float[n, 4] x) => (float[n, 5] y)"
        " { h = MatMul(x, P) p = Gemm(h, W, h) y = MatMul(p, M) }",
        "is both read and written",
    ),
    "two channel axes": (
        "(float[4, 4] x) => (float[4, 5] y)"
        " { h = MatMul(x, P) t = Transpose(h) p = Add(h, t) y = MatMul(p, M) }",
        "carries two channel axes",
    ),
    "quantised reader": (
        "(float[n, 4] x) => (float[n, 5] y, uint8[n, 4] q)"
        " { p = MatMul(x, P) y = MatMul(p, M) q = QuantizeLinear(p, s) }",
        "'p' is read by QuantizeLinear",
    ),
    "vector and matrix": (  # MatMul(W, vector): there is no axis -2
        "(float[4] x) => (float[5] y)"
        " { h = MatMul(P, x) p = Add(h, c) y = MatMul(MT, p) }",
        "'p' is not known to have the channel axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), OPEN.values(), ids=OPEN)
def test_open_streams(text, reason):
    held = {
        "P": normal(D, D), "M": normal(D, 5), "MT": normal(5, D), "c": normal(D),
        "W": normal(D, D, seed=3),
        "s": np.array(0.1, np.float32),
    }  # fmt: skip
    model = graph(text, **{name: held[name] for name in held if name in text.replace("float", "")})
    assert reason in openings(model)
    refused(model, skip=["branches"])


def test_a_weight_that_is_used_in_a_subgraph_stays():
    model = graph(
        """(float[n, 4] x, bool t)
            => (float[n, 5] y, float[n, 4] z) { p = MatMul(x, P) y = MatMul(p, M)
        z = If(t) <then_branch = a () => (float[n, 4] q) { q = MatMul(x, P) },
        else_branch = b () => (float[n, 4] r) { r = Identity(x) }> }""",
        P=normal(D, D), M=normal(D, D + 1),
    )  # fmt: skip
    assert stream_of(model, "p").is_closed
    assert "'P' has other readers" in refused(model)


def test_a_shape_that_a_caller_can_override_is_not_known():
    model = graph(
        """(float[2, 4, 6] x, int64[3] s) => (float[a, 5, b] y)
        { h = MatMul(P, x) r = Reshape(h, s) y = MatMul(M, r) }""",
        P=normal(D, D), M=normal(5, D), s=np.array([2, 4, 6]),
    )  # fmt: skip
    refused(model)
    assert "Reshape" in openings(model, "h")


def test_stale_shapes_are_not_believed():
    model = chain("m = Reshape(p, s)", s=np.array([0, 0, 4]))
    (reshape,) = [node for node in model.graph if node.op_type == "Reshape"]
    reshape.outputs[0].shape = ir.Shape([1, 1, 77])
    assert stream_of(model, "p").is_closed


def test_a_pile_of_types_takes_the_narrowest():
    model = chain("m = Cast<to = 10>(p)", M=normal(D, 5, dtype=np.float16))
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    assert stream_of(model, "p").dtype == ir.DataType.FLOAT16
    folded(model, removed=D * D)


def test_an_unknown_size_is_not_another_unknown_size_of_the_same_name():
    """Shape inference calls both ``unk__0``; the Reshape mixes the channels."""
    model = graph(
        """(float[n] z) => (float[a, 5, 1] y) <float[unk__0, 4, 3] h>
        { x = custom.Op(z) h = MatMul(P, x) r = Reshape(h, s) y = MatMul(M, r) }""",
        P=normal(D, D), M=normal(5, D), s=np.array([-1, 4, 1]),
    )  # fmt: skip
    model.opset_imports["custom"] = 1
    refused(model)
    assert "does not keep the channel axis whole" in openings(model, "h")


def test_a_search_meets_nodes_that_a_fold_has_added_since():
    model = chain("m = Identity(p)")
    stream = stream_of(model, "p")
    vector = FoldedTensor(literal(normal(4)), ir.DataType.FLOAT)
    value = next(value for value in stream.values if value.name == "p")
    Rewrite(biases={value: vector}).apply(Editor(model.graph))
    again = stream.search.stream(value, -1, 4)
    assert again.is_closed
    assert len(again.constants) == 1


@pytest.mark.parametrize("narrow", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_the_precision_of_a_stream_is_the_narrowest_that_its_values_pass_through(narrow):
    model = graph(
        f"""(double[n, {D}] x) => (double[n, 5] y)
        {{ p = MatMul(x, P) c = Cast<to={int(narrow)}>(p) m = Cast<to=11>(c) y = MatMul(m, M) }}""",
        P=square(D, 1, dtype=np.float64), M=normal(D, 5, dtype=np.float64),
    )  # fmt: skip
    assert stream_of(model, "p").dtype == narrow
    (stream,) = fold(model).report.folded
    assert stream.folded.error_original > unit_roundoff(narrow) / 10
