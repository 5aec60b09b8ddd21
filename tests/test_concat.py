"""A layer behind channels side by side goes into the layers that write them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_same_function, fold, folded, graph, normal, operators, proto, weights

HELD = {
    "A": normal(6, 8),
    "a": normal(8, seed=1),
    "B": normal(5, 8, seed=2),
    "F": normal(16, 8, seed=3),
    "f": normal(8, seed=4),
}
ROWS = "(float[n, t, 6] x, float[n, t, 5] y) => (float[n, t, 8] z)"
FRONT = "p0 = MatMul(x, A) p = Add(p0, a) q = MatMul(y, B)"


def test_a_layer_behind_a_concat_is_a_sum() -> None:
    """``[x A + a, y B] F + f``: the layer's 16·8 weights go, and the bias of one stays twice."""
    source = graph(
        f"{ROWS} {{ {FRONT} c = Concat<axis = 2>(p, q) g = MatMul(c, F) h = Add(g, f)"
        " z = Relu(h) }",
        **HELD,
    )
    result = folded(source, 16 * 8, only=["concat"])
    assert operators(result.model).count("MatMul") == 2
    assert "Concat" not in operators(result.model)


def test_what_is_written_by_something_else_stays_side_by_side() -> None:
    """``[x A, relu(y), y B, tanh(y)] F``: the rows of F for what is not linear stay a layer."""
    source = graph(
        "(float[n, t, 6] x, float[n, t, 5] y) => (float[n, t, 8] z) { p = MatMul(x, A)"
        " r = Relu(y) q = MatMul(y, B) s = Tanh(y) c = Concat<axis = -1>(p, r, q, s)"
        " g = MatMul(c, F) z = Relu(g) }",
        A=HELD["A"],
        B=HELD["B"],
        F=normal(26, 8, seed=3),
    )
    result = folded(source, 16 * 8, only=["concat"])
    assert operators(result.model).count("MatMul") == 3


def test_one_operand_that_stays_needs_no_concat() -> None:
    source = graph(
        f"{ROWS} {{ p = MatMul(x, A) r = Relu(y) c = Concat<axis = -1>(p, r) g = MatMul(c, F)"
        " z = Relu(g) }",
        A=HELD["A"],
        F=normal(13, 8, seed=3),
    )
    assert "Concat" not in operators(folded(source, 8 * 8, only=["concat"]).model)


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_the_head_of_segformer(mode: str) -> None:
    """Projections, channels in front, resized to one size, side by side, a 1x1 convolution."""
    source = graph(
        "(float[2, 12, 6] x, float[2, 3, 5] y) => (float[2, 8, 3, 4] z) {"
        f" {FRONT} u0 = Transpose<perm = [0, 2, 1]>(p) u = Reshape(u0, us)"
        " w0 = Transpose<perm = [0, 2, 1]>(q) w1 = Reshape(w0, ws)"
        f' w = Resize<mode = "{mode}">(w1, , by) c = Concat<axis = 1>(w, u)'
        " g = Conv(c, K, f) z = Relu(g) }",
        **{name: HELD[name] for name in "AaBf"},
        K=normal(8, 16, 1, 1),
        us=np.array([0, 8, 3, 4]),
        ws=np.array([0, 8, 1, 3]),
        by=np.array([1.0, 1.0, 3.0, 4.0 / 3.0], np.float32),
    )
    result = folded(source, 16 * 8, only=["concat"])
    assert "Conv" not in operators(result.model)


def test_fewer_channels_behind_the_layer() -> None:
    """The streams become as narrow as what the layer wrote."""
    source = graph(
        "(float[n, t, 6] x, float[n, t, 5] y) => (float[n, t, 3] z) {"
        f" {FRONT} c = Concat<axis = 2>(p, q) g = MatMul(c, F) z = Relu(g) }}",
        **{name: HELD[name] for name in "AaB"},
        F=normal(16, 3),
    )
    before = 6 * 8 + 8 + 5 * 8 + 16 * 3
    result = folded(source, before - (6 * 3 + 3 + 5 * 3), only=["concat"])
    assert weights(result.model) == 6 * 3 + 3 + 5 * 3


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{FRONT} c = Concat<axis = 1>(p, q) g = MatMul(c, G) z = Relu(g)", "another axis"),
        (f"{FRONT} c = Concat<axis = 2>(p, p) g = MatMul(c, F) z = Relu(g)", "twice"),
        (
            f"{FRONT} c = Concat<axis = 2>(p, q) g = MatMul(c, F) k = ReduceMean(c) z = Add(g, k)",
            "",
        ),
    ],
)
def test_what_is_no_sum_stays(body: str, why: str) -> None:
    held = {n: a for n, a in HELD.items() if f" {n})" in body or f", {n})" in body}
    source = graph(f"{ROWS} {{ {body} }}", **held, **({"G": normal(8, 8)} if "G)" in body else {}))
    assert proto(fold(source, only=["concat"]).model) == proto(source), why


def test_wider_than_before_is_refused() -> None:
    source = graph(
        "(float[n, t, 6] x, float[n, t, 5] y) => (float[n, t, 20] z) {"
        f" {FRONT} c = Concat<axis = 2>(p, q) g = MatMul(c, F) z = Relu(g) }}",
        **{name: HELD[name] for name in "AaB"},
        F=normal(16, 20),
    )
    result = fold(source, only=["concat"])
    assert not result.report.folded
    assert_same_function(source, result.model)
