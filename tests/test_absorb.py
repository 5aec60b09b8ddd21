"""Absorb: a square reader (or writer) becomes the identity, everything else its neighbour."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, folded, graph, normal, operators, proto, refused, square, weights

D, H = 8, 2
Q, K, V = (square(D, seed=i) for i in range(3))
O = normal(12, D, seed=4)  # noqa: E741
CORE = """
    q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    scores = MatMul(qt, kt)
    probs = Softmax(scores)
    context = MatMul(probs, vt)
    c4 = Transpose<perm = [0, 2, 1, 3]>(context)
    y = Reshape(c4, flat)
"""
SHAPES = {"s": np.array([0, 0, H, D // H]), "flat": np.array([0, 0, D])}
QKV = "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)"


def attention(body: str = QKV, core: str = CORE, opset: int = 18, **held: np.ndarray) -> ir.Model:
    """``x0 -> O -> x -> body -> q, k, v -> attention -> y``."""
    text = f"(float[b, n, 12] x0) => (float[b, n, {D}] y) {{ x = MatMul(x0, O) {body} {core} }}"
    held = {"O": O, **({"Q": Q, "K": K, "V": V} if body is QKV else {}), **held}
    if core is CORE:
        held |= SHAPES
    return graph(text, opset, **held)


def absorbed(model: ir.Model, removed: int = D * D, **options):
    return folded(model, removed, only=["absorb"], **options)


def names(model: ir.Model) -> set[str]:
    return set(model.graph.initializers) - set(SHAPES)


def picked(result) -> str:
    (stream,) = result.report.folded
    return stream.folded.text


@pytest.mark.parametrize("pivot", ["q", "k", "v"])
def test_the_pivot_is_found_by_what_becomes_of_it(pivot):
    result = absorbed(attention(), pivot=pivot)
    assert names(result.model) == {"O", "Q", "K", "V"} - {pivot.upper()}
    assert operators(result.model).count("MatMul") == 5
    reshape = next(n for n in result.model.graph if n.outputs[0].name == f"{pivot}4")
    assert reshape.inputs[0].name == "x"
    (stream,) = result.report.folded
    assert 1 < stream.folded.condition < 100


def test_the_names_of_the_weights_mean_nothing():
    result = absorbed(attention(Q=V, V=K, K=Q), pivot="k")
    assert names(result.model) == {"O", "Q", "V"}


def test_auto_takes_the_most_accurate():
    bad = stretched(100)
    result = absorbed(attention(Q=bad, K=bad))
    assert names(result.model) == {"O", "Q", "K"}
    (stream,) = result.report.folded
    errors = [c.error for c in stream.candidates if c.error is not None]
    assert stream.folded.error == min(errors)


def test_the_weights_are_those_of_the_paper():
    weight = absorbed(attention(), pivot="q").model.graph.initializers
    q = Q.astype(np.float64)
    np.testing.assert_allclose(weight["O"].const_value.numpy(), O @ q, rtol=1e-5, atol=1e-6)
    for name, old in (("K", K), ("V", V)):
        expected = np.linalg.solve(q, old)
        np.testing.assert_allclose(weight[name].const_value.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_tables_take_the_place_of_o_in_the_first_block():
    text = f"""(int64[b, n] ids, int64[b, n] pos) => (float[b, n, {D}] y)
        {{ e = Gather(E, ids) t = Gather(T, pos) x = Add(e, t) {QKV} {CORE} }}"""
    model = graph(text, E=normal(20, D), T=normal(9, D), Q=Q, K=K, V=V, **SHAPES)
    result = absorbed(model, pivot="q")
    assert names(result.model) == {"E", "T", "K", "V"}
    (stream,) = result.report.folded
    assert stream.writers == ["E", "T"] or "Gather" in stream.writers[0]


def test_an_embedding_that_is_the_head_too_is_not_copied():
    text = f"""(int64[b, n] ids) => (float[b, n, {D}] y, float[b, n, 20] logits)
        {{ x = Gather(E, ids) {QKV} {CORE} et = Transpose(E) logits = MatMul(y, et) }}"""
    model = graph(text, E=normal(20, D), Q=Q, K=K, V=V, **SHAPES)
    reasons = refused(model, only=["absorb"])
    assert "'E' has other readers, and a copy would cost as much as is saved" in reasons


def test_a_bias_of_the_pivot_stays_and_one_of_the_writer_is_turned():
    body = "h = Add(x, bo) q0 = MatMul(h, Q) q = Add(q0, bq) k = MatMul(h, K) v = MatMul(h, V)"
    model = attention(body, Q=Q, K=K, V=V, bo=normal(D), bq=normal(D, seed=1))
    result = absorbed(model, pivot="q")
    held = result.model.graph.initializers
    np.testing.assert_array_equal(held["bq"].const_value.numpy(), normal(D, seed=1))
    expected = normal(D) @ Q.astype(np.float64)
    np.testing.assert_allclose(held["bo"].const_value.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_the_bias_of_a_gemm_becomes_an_add(beta):
    text = f"""(float[n, 12] x0) => (float[n, {D}] q, float[n, {D}] k) {{ x = Gemm(x0, O, c)
        q = Gemm<alpha = 2.0, beta = {beta}, transB = 1>(x, Q, b) k = Gemm(x, K) }}"""
    wide = normal(D, 2 * D, seed=7)
    model = graph(
        text.replace(f"[n, {D}] k", f"[n, {2 * D}] k"),
        O=O,
        Q=Q,
        K=wide,
        b=normal(D),
        c=normal(D, seed=2),
    )
    result = absorbed(model)
    assert operators(result.model) == ["Gemm", "Add", "Gemm"]


def test_a_writer_of_a_parallel_block():
    """x' = a P + h O: one stream, one of P, Q, K, V."""
    text = f"""(float[b, n, 12] x0, float[b, n, {D}] a) => (float[b, n, {D}] y)
        {{ h = MatMul(x0, O) p = MatMul(a, P) x = Add(p, h) {QKV} {CORE} }}"""
    model = graph(text, O=O, P=square(D, 8), Q=Q, K=K, V=V, **SHAPES)
    for pivot in ("q", "p", "auto"):
        result = absorbed(model, pivot=pivot)
        assert len(result.report.folded) == 1
        if pivot != "auto":
            assert names(result.model) == {"O", "P", "Q", "K", "V"} - {pivot.upper()}


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_narrow_k_and_v_are_never_absorbed(kv_heads):
    heads, head_dim = 4, D // 4
    core = CORE.replace(
        "k4 = Reshape(k, s) v4 = Reshape(v, s)",
        """
        k1 = Reshape(k, t) v1 = Reshape(v, t)
        k5 = Expand(k1, e) v5 = Expand(v1, e) k4 = Reshape(k5, s) v4 = Reshape(v5, s)""",
    )
    width = kv_heads * head_dim
    model = attention(
        QKV + " ", core, Q=Q, K=normal(D, width), V=normal(D, width, seed=2),
        s=np.array([0, 0, heads, head_dim]), flat=SHAPES["flat"],
        t=np.array([0, 0, kv_heads, 1, head_dim]),
        e=np.array([1, 1, kv_heads, heads // kv_heads, head_dim]),
    )  # fmt: skip
    result = absorbed(model)
    assert names(result.model) & {"Q", "K", "V"} == {"K", "V"}
    for pivot in ("k", "v"):
        assert "no strategy applies" in refused(model, pivot=pivot, only=["absorb"])


FUSED = {
    "add": ("h = MatMul(x, W) g = Add(h, c) q, k, v = Split<axis = -1>(g, sizes)", {"sizes"}),
    "num_outputs": (
        "h = MatMul(x, W) g = Add(c, h) q, k, v = Split<axis = 2, num_outputs = 3>(g)",
        set(),
    ),
    "gemm": (
        "r = Reshape(x, rows) g = Gemm<alpha = 0.5, beta = 2.0>(r, W, c) h = Reshape(g, cut)"
        " q, k, v = Split<axis = 2>(h, sizes)",
        {"sizes", "rows", "cut"},
    ),
    "conv1d": (
        "r = Reshape(x, rows) g = Gemm(r, W, c) d = Shape<start = 0, end = 2>(x)"
        " t = Concat<axis = 0>(d, last) h = Reshape(g, t) q, k, v = Split<axis = -1>(h, sizes)",
        {"sizes", "rows", "last"},
    ),
}  # fmt: skip


def fused(form: str, **held: np.ndarray) -> ir.Model:
    body, shapes = FUSED[form]
    extra = {
        "sizes": np.array([D, D, D]), "rows": np.array([-1, D]), "cut": np.array([2, -1, 3 * D]),
        "last": np.array([3 * D]),
    }  # fmt: skip
    held = {"W": np.hstack([Q, K, V]), "c": normal(3 * D, seed=3)} | held
    return attention(body, **held, **{name: extra[name] for name in shapes})


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("pivot", ["q", "k", "v"])
def test_a_fused_projection_loses_a_part(form, pivot):
    result = absorbed(fused(form), pivot=pivot)
    start = "qkv".index(pivot) * D
    assert f"[{start}:{start + D}] into" in picked(result)
    assert result.model.graph.initializers["W"].shape == (D, 2 * D)
    (split,) = [node for node in result.model.graph if node.op_type == "Split"]
    assert len(split.outputs) == 2


def test_a_fused_projection_with_value_info():
    model = fused("add")
    for node in model.graph:
        if node.op_type in ("MatMul", "Add") and node.outputs[0].name in ("h", "g"):
            node.outputs[0].shape = ir.Shape(["b", "n", 3 * D])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    absorbed(model)


def test_two_parts_need_no_split_afterwards():
    text = f"""(float[b, n, 12] x0) => (float[b, n, {D}] k, float[b, n, 3] v)
        {{ x = MatMul(x0, O) h = MatMul(x, W) k, v = Split<axis = -1>(h, sizes) }}"""
    model = graph(text, O=O, W=np.hstack([K, normal(D, 3)]), sizes=np.array([D, 3]))
    assert "Split" not in operators(absorbed(model).model)


def test_split_sizes_as_an_attribute():
    body = f"h = MatMul(x, W) g = Add(h, c) q, k, v = Split<axis = 2, split = [{D}, {D}, {D}]>(g)"
    model = attention(body, opset=11, W=np.hstack([Q, K, V]), c=normal(3 * D, seed=3))
    (split,) = [n for n in absorbed(model).model.graph if n.op_type == "Split"]
    assert list(split.attributes.get_ints("split")) == [D, D]


def test_a_fused_projection_with_another_user_is_left_alone():
    text = f"""(float[b, n, 12] x0)
        => (float[b, n, {D}] q, float[b, n, {D}] k, float[b, n, {2 * D}] h)
        {{ x = MatMul(x0, O) h = MatMul(x, W) q, k = Split<axis = -1, num_outputs = 2>(h) }}"""
    refused(graph(text, O=O, W=np.hstack([Q, K])), only=["absorb"])


def layers(q: np.ndarray, k: np.ndarray = K, o: np.ndarray = O, kind: str = "float") -> ir.Model:
    """O into Q and K, both graph outputs."""
    text = f"""({kind}[n, 12] x0) => ({kind}[n, {D}] q, {kind}[n, {k.shape[1]}] k)
        {{ x = MatMul(x0, O) q = MatMul(x, Q) k = MatMul(x, K) }}"""
    return graph(text, O=o, Q=q, K=k)


def stretched(condition: float) -> np.ndarray:
    return (Q @ np.diag(np.geomspace(1, condition, D)) @ K).astype(np.float32)


WIDE = normal(D, D + 1, seed=6)
HALF = [array.astype(np.float16) for array in (WIDE, O)]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (layers(np.zeros((D, D), np.float32), WIDE), "the matrix to invert is singular"),
        (layers(np.ones((D, D), np.float32), WIDE), "the matrix to invert is singular"),
        (layers(normal(D, 1) @ normal(1, D), WIDE), "singular|over the tolerance"),
        (layers(stretched(1e6), WIDE), "over the tolerance"),
        (layers(Q, np.full_like(WIDE, np.nan)), "a folded weight is not finite in float"),
        (layers(np.full((D, D), np.inf, np.float32), WIDE), "singular"),
        (layers((Q * 3e4).astype(np.float16), HALF[0], HALF[1] * 9, "float16"),
         "not finite in float16"),
        (layers((Q * 9e3).astype(np.float16), HALF[0], HALF[1] * 9, "float16"), "error inf"),
    ],
    ids=["zero", "ones", "rank-1", "ill-conditioned", "nan", "inf", "overflow", "value-overflow"],
)  # fmt: skip
def test_refused_for_its_numbers(model, reason):
    assert re.search(reason, refused(model, only=["absorb"]))


def test_a_tolerance_only_tightens_and_force_takes_it():
    model = layers(stretched(1e3), WIDE)
    for tolerance in (None, 1e-5, 1e-3, 1.0):
        reason = refused(model, only=["absorb"], tolerance=tolerance)
        assert "times the model's own" in reason
        assert "--strategy with --force takes it" in reason
    assert "over the tolerance 1.0e-09" in refused(model, only=["absorb"], tolerance=1e-9)
    absorbed(model, strategy="absorb", force=True)


def test_layers_that_are_exact_by_chance():
    """The original makes no rounding error at all: that is no reason to refuse."""
    eye = np.eye(D, dtype=np.float32)
    absorbed(layers(Q, np.hstack([eye, eye]), np.vstack([eye, eye[:4]])))


@pytest.mark.parametrize("name", ["O", "Q", "K", "V", "x", "MatMul -> x"])
def test_protect(name):
    assert f"'{name}' is protected" in refused(attention(), protect=[name])


def test_protect_what_a_fused_projection_would_change():
    assert "'c' is protected" in refused(fused("add"), protect=["c"], only=["absorb"])


def test_folding_twice_changes_nothing():
    for model in (attention(), fused("gemm")):
        once = absorbed(model).model
        twice = fold(once, only=["absorb"])
        assert not twice.report.folded
        assert proto(twice.model) == proto(once)


def test_the_same_input_gives_the_same_bytes():
    assert proto(fold(attention()).model) == proto(fold(attention()).model)


def test_exactly_one_layer_for_each_stream():
    """Two blocks: each stream loses one of its square layers and no more."""
    text = f"""(float[n, 12] x0)
        => (float[n, {D}] a, float[n, {D}] b, float[n, {D}] c, float[n, {D}] d)
        {{ x = MatMul(x0, O) a = MatMul(x, Q) b = MatMul(x, K)
           r = Relu(b) z = MatMul(r, V) c = MatMul(z, R) d = MatMul(z, S) }}"""
    model = graph(text, O=O, Q=Q, K=K, V=normal(D, D), R=square(D, 5), S=square(D, 6))
    result = absorbed(model, 2 * D * D)
    assert len(result.report.folded) == 2
    assert weights(result.model) == weights(model) - 2 * D * D
