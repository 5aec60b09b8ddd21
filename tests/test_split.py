"""A layer behind some of the channels of a stream goes into the layers that write them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import folded, graph, normal, operators, refused, weights

X = "(float[n, t, 8] x) => (float[n, t, 4] y, float[n, t, 4] z)"
HELD = {
    "W": normal(8, 12),
    "b": normal(12, seed=1),
    "U": normal(6, 4, seed=2),
    "V": normal(6, 4, seed=3),
    "u": normal(4, seed=4),
    "sizes": np.array([6, 6]),
    "start": np.array([0]),
    "middle": np.array([6]),
    "end": np.array([12]),
    "last": np.array([-1]),
    "two": np.array([2]),
}
SPLIT = "p, q = Split<axis = -1>(w, sizes)"
ENDS = "d = MatMul(p, U) y = Relu(d) e = MatMul(q, V) z = Relu(e)"


def model(body: str, signature: str = X, **held: np.ndarray):
    """``body``, with those of the weights that it reads."""
    read = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return graph(f"{signature} {{ {body} }}", **{k: v for k, v in HELD.items() if k in read} | held)


CUTS = {
    "Split": SPLIT,
    "one size": "p, q = Split<axis = 2, num_outputs = 2>(w)",
    "Slice": "p = Slice(w, start, middle, last) q = Slice(w, middle, end, last)",
    "every other": "p = Slice(w, start, end, last, two) q = Slice(w, one, end, last, two)",
    "Gather": "p = Gather<axis = -1>(w, first) q = Gather<axis = 2>(w, second)",
}


@pytest.mark.parametrize("cut", CUTS)
def test_both_parts_take_their_columns(cut: str) -> None:
    """``x W₁ U`` and ``x W₂ V``: one layer of 4 + 4 columns, and no other."""
    order = np.random.default_rng(0).permutation(12)
    held = {"one": np.array([1]), "first": order[:6], "second": order[6:]}
    source = model(
        f"w = MatMul(x, W) {CUTS[cut]} {ENDS}",
        **{name: array for name, array in held.items() if f" {name}" in CUTS[cut]},
    )
    result = folded(source, 8 * 12 + 2 * 6 * 4 - 8 * 8, only=["split"])
    assert operators(result.model) == ["MatMul", "Split", "Relu", "Relu"]


@pytest.mark.parametrize("front", ["h = MatMul(x, W) w = Add(h, b)", "w = Gemm(x, W, b)"])
def test_biases_go_through_the_readers(front: str) -> None:
    """``(x W + b) U + u``: what is left of ``b`` is added in front, ``u`` behind the Split."""
    signature = "(float[n, 8] x) => (float[n, 4] y, float[n, 4] z)"
    body = f"{front} {SPLIT} d = Gemm(p, U, u) y = Relu(d) e = MatMul(q, V) z = Relu(e)"
    result = folded(model(body, signature), only=["split"])
    assert weights(result.model) == 8 * 8 + 8 + 4
    assert "Gemm" not in operators(result.model)[1:]


def test_the_part_that_no_layer_reads_stays() -> None:
    body = f"w = MatMul(x, W) {SPLIT} d = MatMul(p, U) y = Relu(d) z = Tanh(q)"
    signature = X.replace("4] z", "6] z")
    result = folded(model(body, signature), 8 * 12 + 6 * 4 - 8 * 10, only=["split"])
    assert operators(result.model) == ["MatMul", "Split", "Relu", "Tanh"]


def test_the_other_part_may_be_an_output() -> None:
    body = "w = MatMul(x, W) p, z = Split<axis = -1>(w, sizes) d = MatMul(p, U) y = Relu(d)"
    folded(model(body, X.replace("4] z", "6] z")), 8 * 12 + 6 * 4 - 8 * 10, only=["split"])


def test_several_layers_that_read_one_part() -> None:
    """They are outputs of the one Split; the part itself goes."""
    body = f"""w = MatMul(x, W) {SPLIT} d = MatMul(p, U) e = MatMul(p, V) f = Add(e, u)
        y = Relu(d) a = Tanh(q) g = Relu(f) z = Concat<axis = -1>(g, a)"""
    result = folded(model(body, X.replace("4] z", "10] z")), only=["split"])
    assert weights(result.model) == 8 * (4 + 4 + 6) + 4
    assert operators(result.model).count("Split") == 1
    assert len(next(n for n in result.model.graph if n.op_type == "Split").outputs) == 3


@pytest.mark.parametrize("readers", [1, 2])
def test_what_commutes_may_lie_between(readers: int) -> None:
    """A bias, another layout, a Dropout: the part goes their way with what the layers write."""
    second = "e = MatMul(k, V) z = Relu(e)" if readers > 1 else "z = Relu(q)"
    body = f"""h = MatMul(x, W) w = Dropout(h) {SPLIT} i = Add(p, s) j = Reshape(i, flat)
        k = Identity(j) d = MatMul(k, U) y = Relu(d) o = Neg(q) r = Relu(o) {second}"""
    wide = "6" if readers == 1 else "4"
    signature = f"(float[n, t, 8] x) => (float[m, 4] y, float[m, {wide}] z, float[n, t, 6] r)"
    signature = signature if readers > 1 else signature.replace("float[m, 6]", "float[n, t, 6]")
    source = model(body, signature, s=normal(6, seed=5), flat=np.array([-1, 6]))
    result = folded(source, only=["split"])
    assert weights(result.model) == 8 * (6 + 4 * readers) + 4 * readers


@pytest.mark.parametrize("window", [1, 3])
def test_convolutions(window: int) -> None:
    """1x1 convolutions behind parts along axis 1, the layer in front with any window."""
    pads = f"<pads = [{window // 2}, {window // 2}]>"
    body = f"""w = Conv{pads}(x, K, b) p, q = Split<axis = 1>(w, sizes) d = Conv(p, P, u)
        y = Relu(d) e = Conv(q, Q) z = Relu(e)"""
    held = {"K": normal(12, 8, window), "P": normal(4, 6, 1), "Q": normal(4, 6, 1, seed=1)}
    signature = "(float[n, 8, t] x) => (float[n, 4, t] y, float[n, 4, t] z)"
    result = folded(model(body, signature, **held), only=["split"])
    assert weights(result.model) == 8 * 8 * window + 8 + 4
    assert operators(result.model).count("Conv") == 1


def test_two_layers_may_write_the_stream() -> None:
    body = f"f = Relu(x) g = MatMul(f, T) h = MatMul(x, W) w = Add(g, h) {SPLIT} {ENDS}"
    folded(model(body, T=normal(8, 12, seed=7)), 2 * 8 * 4 + 2 * 6 * 4, only=["split"])


def test_a_chain_behind_a_part_goes_as_a_whole() -> None:
    body = f"""w = MatMul(x, W) {SPLIT} d = MatMul(p, U) f = MatMul(d, F) y = Relu(f)
        z = Tanh(q)"""
    source = model(body, X.replace("4] z", "6] z"), F=normal(4, 4, seed=8))
    assert operators(folded(source).model).count("MatMul") == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_types(dtype: type) -> None:
    name = "float16" if dtype == np.float16 else "double"
    held = {k: v.astype(dtype) for k, v in HELD.items() if v.dtype == np.float32}
    body = f"h = MatMul(x, W) w = Add(h, b) {SPLIT} {ENDS}"
    source = model(body, X.replace("float", name), **{k: held[k] for k in "WbUV"})
    folded(source, only=["split"])


@pytest.mark.parametrize(
    ("body", "held"),
    [
        (f"w = MatMul(x, W) {SPLIT} y = MatMul(p, U) n = Softmax(p) z = MatMul(n, V)", {}),
        (f"w = MatMul(x, W) {SPLIT} {ENDS} s = Relu(w)", {}),
        (f"w = MatMul(x, W) {SPLIT} {ENDS} s = MatMul(w, S)", {"S": normal(12, 4, seed=6)}),
        (
            "w = MatMul(x, W) p = Slice(w, start, middle, last) q = Slice(w, three, nine, last)"
            f" {ENDS}",
            {"three": np.array([3]), "nine": np.array([9])},
        ),
        (f"w = Relu(x) {SPLIT} {ENDS}", {"sizes": np.array([6, 2]), "V": normal(2, 4)}),
    ],
    ids=["a norm", "an activation", "a layer of all", "parts that overlap", "no layer in front"],
)
def test_what_is_read_otherwise_stays(body: str, held: dict[str, np.ndarray]) -> None:
    results = "float[n, t, a] y, float[n, t, b] z" + (", float[n, t, c] s" * (" s = " in body))
    refused(model(body, f"(float[n, t, 8] x) => ({results})", **held), only=["split"])


def test_a_part_that_is_an_output_stays() -> None:
    body = "w = MatMul(x, W) y, z = Split<axis = -1>(w, sizes) d = MatMul(y, U) r = Relu(d)"
    signature = "(float[n, t, 8] x) => (float[n, t, 6] y, float[n, t, 6] z, float[n, t, 4] r)"
    refused(model(body, signature), only=["split"])


def test_sizes_that_are_computed_stay() -> None:
    body = f"w = MatMul(x, W) {SPLIT} {ENDS}"
    signature = "(float[n, t, 8] x, int64[2] sizes) => (float[n, t, 4] y, float[n, t, 4] z)"
    source = model(body, signature)
    source.graph.initializers.pop("sizes", None)
    refused(source, only=["split"])


def test_a_width_that_is_read_is_told() -> None:
    body = f"w = MatMul(x, W) {SPLIT} {ENDS} s = Shape(w)"
    signature = "(float[n, t, 8] x) => (float[n, t, 4] y, float[n, t, 4] z, int64[3] s)"
    assert "reads the width" in refused(model(body, signature), only=["split"])


def test_a_width_that_only_the_split_is_computed_from_is_not() -> None:
    """TorchScript computes where a chunk ends from the shape of what it cuts."""
    body = f"""w = MatMul(x, W) i = Shape<start = 2>(w) p = Slice(w, start, middle, last)
        q = Slice(w, middle, i, last) {ENDS}"""
    source = model(body)
    assert operators(folded(source, only=["split"]).model) == ["MatMul", "Split", "Relu", "Relu"]


@pytest.mark.parametrize("width", [3, 4])
def test_the_width_of_a_part_that_several_layers_read(width: int) -> None:
    """Two layers of 3 channels leave 6 channels of 6."""
    body = f"w = MatMul(x, W) {SPLIT} d = MatMul(p, U) e = MatMul(p, V) y = Relu(d) z = Relu(e)"
    signature = "(float[n, t, 8] x) => (float[n, t, a] y, float[n, t, b] z, int64[3] s)"
    held = {"U": normal(6, width), "V": normal(6, width, seed=1)}
    source = model(f"{body} s = Shape(p)", signature, **held)
    if width == 3:
        assert operators(folded(source, 6 * 6, only=["split"]).model).count("Split") == 2
    else:
        assert "reads the width" in refused(source, only=["split"])


def test_what_nothing_reads_keeps_its_width() -> None:
    body = f"w = MatMul(x, W) {SPLIT} {ENDS} unread = Add(w, b)"
    assert "reads the width" in refused(model(body), only=["split"])


def test_weights_do_not_grow() -> None:
    """A bottleneck of 6 channels stays one."""
    source = model(
        f"w = MatMul(x, W) {SPLIT} {ENDS}",
        X.replace("8]", "40]").replace("4]", "40]").replace("4040", "40"),
        W=normal(40, 12),
        U=normal(6, 40),
        V=normal(6, 40),
    )
    assert "weights would grow" in refused(source, only=["split"])


def test_layers_that_read_a_part_in_several_places() -> None:
    body = f"""w = MatMul(x, W) {SPLIT} d = MatMul(p, U) y = Relu(d) n = Neg(p)
        e = MatMul(n, V) f = Relu(e) g = Relu(q) z = Concat<axis = -1>(f, g)"""
    assert "several places" in refused(model(body, X.replace("4] z", "10] z")), only=["split"])


VIEWS = {
    "Gather": "p = Gather<axis = 2>(v, i) q = Gather<axis = -2>(v, j)",
    "Split": "c, d = Split<axis = 2, num_outputs = 2>(v) p = Squeeze(c, k) q = Squeeze(d, k)",
}


@pytest.mark.parametrize("shape", [[0, 0, 2, 6], [-1, 3, 2, 6]])
@pytest.mark.parametrize("cut", VIEWS)
def test_parts_along_an_axis_of_their_own(cut: str, shape: list[int]) -> None:
    """``h.unflatten(-1, (2, 6)).unbind(-2)``: channels are followed until they are a part."""
    numbers = {"two_axes": shape, "i": 0, "j": 1, "k": [2]}
    body = f"w = MatMul(x, W) v = Reshape(w, two_axes) {VIEWS[cut]}"
    body += " f = MatMul(p, U) y = Relu(f) e = MatMul(q, V) z = Relu(e)"
    read = {name: np.array(each) for name, each in numbers.items() if f"{name})" in body}
    signature = X if 0 in shape else X.replace("t,", "3,")
    result = folded(model(body, signature, **read), 8 * 12 + 2 * 6 * 4 - 8 * 8, only=["split"])
    assert operators(result.model) == ["MatMul", "Split", "Relu", "Relu"]


def test_parts_at_other_positions_stay() -> None:
    """The batch and the sequence change places in front of the parts."""
    body = f"""w = MatMul(x, W) v = Reshape(w, anew) {VIEWS["Gather"]} f = MatMul(p, U)
        y = Relu(f) e = MatMul(q, V) z = Relu(e)"""
    signature = "(float[2, 3, 8] x) => (float[3, 2, 4] y, float[3, 2, 4] z)"
    numbers = {"anew": [3, 2, 2, 6], "i": 0, "j": 1}
    refused(model(body, signature, **{k: np.array(each) for k, each in numbers.items()}))
