"""Select: whole heads of Q, K and V as the basis of the stream."""

import numpy as np
import pytest
from helpers import fold, folded, graph, normal, operators, refused

from onnx_fold.algebra.selection import select_blocks
from onnx_fold.check.proof import prove
from onnx_fold.passes.select_heads import SelectPass
from onnx_fold.report.attention import find_attention
from onnx_fold.streams.stream import find_streams

D, HD = 8, 2


def attention(q_heads: int, kv_heads: int, **held: np.ndarray):
    """A table, Q with ``q_heads`` heads of 2, K and V with ``kv_heads``; the heads are outputs."""
    widths = {"q": q_heads, "k": kv_heads, "v": kv_heads}
    weights = {n.upper(): normal(D, w * HD, seed=i) for i, (n, w) in enumerate(widths.items())}
    body = " ".join(
        f"{n} = MatMul(s, {n.upper()}) {n}4 = Reshape({n}, shape_{n})"
        f" {n}t = Transpose<perm = [0, 2, 1, 3]>({n}4)"
        for n in widths
    )
    core = """
        km = ReduceMean<keepdims = 1>(kt, one) kx = Transpose<perm = [0, 1, 3, 2]>(km)
        scores = MatMul(qt, kx) probs = Softmax(scores)
        vm = ReduceMean<keepdims = 1>(vt, one) y = MatMul(probs, vm)
    """
    shapes = {f"shape_{n}": np.array([0, 0, w, HD]) for n, w in widths.items()}
    text = f"(int64[b, n] x) => (float[b, h, n, c] y) {{ s = Gather(E, x) {body} {core} }}"
    table = {"E": normal(40, D, seed=9)}
    return graph(text, **(table | weights | shapes | {"one": np.array([1])} | held))


def selected(source, removed: int = D * D):
    result = folded(source, removed, only=["select"])
    (stream,) = result.report.folded
    assert stream.folded.strategy == "select"
    return result, stream.folded


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (3, 1), (2, 1), (4, 4), (5, 5)])
def test_heads_of_any_layout(q_heads, kv_heads):
    if (q_heads + 2 * kv_heads) * HD < D:
        pytest.skip("not enough columns")
    _, fold_ = selected(attention(q_heads, kv_heads))
    assert fold_.text.startswith(f"{D // HD} heads of ")
    assert fold_.condition is not None


def test_badly_conditioned_heads_are_left_out():
    q = normal(D, 12, seed=0)
    q[:, 2:4] = q[:, 0:2] * 1.0001  # two heads that say the same
    result, _ = selected(attention(6, 2, Q=q))
    assert "Slice" in operators(result.model)


def test_too_few_columns():
    assert "no strategy applies" in refused(
        attention(2, 1, K=normal(D, 2), V=normal(D, 2)), only=["merge"]
    )


def test_it_serves_where_q_cannot_be_absorbed():
    q = normal(D, D, seed=0)
    q[:, 3] = q[:, 2]  # singular
    result = folded(attention(4, 2, Q=q), D * D)
    assert {stream.folded.strategy for stream in result.report.folded} == {"select"}


def test_folding_twice_changes_nothing_more():
    assert not fold(fold(attention(6, 2)).model).report.folded


def test_select_blocks_finds_the_independent_ones():
    rng = np.random.default_rng(0)
    good = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    matrix = np.hstack(
        [good[:, :2], good[:, :2] * 0.5, good[:, 2:4], 1e-6 * good[:, 4:6], good[:, 4:]]
    )
    np.testing.assert_array_equal(select_blocks(matrix, 2), [0, 2, 4, 5])


def test_zero_heads_are_never_a_basis():
    q = normal(D, 12, seed=0)
    q[:, :4] = 0.0
    _, choice = selected(attention(6, 2, Q=q))
    assert choice.condition < 1e3


def test_heads_that_are_all_zero_are_refused():
    zeros = {"Q": np.zeros((D, 8), np.float32)} | {n: np.zeros((D, 4), np.float32) for n in "KV"}
    assert "singular" in refused(attention(4, 2, **zeros), only=["select"])


@pytest.mark.parametrize("kv", [2, 1])
def test_heads_of_an_attention_operator(kv):
    """Nothing in the graph cuts Q, K and V into heads: the operator's attributes do."""
    text = f"""(float[b, s, 9] x0) => (float[b, s, 12] y)
        {{ x = MatMul(x0, O) q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
           y = Attention<q_num_heads = 4, kv_num_heads = {kv}>(q, k, v) }}"""
    held = {"O": normal(9, 6), "Q": normal(6, 12), "K": normal(6, 3 * kv), "V": normal(6, 3 * kv)}
    model = graph(text, 23, **held)
    (attention,) = find_attention(find_streams(model))
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, kv, 3)
    folded(model, 36, only=["select"])


# --- The first columns of the narrowest readers ---------------------------------------------------


def readers(width: int, kind: str = "float", body: str = "", **held: np.ndarray):
    """A table, and three layers that read its rows: Q as wide as these, K and V a quarter."""
    body = body or "s = Gather(E, x)"
    text = f"""(int64[b, n] x) => ({kind}[b, n, m] y)
        {{ {body} q = MatMul(s, Q) k = MatMul(s, K) v = MatMul(s, V) qr = Relu(q) kr = Relu(k)
           vr = Relu(v) y = Concat<axis = -1>(qr, kr, vr) }}"""
    weights = {"E": normal(60, width, seed=1), "Q": normal(width, width, seed=2)}
    weights |= {name: normal(width, width // 4, seed=seed) for seed, name in enumerate("KV", 3)}
    dtype = {"float": np.float32, "float16": np.float16}[kind]
    return graph(text, 18, **{name: w.astype(dtype) for name, w in (weights | held).items()})


def in_part(source, count: int):
    """Fold ``source``, where nothing else is offered than ``count`` columns."""
    every = SelectPass.candidates

    def some(self, stream):
        offered = (part for whole in every(self, stream) for part in (whole, *whole.in_part()))
        yield from (each for each in offered if each.text.startswith(f"{count} columns"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectPass, "candidates", some)
        return folded(source, only=["select"])


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_the_first_columns_of_the_narrowest_readers(kind):
    result = in_part(readers(80, kind), 72)
    assert result.report.saving.weights == 72 * 80
    expected = ["Concat", "Gather", "MatMul", *3 * ["Relu"], *4 * ["Slice"], "Concat"]
    assert sorted(operators(result.model)) == sorted(expected)
    held = result.model.graph.initializers
    assert held["Q_rest"].const_value.shape == (80, 80 - (72 - 40))
    assert not {"Q", "K", "V"} & set(held)
    assert prove(result.original, result.model, result.report.folded).error < 1e-12


def test_layers_that_are_slices_altogether():
    """All of them are narrower than the stream: no product is left."""
    narrow = {"Q": normal(80, 32, seed=2)}
    result = in_part(readers(80, **narrow), 72)
    assert operators(result.model).count("MatMul") == 0
    assert result.report.saving.weights == 72 * 80


def test_a_part_where_all_of_it_is_not_accurate_enough():
    report = folded(readers(256, "float16")).report
    (stream,) = report.folded
    assert stream.folded.text.startswith("248 columns of ")
    assert report.saving.weights == 248 * 256
    dearer = [each for each in stream.candidates if each.refused is not None]
    assert any("absorb" in each.strategy for each in dearer)


def test_rows_of_a_tall_writer_are_better_than_the_first_columns():
    body = "h = Gather(E, x) r = Relu(h) s = MatMul(r, O)"
    held = {"E": normal(60, 200, seed=1), "O": normal(200, 80, seed=5)}
    source = readers(80, body=body, **held)
    assert "no strategy applies" in refused(source, only=["select"])


@pytest.mark.parametrize("shape", [(80, 80), (80, 72)])
def test_columns_that_are_alike_are_no_basis(shape):
    zeros = {"K": np.zeros((80, 20)), "V": np.zeros((80, 20)), "Q": np.zeros(shape)}
    assert "singular" in refused(readers(80, **zeros), only=["select"])
