"""Gains, centring and dead skips between layers: they merge, or they stay as they were."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import chain, fold, folded, graph, normal, operators, proto, refused, square

D = 6
G, B = 1 + normal(D, seed=7), normal(D, seed=8)
AXIS = {"axis": np.array([-1])}
GAINS = {
    "Mul": (["m = Mul(p, g)"], {"g": G}, D),
    "Mul, gain first": (["m = Mul(g, p)"], {"g": G}, D),
    "Div": (["m = Div(p, g)"], {"g": G}, D),
    "with leading ones": (["m = Mul(p, g)"], {"g": G.reshape(1, 1, D)}, D),
    "with zeros": (["m = Mul(p, g)"], {"g": np.where(G > 1, G, 0).astype(np.float32)}, D),
    "two": (["a = Mul(p, g)", "n = Neg(a)", "m = Div(n, k)"], {"g": G, "k": G[::-1].copy()}, 2 * D),
    "centring": (["u = ReduceMean(p, axis)", "m = Sub(p, u)"], AXIS, 0),
    "a norm with a fixed deviation": (
        ["u = ReduceMean(p, axis)", "c = Sub(p, u)", "s = Div(c, std)", "w = Mul(s, g)",
         "m = Add(w, e)"],
        AXIS | {"g": G, "e": B, "std": np.float32(0.7)},
        2 * D - 5,  # the shift becomes a bias of the reader
    ),
    "a deviation for each channel": (
        ["u = ReduceMean(p, axis)", "c = Sub(p, u)", "s = Div(c, std)", "m = Mul(s, g)"],
        AXIS | {"g": G, "std": G + 1},
        2 * D,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("bias", [False, True])
def test_p_goes_through_it(name, bias):
    body, held, removed = GAINS[name]
    model = chain(*body, width=D, bias=bias, **held)
    has_shift = "e" in held
    result = folded(model, D * D + removed + (bias and (D if has_shift else D - 5)))
    assert operators(result.model).count("MatMul") == 1
    assert not {"Mul", "Sub", "ReduceMean"} & set(operators(result.model))


def test_a_gain_on_a_branch():
    """LayerScale without the skip's norm: ``y = a P + g (h O)``."""
    text = f"""(float[n, {D}] a, float[n, 9] h) => (float[n, {D}] q, float[n, 3] k)
        {{ p = MatMul(a, P) o = MatMul(h, O) s = Mul(o, g) x = Add(p, s)
           q = MatMul(x, Q) k = MatMul(x, K) }}"""
    held = {"P": square(D, 1), "O": normal(9, D), "Q": square(D, 2), "K": normal(D, 3), "g": G}
    result = folded(graph(text, **held), D * D + D)
    assert "Mul" not in operators(result.model)


def test_a_gain_behind_an_embedding():
    text = f"""(int64[n] ids) => (float[n, {D}] q, float[n, 3] k)
        {{ e = Gather(E, ids) x = Mul(e, g) q = MatMul(x, Q) k = MatMul(x, K) }}"""
    held = {"E": normal(20, D), "Q": square(D, 2), "K": normal(D, 3), "g": G}
    result = folded(graph(text, **held), D * D + D)
    assert operators(result.model) == ["Gather", "Identity", "MatMul"]


NORM = "n = LayerNormalization(x, s) "


@pytest.mark.parametrize(
    "body",
    [
        f"{NORM} m = Mul(n, g) y = MatMul(m, M)",  # the gain of an ordinary norm
        "p = MatMul(x, P) s1 = Mul(p, g) y = Add(x, s1)",  # LayerScale with its skip
        "u = ReduceMean(x, axis) m = Sub(x, u) y = MatMul(m, M)",
        "z = Mul(x, zero) p = MatMul(x, P) m = Add(p, z) r = Relu(m) y = MatMul(r, M)",
        "p = MatMul(x, P) m = Mul(p, g) y = Relu(m)",
        "p = MatMul(x, P) m = Mul(p, half) r = Mul(x, p) w = Add(m, r) y = MatMul(w, M)",
    ],
)
def test_left_as_it_is_where_the_stream_is_open(body):
    held = {"P": square(D, 1), "M": square(D, 2), "g": G, "s": G, "zero": np.float32(0), **AXIS}
    held["half"] = G[:3].repeat(2)
    model = graph(
        f"(float[a, b, {D}] x) => (float[a, b, {D}] y) {{ {body} }}",
        **{
            name: array for name, array in held.items() if f"{name})" in body or f" {name}," in body
        },
    )
    refused(model, skip=["branches"])


def test_a_gain_that_cannot_merge_is_written_back():
    """Both its streams have other members: something else folds, the gain is what it was."""
    text = f"""(float[n, 9] a, float[n, {D}] b, float[n, {D}] c)
        => (float[n, {D}] v, float[n, {D}] w, float[n, {D}] y)
        {{ x = MatMul(a, O) q = MatMul(x, Q) v = Relu(q)
           s = Mul(x, g) p = MatMul(b, P) z = Add(p, s) k = MatMul(z, K) l = MatMul(z, L)
           w0 = Relu(k) w = Add(w0, l)
           i = MatMul(c, I) y = MatMul(i, J) }}"""
    names = ("P", "Q", "K", "L", "I", "J")
    held = {"O": normal(9, D), "g": G, **{name: square(D, i) for i, name in enumerate(names)}}
    model = graph(text, **held)
    (gain,) = [node for node in model.graph if node.op_type == "Mul"]
    result = folded(model, D * D, skip=["scale"])
    (left,) = [node for node in result.model.graph if node.op_type == "Mul"]
    assert [v.name for v in left.inputs] == [v.name for v in gain.inputs]
    assert set(result.model.graph.initializers) < set(model.graph.initializers)


@pytest.mark.parametrize(
    "zero", [np.float32(0), np.zeros(D, np.float32), np.zeros((1, 1), np.float32)]
)
@pytest.mark.parametrize(
    "body", ["z = Mul(r, zero) m = Add(p, z)", "z = Mul(zero, r) m = Add(z, p)"]
)
def test_a_dead_skip(body, zero):
    text = f"""(float[a, b, {D}] x) => (float[a, b, 5] y)
        {{ r = Relu(x) p = MatMul(r, P) {body} y = MatMul(m, M) }}"""
    model = graph(text, P=square(D, 1), M=normal(D, 5), zero=zero)
    result = folded(model, D * D + zero.size)
    assert operators(result.model) == ["Relu", "MatMul"]


def test_a_dead_skip_that_makes_the_sum_longer_stays():
    text = f"""(float[1, {D}] x, float[b, {D}] r) => (float[b, 5] y)
        {{ p = MatMul(x, P) z = Mul(r, zero) m = Add(p, z) y = MatMul(m, M) }}"""
    refused(graph(text, P=square(D, 1), M=normal(D, 5), zero=np.float32(0)))


def test_a_dead_skip_is_written_back_where_its_stream_does_not_fold():
    text = f"""(float[a, b, {D}] x) => (float[a, b, {D}] y, float[a, b, 4] w)
        {{ r = Relu(x) p = MatMul(r, P) z = Mul(r, zero) m = Add(p, z) y = MatMul(m, M)
           i = MatMul(r, I) w = MatMul(i, J) }}"""
    held = {"P": square(D, 1), "M": square(D, 2), "I": square(D), "J": normal(D, 4)}
    model = graph(text, zero=np.float32(0), **held)
    result = folded(model, D * D, protect=["P"])
    assert operators(result.model) == ["Relu", "MatMul", "Mul", "Add", "MatMul", "MatMul"]


def test_sixteen_bits():
    held = {"g": G, "P": square(D, 1), "M": normal(D, 5)}
    text = f"""(float16[n, {D}] x) => (float16[n, 5] y)
        {{ p = MatMul(x, P) m = Mul(p, g) y = MatMul(m, M) }}"""
    folded(graph(text, **{name: held[name].astype(np.float16) for name in held}), D * D + D)


def test_an_infinite_gain():
    zero = np.where(np.arange(D) == 2, 0, G).astype(np.float32)
    model = chain("m = Div(p, g)", width=D, g=zero)
    assert "not finite" in refused(model)
    assert proto(fold(model).model) == proto(model)
    assert isinstance(model, ir.Model)


def test_a_gain_that_is_a_bias_elsewhere() -> None:
    """What a gain is written back with stays, though a fold changes the bias that it also is."""
    source = graph(
        "(float[n, t, 4] x) => (float[n, t, 4] y, float[n, t, 4] z) { p = MatMul(x, P)"
        " q = Add(b, p) r = MatMul(q, Q) y = Abs(r) s = MatMul(q, R) t = Mul(s, b)"
        " u = MatMul(t, U) v = MatMul(t, V) w = Relu(v) c = Abs(u) z = Add(w, c) }",
        P=square(4),
        Q=normal(4, 4, seed=1),
        R=normal(4, 4, seed=2),
        U=normal(4, 4, seed=3),
        V=normal(4, 4, seed=4),
        b=normal(4, seed=5),
    )
    folded(source, only=["absorb"], tolerance=float("inf"))
