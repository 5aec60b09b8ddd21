"""Merge: a sole writer into its readers, or a sole reader into its writers."""

import re
from itertools import combinations, pairwise

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from helpers import (
    assert_same_function,
    chain,
    fold,
    folded,
    graph,
    normal,
    operators,
    refused,
    weights,
)

D, F = 6, 10
PM = {"P": normal(D, D, seed=1), "M": normal(D, F, seed=2)}
TYPES = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def names(model: ir.Model) -> set[str]:
    return set(model.graph.initializers)


def merged(model: ir.Model, removed: int, **options):
    return folded(model, removed, only=["merge"], **options)


def mlp(body: str, **held: np.ndarray) -> ir.Model:
    return graph(f"(float[n, {D}] x) => (float[n, {F}] y) {{ {body} }}", **(PM | held))


def test_two_products_become_one():
    result = merged(mlp("p = MatMul(x, P) y = MatMul(p, M)"), D * D)
    assert operators(result.model) == ["MatMul"]
    assert names(result.model) == {"M"}
    product = result.model.graph.initializers["M"].const_value.numpy()
    expected = PM["P"].astype(np.float64) @ PM["M"].astype(np.float64)
    np.testing.assert_array_equal(product, expected.astype(np.float32))  # rounded once
    (stream,) = result.report.folded
    assert (stream.folded.strategy, stream.folded.condition) == ("merge", None)
    assert stream.folded.text == "MatMul -> p into MatMul -> y"


@pytest.mark.parametrize(
    ("body", "removed", "ops"),
    [  # the bias b goes through M: into the bias c, or as a new vector of F
        ("h = MatMul(x, P) p = Add(h, b) q = MatMul(p, M) y = Add(q, c)", D, ["MatMul", "Add"]),
        ("h = MatMul(x, P) p = Add(b, h) q = MatMul(p, M) y = Add(c, q)", D, ["MatMul", "Add"]),
        ("h = MatMul(x, P) p = Sub(h, b) q = MatMul(p, M) y = Add(q, c)", D, ["MatMul", "Add"]),
        ("h = MatMul(x, P) p = Add(h, b) y = MatMul(p, M)", D - F, ["MatMul", "Add"]),
        ("h = MatMul(x, P) p = Add(h, zero) y = MatMul(p, M)", D, ["MatMul"]),
        ("h = MatMul(x, P) p = Add(h, b) y = Gemm(p, M)", D - F, ["Gemm"]),
        ("h = MatMul(x, P) p = Add(h, b) y = Gemm(p, M, c)", D, ["Gemm"]),
        ("h = MatMul(x, P) p = Add(h, one) y = Gemm(p, M, c)", 1, ["Gemm"]),
        ("p = Gemm(x, P, b) y = Gemm(p, M, c)", D, ["Gemm"]),
        ("p = Gemm<beta = 0.5>(x, P, b) y = Gemm<beta = -2.0>(p, M, c)", D, ["Gemm"]),
        ("p = Gemm(x, P, b) y = Gemm<beta = 0.0>(p, M, c)", D - F, ["Gemm", "Add"]),
        ("p = Gemm(x, P, one) y = Gemm(p, M, one)", 1 - F, ["Gemm"]),
        ("h = MatMul(x, P) p = Add(h, b) n = Neg(p) g = Mul(n, half) y = Gemm(g, M, c)", D,
         ["Neg", "Mul", "Gemm"]),
        ("h = MatMul(x, P) p = Add(h, b) g = Div(p, half) s = Sub(p, g) t = Sum(s, p)"
         " y = Gemm(t, M, c)",
         D, ["Div", "Sub", "Sum", "Gemm"]),
        ("h = MatMul(x, P) p = Add(h, b) r = Add(p, b) q = MatMul(r, M) y = Add(q, c)", D,
         ["MatMul", "Add"]),
    ],
)  # fmt: skip
def test_biases(body, removed, ops):
    held = {"b": normal(D, seed=5), "c": normal(F, seed=6), "zero": np.zeros(D, np.float32)}
    held |= {"half": np.array(0.5, np.float32), "one": np.ones(1, np.float32)}
    used = {
        name: array for name, array in held.items() if f" {name})" in body or f"({name}," in body
    }
    result = merged(mlp(body, **used), D * D + removed)
    assert operators(result.model) == ops


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("trans_p", [0, 1])
@pytest.mark.parametrize("trans_m", [0, 1])
def test_gemm_attributes(alpha, trans_p, trans_m):
    body = (
        f"p = Gemm<alpha = {alpha}, transB = {trans_p}>(x, P, b)"
        f" y = Gemm<alpha = 2.0, transB = {trans_m}>(p, M, c)"
    )
    held = {"b": normal(D), "c": normal(F)}
    if trans_p:
        held["P"] = PM["P"].T.copy()
    if trans_m:
        held["M"] = PM["M"].T.copy()
    merged(mlp(body, **held), D * D + D)


@pytest.mark.parametrize(
    "body",
    [
        "s = Add(b, e) p = Add(h, s) y = MatMul(p, M)",  # a sum of two constants
        "p = Add(h, row) y3 = MatMul(p, M) y = Squeeze(y3, zero)",  # it adds an axis
        "p = Sub(b, h) y = MatMul(p, M)",
        "p = Where(c, h, b) y = MatMul(p, M)",
        "t = Add(h, b) p = Pad(t, pads) z = MatMul(p, M) y = Slice(z, zero, three, zero)",
    ],
)
def test_biases_that_cannot_be_carried(body):
    held = {
        "b": normal(D), "e": normal(D, seed=8), "row": normal(1, 1, D),
        "c": np.array([[True], [False], [True]]), "zero": np.array([0]),
        "three": np.array([3]), "pads": np.array([0, 0, 1, 0]),
    }  # fmt: skip
    used = {name: array for name, array in held.items() if name in body.replace("Squeeze", "")}
    text = f"(float[3, {D}] x) => (float[3, {F}] y) {{ h = MatMul(x, P) {body} }}"
    refused(graph(text, **(PM | used)), only=["merge"])
    assert_same_function(graph(text, **(PM | used)), fold(graph(text, **(PM | used))).model)


def test_a_gemm_bias_that_is_a_sum_of_constants():
    text = f"(float[3, {D}] x) => (float[3, {F}] y) "
    text += "{ c = Add(b, e) p = Gemm(x, P, c) y = MatMul(p, M) }"
    model = graph(text, **PM, b=normal(D), e=normal(D, seed=8))
    refused(model, only=["merge"])


def test_a_left_bias_goes_to_the_axis_before_the_last():
    model = graph(
        f"(float[{D}, n] x) => (float[{F}, n] y)"
        f" {{ h = MatMul(P, x) p = Add(h, b) y = MatMul(M, p) }}",
        P=normal(D, D), M=normal(F, D), b=normal(D, 1),
    )  # fmt: skip
    merged(model, D * D + D - F)


def test_a_left_product_with_one_number_for_each_position():
    model = graph(
        f"(float[{D}, 3] x) => (float[{F}, 3] y)"
        f" {{ h = MatMul(P, x) p = Add(h, b) y = MatMul(M, p) }}",
        P=normal(D, D), M=normal(F, D), b=normal(3),
    )  # fmt: skip
    merged(model, D * D + 3 - 3 * F)


@pytest.mark.parametrize("shape", [(3, D), (3, 1)])
def test_a_constant_that_differs_from_position_to_position_is_a_writer(shape):
    """It cannot be carried through M, but M can go into it and into P."""
    text = f"(float[3, {D}] x) => (float[3, {F}] y) "
    text += "{ h = MatMul(x, P) p = Add(h, t) y = MatMul(p, M) }"
    model = graph(text, **PM, t=normal(*shape))
    merged(model, D * D + shape[0] * shape[1] - 3 * F)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (np.array([-1, 1, 8]), "m = Reshape(p, s)"),
        (np.array([0, 0, -1]), "m = Reshape(p, s)"),
        (
            np.array([8]),
            "d = Shape<start = 0, end = 2>(x) c = Concat<axis = 0>(d, s) m = Reshape(p, c)",
        ),
        (np.array([2, 1, 1, 8]), "m4 = Expand(p, s) m = ReduceSum<keepdims = 0>(m4, i)"),
        (np.array([2, 1, 1, 1]), "m4 = Expand(p, s) m = ReduceSum<keepdims = 0>(m4, i)"),
    ],
)
def test_other_widths_and_the_shapes_that_name_them(shape, text):
    """P widens 6 to 8, so that PM has fewer weights than P and M; Reshape must say 6."""
    model = graph(
        f"(float[a, b, {D}] x) => (float[c, d, {F}] y)"
        f" {{ p = MatMul(x, P) {text} y = MatMul(m, M) }}",
        P=normal(D, 8), M=normal(8, F), s=shape, **({"i": np.array([0])} if "i)" in text else {}),
    )  # fmt: skip
    merged(model, D * 8 + 8 * F - D * F)


def test_a_shape_from_elsewhere_cannot_be_resized():
    model = graph(
        f"(float[n, {D}] x, float[n, 8] z) => (float[n, {F}] y)"
        " { p = MatMul(x, P) s = Shape(z) m = Reshape(p, s) y = MatMul(m, M) }",
        P=normal(D, 8), M=normal(8, F),
    )  # fmt: skip
    refused(model, only=["merge"])


@pytest.mark.parametrize("shape", [[8], [1, 8], [1, -1], [1, 0]])
def test_a_constant_that_is_reshaped_on_its_way_into_the_stream(shape):
    held = {"E": normal(9, 8), "b": normal(1, 8, seed=1), "M": normal(8, 4, seed=2)}
    source = graph(
        "(int64[n] ids) => (float[n, 4] y) { x = Gather(E, ids) c = Reshape(b, shape)"
        " s = Add(x, c) y = MatMul(s, M) }",
        **held,
        shape=np.array(shape),
    )
    result = fold(source, only=["merge"])
    assert [stream.folded.strategy for stream in result.report.folded] == ["merge"]
    assert_same_function(source, result.model)


def test_an_expand_that_does_not_name_the_channels():
    model = graph(
        """(float[4, 1, 1] x) => (float[3, 2, 5] y) { t = Transpose<perm = [1, 2, 0]>(x)
        h = MatMul(t, P) p = Transpose<perm = [2, 0, 1]>(h) e = Expand(p, s)
        m = Transpose<perm = [1, 2, 0]>(e) y = MatMul(m, M) }""",
        P=normal(4, 6), M=normal(6, 5), s=np.array([3, 2]),
    )  # fmt: skip
    merged(model, 4 * 6 + 6 * 5 - 4 * 5)


def test_value_info_is_resized():
    model = graph(
        f"(float[n, {D}] x) => (float[n, {F}] y) <float[n, 8] p, float[n, 8] m>"
        " { p = MatMul(x, P) m = Neg(p) y = MatMul(m, M) }",
        P=normal(D, 8), M=normal(8, F),
    )  # fmt: skip
    merged(model, D * 8 + 8 * F - D * F)


def test_a_low_rank_pair_is_not_multiplied_out():
    model = mlp("p = MatMul(x, P) y = MatMul(p, M)", P=normal(D, 2), M=normal(2, F))
    assert f"weights would grow by {D * F - 2 * (D + F)}" in refused(model, only=["merge"])


def test_a_low_rank_pair_on_top_of_a_layer_is_folded_into_neither():
    """LoRA: y = x W + (x A) B; x must stay what it is."""
    model = mlp(
        "w = MatMul(x, M) a = MatMul(x, A) b = MatMul(a, B) y = Add(w, b)",
        A=normal(D, 2), B=normal(2, F),
    )  # fmt: skip
    refused(model, only=["merge"])


def test_a_shared_weight_is_copied_only_if_that_pays():
    body = "p = MatMul(x, P) y = MatMul(p, M) z = MatMul(x, P)"
    text = f"(float[n, {D}] x) => (float[n, {F}] y, float[n, {D}] z) {{ {body} }}"
    assert "'P' has other readers" in refused(graph(text, **PM))
    text = text.replace("MatMul(x, P) }", "MatMul(x, b) }").replace(f", {D}] z", "] z")
    result = merged(graph(text, **PM, b=normal(D)), D * D)
    assert "b" in names(result.model)


def test_a_shared_reader_is_written_once():
    text = (
        f"(float[n, {D}] x) => (float[n, {F}] y, float[n, {F}] z) {{ p = MatMul(x, P) n = Neg(p) "
    )
    result = merged(graph(text + "y = MatMul(p, M) z = MatMul(n, M) }", **PM), D * D)
    assert names(result.model) == {"M"}


def test_a_weight_and_its_transpose_are_two_weights():
    text = f"(float[n, {D}] x) => (float[n, {D}] y, float[n, {D}] z) {{ p = MatMul(x, P) "
    text += "t = Transpose(M) y = MatMul(p, M) z = MatMul(p, t) }"
    model = graph(text, P=normal(D, D), M=normal(D, D, seed=3))
    assert "no weights would be saved" in refused(model)


def test_a_bias_is_copied_if_something_else_reads_it():
    text = f"(float[n, {D}] x) => (float[n, {F}] y, float[n, {F}] z) "
    text += "{ h = MatMul(x, P) p = Add(h, b) "
    text += "q = MatMul(p, M) y = Add(q, c) z = Add(q2, c) }"
    text = text.replace("z = ", "q2 = MatMul(x, N) z = ")
    model = graph(text, **PM, b=normal(D), c=normal(F), N=normal(D, F, seed=9))
    result = merged(model, D * D + D - F)
    assert {"c", "c_folded"} <= names(result.model)


def test_a_chain_folds_to_one():
    body = "a = MatMul(x, A) b = MatMul(a, B) c = MatMul(b, C) y = MatMul(c, M)"
    held = dict(zip("ABC", (normal(D, D, seed=i) for i in range(3)), strict=True))
    text = f"(float[n, {D}] x) => (float[n, {F}] y) {{ {body} }}"
    result = merged(graph(text, **held, M=normal(D, F)), 3 * D * D)
    assert operators(result.model) == ["MatMul"]
    assert len(result.report.folded) == 3


def test_gate_and_up():
    text = f"""(float[n, {D}] x) => (float[n, {D}] y) {{ p = MatMul(x, P)
        g = MatMul(p, G) s = Sigmoid(g) u = MatMul(p, U) h = Mul(s, u) y = MatMul(h, W) }}"""
    held = {"P": normal(D, D), "G": normal(D, F), "U": normal(D, F, seed=4), "W": normal(F, D)}
    result = merged(graph(text, **held), D * D)
    assert names(result.model) == {"G", "U", "W"}


def test_a_sole_reader_goes_into_its_writers():
    text = """(int64[n] i, float[n, 3] a, float[n, 5] b) => (float[n, 4] y)
        { e = Gather(E, i) f = MatMul(a, A) g = Gemm(b, B, c) h = Sum(e, f, g)
        y = MatMul(h, R) }"""
    held = {
        "E": normal(7, D),
        "A": normal(3, D),
        "B": normal(5, D),
        "c": normal(D),
        "R": normal(D, 4),
    }
    result = merged(graph(text, **held), (7 + 3 + 5 + 1) * D + D * 4 - (7 + 3 + 5 + 1) * 4)
    assert operators(result.model) == ["Gather", "MatMul", "Gemm", "Sum", "Identity"]
    assert names(result.model) == {"E", "A", "B", "c"}


def test_an_embedding_bottleneck_is_kept():
    text = f"(int64[n] i) => (float[n, {F}] y) {{ e = Gather(E, i) y = MatMul(e, R) }}"
    assert "weights would grow" in refused(graph(text, E=normal(50, 3), R=normal(3, F)))
    merged(graph(text, E=normal(9, 8 * F), R=normal(8 * F, F)), 9 * 8 * F + 8 * F * F - 9 * F)


@pytest.mark.parametrize("name", TYPES)
def test_the_storage_type_is_kept(name):
    if name == "bfloat16":  # not run by ONNX Runtime on the CPU
        pytest.importorskip("ml_dtypes")
    dtype = TYPES[name]
    held = {"P": normal(64, 64).astype(dtype), "M": normal(64, 80, seed=2).astype(dtype)}
    text = f"({name}[n, 64] x) => ({name}[n, 80] y) {{ p = MatMul(x, P) y = MatMul(p, M) }}"
    model = graph(text, **held)
    result = fold(model, only=["merge"])
    assert result.report.saving.weights == 64 * 64
    weight = result.model.graph.initializers["M"].const_value
    assert weight.dtype == model.graph.inputs[0].dtype
    wide = held["P"].astype(np.float64) @ held["M"].astype(np.float64)
    unit = float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(weight.numpy().astype(np.float64) - wide).max() <= unit * np.abs(wide).max()
    if name != "bfloat16":
        assert_same_function(model, result.model)


def test_the_result_keeps_its_name_as_a_graph_output():
    text = f"(float[n, {D}] x) => (float[n, {F}] y, float[n, {F}] z) "
    text += "{ h = MatMul(x, P) p = Add(h, b) y = MatMul(p, M) z = Neg(y) }"
    result = merged(graph(text, **PM, b=normal(D)), D * D + D - F)
    assert [value.name for value in result.model.graph.outputs] == ["y", "z"]
    assert [node.op_type for node in result.model.graph] == ["MatMul", "Add", "Neg"]


def test_the_result_may_be_what_the_writer_read():
    """R goes into E and A, so that its output, a graph output, is their sum."""
    text = f"""(int64[n] i, float[n, 3] a) => (float[n, {D}] y)
        {{ e = Gather(E, i) f = MatMul(a, A) h = Add(e, f) y = MatMul(h, R) }}"""
    result = merged(graph(text, E=normal(7, D), A=normal(3, D), R=normal(D, D)), D * D)
    assert operators(result.model) == ["Gather", "MatMul", "Add", "Identity"]


def test_constant_nodes_are_weighed():
    p = "Constant<value = float[2, 2] {1, 2, 3, 4}>()"
    text = f"(float[n, 2] x) => (float[n, 2] y) {{ P = {p} p = MatMul(x, P) y = MatMul(p, M) }}"
    result = merged(graph(text, M=normal(2, 2)), 4)
    assert weights(result.model) == 4


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(400.0, "a folded weight is not finite in float16"), (2e-4, "predicted relative error")],
)
def test_products_that_do_not_fit_16_bits(scale, reason):
    held = {"P": normal(16, 16, seed=1), "M": normal(16, 16, seed=2)}
    held = {name: (array * scale * 4).astype(np.float16) for name, array in held.items()}
    text = "(float16[n, 16] x) => (float16[n, 16] y) { p = MatMul(x, P) y = MatMul(p, M) }"
    assert reason in refused(graph(text, **held))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(bad):
    p = PM["P"].copy()
    p[1, 2] = bad
    assert "not finite" in refused(chain("m = Identity(p)", width=D, P=p, M=PM["M"][:, :5].copy()))


def test_protect():
    text = f"(float[n, {D}] x) => (float[n, {F}] y) "
    text += "{ h = MatMul(x, P) p = Add(h, b) q = MatMul(p, M) y = Add(q, c) }"
    model = graph(text, **PM, b=normal(D), c=normal(F))
    for name in ("P", "M", "b", "c", "h", "p"):  # c is no part of the stream, but would change
        assert f"'{name}' is protected" in refused(model, protect=[name], only=["merge"])
    merged(model, D * D + D, protect=["x"])


def test_only_and_skip():
    model = mlp("p = MatMul(x, P) y = MatMul(p, M)")
    assert fold(model, skip=["absorb"]).report.folded[0].folded.strategy == "merge"
    assert fold(model, only=["absorb"]).report.folded[0].folded.strategy == "absorb"


def test_tolerance_zero_admits_nothing_that_rounds():
    model = mlp("p = MatMul(x, P) y = MatMul(p, M)")
    assert "over the tolerance" in refused(model, tolerance=0.0)
    assert fold(model, tolerance=1.0).report.folded


def test_a_bias_carried_past_a_layer_that_folds_in_the_same_round():
    """b goes behind A; B, which reads that sum, must not fold before it knows."""
    body = "h = MatMul(x, P) p = Add(h, b) a = MatMul(p, A) c = MatMul(a, B) y = MatMul(c, M)"
    model = mlp(body, b=normal(D), A=normal(D, D, seed=3), B=normal(D, D, seed=4))
    merged(model, 3 * D * D + D - F)


def test_a_merge_that_saves_less_than_the_stream_could_lose_waits():
    model = graph(
        "(float[n, 10] x) => (float[n, 24] y) { r = Relu(x) p = MatMul(r, P) y = MatMul(p, M) }",
        P=normal(10, 8), M=normal(8, 24),
    )  # fmt: skip
    (stream,) = folded(model, 8 * 8).report.folded
    assert stream.folded.strategy == "interpolate"
    folded(model, 10 * 8 + 8 * 24 - 10 * 24, only=["merge"])


@pytest.mark.parametrize("seed", range(40))
def test_a_chain_is_merged_to_the_fewest_weights(seed):
    """Against all ways to cut it, random widths; the first is one that graph order misses."""
    rng = np.random.default_rng(seed)
    dims = [int(d) for d in rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24], rng.integers(4, 8))]
    dims = [[8, 4, 4, 6, 6, 16, 24], [100, 10, 5, 4, 5, 10, 100]][seed] if seed < 2 else dims
    names = ["x", *(f"t{i}" for i in range(len(dims) - 2)), "y"]
    pairs = list(pairwise(dims))
    body = [f"{b} = MatMul({a}, W{i})" for i, (a, b) in enumerate(pairwise(names))]
    text = f"(float[n, {dims[0]}] x) => (float[n, {dims[-1]}] y) {{ {' '.join(body)} }}"
    model = graph(text, **{f"W{i}": normal(*pair, seed=i) for i, pair in enumerate(pairs)})
    result = fold(model, only=["merge"])
    cuts = [c for n in range(len(dims) - 1) for c in combinations(dims[1:-1], n)]
    ways = ([dims[0], *kept, dims[-1]] for kept in cuts)
    assert weights(result.model) == min(sum(a * b for a, b in pairwise(way)) for way in ways)
    assert_same_function(model, result.model)


# --- Convolutions ---------------------------------------------------------------------------------

WINDOWS = {
    "P": normal(8, 6, 1, 1),
    "p": normal(8, seed=1),
    "K": normal(8, 6, 3, 3, seed=2),
    "k": normal(8, seed=3),
    "L": normal(4, 8, 3, 3, seed=4),
    "Q": normal(4, 8, 1, 1, seed=5),
    "q": normal(4, seed=6),
    "T": normal(6, 8, 2, 2, seed=7),
    "U": normal(8, 4, 2, 2, seed=8),
}


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("y = Conv<pads = [1, 1, 1, 1]>(x, K, k) w = Conv(y, Q, q)", 4 * 6 * 9 + 4 + 4),
        ("y = Conv<strides = [2, 2], dilations = [1, 2]>(x, K) w = Conv(y, Q)", 4 * 6 * 9),
        ("y = Conv(x, P) w = Conv<pads = [1, 1, 0, 1]>(y, L, q)", 4 * 6 * 9 + 4),
        ("y = ConvTranspose<strides = [2, 2]>(x, T, k) w = Conv(y, Q)", 6 * 4 * 4 + 4),
        ("y = Conv(x, P) w = ConvTranspose<strides = [3, 1]>(y, U, q)", 6 * 4 * 4 + 4),
        ("y = Conv<strides = [2, 2]>(x, P) w = Conv(y, Q, q)", 4 * 6 + 4),
        ("y = Conv(x, P, p) w = Conv<dilations = [1, 2]>(y, L, q)", 4 * 6 * 9 + 4),
        ("y = Conv(x, P, p) w = Conv<strides = [2, 1]>(y, L)", 4 * 6 * 9 + 4),
    ],
)
def test_a_window_and_a_layer_of_one_position_are_one(body: str, left: int):
    held = {name: array for name, array in WINDOWS.items() if re.search(rf"\b{name}\b", body)}
    source = graph(
        f"(float[n, 6, 7, 9] x) => (float[n, 4, a, b] z) {{ {body} z = Relu(w) }}", **held
    )
    result = folded(source, only=["merge"])
    found = operators(result.model)
    assert found.count("Conv") + found.count("ConvTranspose") == 1
    assert weights(result.model) == left


def test_a_bias_that_zeros_are_put_around_stays():
    """``(x P + p)`` has zeros around it, not p: neither is the bias carried, nor the layer gone."""
    source = graph(
        "(float[n, 6, 7, 9] x) => (float[n, 4, 7, 9] z) { y = Conv(x, P, p)"
        " w = Conv<pads = [1, 1, 1, 1]>(y, L) z = Relu(w) }",
        **{name: WINDOWS[name] for name in "PpL"},
    )
    assert "reads zeros around its input, without the bias" in refused(source, only=["merge"])


@pytest.mark.parametrize(
    ("how", "reason"),
    [("pads = [1, 1, 1, 1]", "reads zeros around its input"), ("strides = [2, 2]", "skips")],
)
def test_a_layer_of_one_position_says_why_it_stays(how: str, reason: str) -> None:
    source = graph(
        f"(float[n, 8, h, w] x) => (float[n, 8, k, l] z) {{ r = Relu(x) y = Conv<{how}>(r, P)"
        " z = Conv(y, K) }",
        P=normal(8, 8, 1, 1),
        K=normal(8, 8, 3, 3, seed=1),
    )
    assert reason in refused(source)
