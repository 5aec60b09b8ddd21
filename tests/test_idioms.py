"""Idioms of exporters, folded: all forms of a linear layer, experts, heads as axes, images."""

import re
from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
from helpers import folded, graph, normal, operators, refused, square

D, F = 6, 10
P, M = square(D, seed=1), normal(D, F, seed=2)

# name → (operators from {x} to {y}, both [b, s, channels]; how W [in, out] is stored)
FORMS = {
    "MatMul": ("{y} = MatMul({x}, {w})", lambda w: w),
    "Transpose of the weight": ("{y}0 = Transpose({w}) {y} = MatMul({x}, {y}0)", lambda w: w.T),
    "Identity of the weight": ("{y}0 = Identity({w}) {y} = MatMul({x}, {y}0)", lambda w: w),
    "weight on the left": (
        "{y}0 = Transpose<perm = [0, 2, 1]>({x}) {y}1 = MatMul({w}, {y}0)"
        " {y} = Transpose<perm = [0, 2, 1]>({y}1)",
        lambda w: w.T,
    ),
    "Gemm": (
        "{y}0 = Flatten<axis = 2>({x}) {y}1 = Gemm<alpha = 0.5, beta = 2.0, transB = 1>"
        "({y}0, {w}, {w}_c) {y}2 = Shape<end = 2>({x}) {y}3 = Concat<axis = 0>({y}2, {w}_n)"
        " {y} = Reshape({y}1, {y}3)",
        lambda w: w.T,
    ),
    "FusedMatMul": (
        "{y} = com.microsoft.FusedMatMul<alpha = 2.0, transB = 1>({x}, {w})",
        lambda w: w.T,
    ),
    "Einsum": ('{y} = Einsum<equation = "bsd,de->bse">({x}, {w})', lambda w: w),
    "Einsum, ellipsis": ('{y} = Einsum<equation = "ed,...d->...e">({w}, {x})', lambda w: w.T),
    "Conv": (
        "{y}0 = Transpose<perm = [0, 2, 1]>({x}) {y}1 = Conv({y}0, {w}, {w}_c)"
        " {y} = Transpose<perm = [0, 2, 1]>({y}1)",
        lambda w: w.T[:, :, None],
    ),
}


def layer(form: str, x: str, y: str, w: str, array: np.ndarray) -> tuple[str, dict]:
    body, store = FORMS[form]
    text = body.format(x=x, y=y, w=w)
    held = {w: np.ascontiguousarray(store(array))}
    held |= {f"{w}_c": normal(array.shape[1], seed=5), f"{w}_n": np.array([array.shape[1]])}
    return text, {name: values for name, values in held.items() if name in re.findall(r"\w+", text)}


def matrices(model: ir.Model) -> int:
    """Elements of weights that are no vectors."""
    held = (value.const_value for value in model.graph.initializers.values())
    floats = (tensor for tensor in held if tensor.dtype.is_floating_point())
    return sum(tensor.size for tensor in floats if sum(d > 1 for d in tensor.shape) > 1)


@pytest.mark.parametrize(("first", "second"), list(product(FORMS, FORMS)))
def test_every_form_into_every_form(first, second):
    """P goes into M, whatever they are written as."""
    head, held = layer(first, "x", "p", "P", P)
    tail, more = layer(second, "p", "y", "M", M)
    text = f"(float[b, s, {D}] x) => (float[b, s, {F}] y) {{ {head} {tail} }}"
    model = graph(text, **held, **more)
    result = folded(model)
    assert matrices(model) - matrices(result.model) == D * D


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_absorbed(form):
    """O, Q and K in one form: Q or K goes, its bias stays."""
    kinds = {"o": (normal(9, D), "x", "h"), "q": (P, "h", "y"), "k": (square(D, 3), "h", "z")}
    bodies, held = [], {}
    for name, (array, x, y) in kinds.items():
        body, own = layer(form, x, y, name, array)
        bodies.append(body)
        held |= own
    outputs = f"float[b, s, {D}] y, float[b, s, {D}] z"
    model = graph(f"(float[b, s, 9] x) => ({outputs}) {{ {' '.join(bodies)} }}", **held)
    folded(model, D * D, only=["absorb"])


HEADS = """
    q = Einsum<equation = "bsd,dhk->bshk">(x, Q) k = Einsum<equation = "bsd,dhk->bshk">(x, K)
    v = Einsum<equation = "bsd,dhk->bshk">(x, V)
    qb = Add(q, c) scores = Einsum<equation = "bqhk,bshk->bhqs">(qb, k)
    probs = Softmax<axis = -1>(scores) context = Einsum<equation = "bhqs,bshk->bqhk">(probs, v)
    p = Einsum<equation = "bshk,hkd->bsd">(context, P) pb = Add(p, d)
"""


def test_keras_attention():
    """Kernels with the heads as axes of their own."""
    h, k = 2, 3
    held = {n: square(D, i).reshape(D, h, k) for i, n in enumerate(("Q", "K", "V"))}
    text = f"""(float[b, s, 9] x0) => (float[b, s, {F}] y)
        {{ x = MatMul(x0, O) {HEADS} y = MatMul(pb, M) }}"""
    model = graph(
        text, O=normal(9, D), P=P.reshape(h, k, D), M=M, c=normal(h, k), d=normal(D), **held
    )
    result = folded(model)
    assert matrices(model) - matrices(result.model) == 2 * D * D
    assert operators(result.model).count("Einsum") == 4
    assert operators(result.model).count("Reshape") == 2


E, I = 3, 7  # noqa: E741  experts, their width
EXPERTS = {
    "router": normal(D, E, seed=5),
    "up": np.stack([normal(D, I, seed=i) for i in range(E)]),
    "down": np.stack([normal(I, D, seed=i + 9) for i in range(E)]),
    "Q": square(D, seed=3),
    "K": normal(D, 4, seed=4),
    "P": P,
}
DENSE = """
    p = MatMul(x, P) r = MatMul(p, router) g = Softmax<axis = -1>(r)
    pe = Unsqueeze(p, one) u = MatMul(pe, up) a = Relu(u) e = MatMul(a, down)
    gt = Transpose<perm = [0, 2, 1]>(g) gu = Unsqueeze(gt, last) w = Mul(e, gu)
    h = ReduceSum<keepdims = 0>(w, one)
"""
EINSUM = """
    p = MatMul(x, P) r = MatMul(p, router) g = Softmax<axis = -1>(r)
    u = Einsum<equation = "bsd,edf->besf">(p, up) a = Relu(u)
    e = Einsum<equation = "besf,efd->besd">(a, down)
    gt = Transpose<perm = [0, 2, 1]>(g) gu = Unsqueeze(gt, last) w = Mul(e, gu)
    h = ReduceSum<keepdims = 0>(w, one)
"""
PICKED = """
    p0 = MatMul(x, P) p = Reshape(p0, rows) r = MatMul(p, router) g = Softmax<axis = -1>(r)
    value, index = TopK(g, two) i = Reshape(index, flat)
    p1 = Unsqueeze(p, one) p2 = Expand(p1, twice) p3 = Reshape(p2, rows) p4 = Unsqueeze(p3, last)
    upw = Gather<axis = 0>(upT, i) u = MatMul(upw, p4) a = Relu(u)
    j = Unsqueeze(i, one) downw = GatherND(downT, j) e = MatMul(downw, a) es = Squeeze(e, last)
    w0 = Reshape(value, column) w = Mul(es, w0) wr = Reshape(w, pairs)
    h0 = ReduceSum<keepdims = 0>(wr, one) h = Reshape(h0, back)
"""
SHAPES = {
    "one": np.array([1]), "last": np.array([-1]), "two": np.array([2]), "flat": np.array([-1]),
    "rows": np.array([-1, D]), "twice": np.array([1, 2, 1]), "column": np.array([-1, 1]),
    "pairs": np.array([-1, 2, D]), "back": np.array([2, 3, D]),
}  # fmt: skip
PICKED_WEIGHTS = {
    "upT": np.ascontiguousarray(EXPERTS["up"].transpose(0, 2, 1)),
    "downT": np.ascontiguousarray(EXPERTS["down"].transpose(0, 2, 1)),
}


def experts(body: str, **held: np.ndarray) -> ir.Model:
    text = f"(float[2, 3, {D}] x) => (float[2, 3, {D}] q, float[2, 3, 4] k)"
    text += f" {{ {body} q = MatMul(h, Q) k = MatMul(h, K) }}"
    weights = EXPERTS | SHAPES | PICKED_WEIGHTS | held
    return graph(text, **{n: a for n, a in weights.items() if n in text})


@pytest.mark.parametrize("body", [DENSE, EINSUM, PICKED], ids=["MatMul", "Einsum", "Gather"])
def test_experts(body):
    """P into the router and all experts, Q into all experts' down projections."""
    result = folded(experts(body), 2 * D * D)
    assert not {"P", "Q"} & set(result.model.graph.initializers)


def test_a_bias_in_front_of_experts():
    body = DENSE.replace("p = MatMul(x, P)", "p0 = MatMul(x, P) p = Add(p0, c)")
    folded(experts(body, c=normal(D)), D * D + D - E - E * I, only=["merge"])
    body = PICKED.replace("p0 = MatMul(x, P)", "p9 = MatMul(x, P) p0 = Add(p9, c)")
    assert "a bias cannot be added behind" in refused(
        experts(body, c=normal(D)), only=["merge"], protect=["Q"]
    )


def test_experts_whose_weights_are_read_twice():
    body = PICKED.replace(
        "u = MatMul(upw, p4)", "u0 = MatMul(upw, p4) s = ReduceMax(upw) u = Mul(u0, s)"
    )
    reasons = refused(experts(body), only=["merge"])
    assert "MatMul" in reasons


def test_vision():
    """Patches, a class token and positions write the stream; a 1x1 Conv and a MatMul read it."""
    text = f"""(float[b, 3, 8, 8] image) => (float[b, 5, {D}] q, float[b, 5, 3] k)
        {{ c = Conv<strides = [4, 4]>(image, W, bias) r = Reshape(c, flat)
           t = Transpose<perm = [0, 2, 1]>(r) n = Shape<end = 1>(image)
           size = Concat<axis = 0>(n, rest) token = Expand(class, size)
           s = Concat<axis = 1>(token, t) x = Add(s, positions)
           q = MatMul(x, Q) k = MatMul(x, K) }}"""
    model = graph(
        text, W=normal(D, 3, 4, 4), bias=normal(D), positions=normal(1, 5, D), Q=P, K=normal(D, 3),
        flat=np.array([0, D, -1]), rest=np.array([1, D]), **{"class": normal(1, 1, D)},
    )  # fmt: skip
    folded(model, D * D)


def test_packed_attention_reads_the_stream():
    """com.microsoft Attention: its weight is a reader like any other; what is inside is its own."""
    text = f"""(float[b, s, {D}] x) => (float[b, s, {D}] y)
        {{ p = MatMul(x, P) b = Add(p, c) y = com.microsoft.Attention<num_heads = 2>(b, W, d) }}"""
    held = {"P": P, "W": normal(D, 3 * D), "d": normal(3 * D), "c": normal(D)}
    folded(graph(text, **held), D * D + D)
    text = text.replace(", d)", ")")
    model = graph(text, **{name: held[name] for name in "PWc"})
    assert "cannot be added behind" in refused(model, only=["merge"])


def test_cross_attention():
    """One encoder output read by the keys and values of every decoder layer; P into the query."""
    text = f"""(float[b, s, 9] a, float[b, t, {D}] x) => (float[b, t, {D}] y, float[b, t, {D}] z)
        {{ m = MatMul(a, O) k1 = MatMul(m, K1) v1 = MatMul(m, V1) k2 = MatMul(m, K2)
           v2 = MatMul(m, V2) p = MatMul(x, P) q = MatMul(p, Q)
           t1 = Transpose<perm = [0, 2, 1]>(k1) t2 = Transpose<perm = [0, 2, 1]>(k2)
           s1 = MatMul(q, t1) s2 = MatMul(q, t2) w1 = Softmax(s1) w2 = Softmax(s2)
           y = MatMul(w1, v1) z = MatMul(w2, v2) }}"""
    held = {name: square(D, i) for i, name in enumerate(("K1", "V1", "K2", "V2", "Q", "P"))}
    folded(graph(text, O=normal(9, D), **held), 2 * D * D)
