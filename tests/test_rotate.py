"""Rotate: streams with norms that stay, an orthogonal basis, a triangle that is not stored."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from helpers import (
    assert_close,
    assert_same_function,
    feeds,
    fold,
    folded,
    graph,
    normal,
    operators,
    outputs,
    proto,
    refused,
    weights,
)

import onnx_fold
from onnx_fold.algebra.exact import Multiplier, exact, values
from onnx_fold.algebra.expression import evaluate, literal, scaled_rows, transpose
from onnx_fold.algebra.rotation import OrthogonalBasis, orthogonal_factor
from onnx_fold.algebra.storage import Spool
from onnx_fold.check import proof
from onnx_fold.engine.candidate import Options
from onnx_fold.graph.channels import Group
from onnx_fold.passes.rotate import RotatePass
from onnx_fold.streams.norms import find_norm_streams

D, FFN = 16, 40
B = 8  # panels where size is the objective, and no head is in the way
ROTATE = {"strategy": "rotate", "force": True, "objective": "size"}

NORMS = {  # from {x} to {y}, with the gain {g}: as exporters write it
    "dynamo": """{y}_p = Pow({x}, two) {y}_m = ReduceMean<keepdims = 1>({y}_p, last)
        {y}_e = Add({y}_m, eps) {y}_s = Sqrt({y}_e) {y}_r = Reciprocal({y}_s)
        {y}_n = Mul({x}, {y}_r) {y} = Mul({y}_n, {g})""",
    "torchscript": """{y}_c = Cast<to = 1>({x}) {y}_p = Pow({y}_c, two)
        {y}_m = ReduceMean<keepdims = 1>({y}_p, last) {y}_e = Add({y}_m, eps)
        {y}_s = Sqrt({y}_e) {y}_r = Div(one, {y}_s) {y}_n = Mul({y}_c, {y}_r)
        {y}_b = Cast<to = 1>({y}_n) {y} = Mul({g}, {y}_b)""",
    "square": """{y}_p = Mul({x}, {x}) {y}_m = ReduceMean<keepdims = 1>({y}_p, last)
        {y}_e = Add({y}_m, eps) {y}_s = Sqrt({y}_e) {y}_n = Div({x}, {y}_s)
        {y} = Mul({y}_n, {g})""",
    "length": """{y}_l = ReduceL2<keepdims = 1>({x}, last) {y}_e = Max({y}_l, eps)
        {y}_n = Div({x}, {y}_e) {y} = Mul({y}_n, {g})""",
    "operator": "{y} = RMSNormalization<axis = -1, epsilon = 0.1>({x}, {g})",
}
HELD = {
    "two": np.float32(2.0).reshape(()),
    "one": np.float32(1.0).reshape(()),
    "eps": np.float32(0.1).reshape(()),
    "last": np.array([-1]),
}


def gain(seed: int) -> np.ndarray:
    return 1.0 + 0.3 * normal(D, seed=seed) * np.float32(np.sqrt(D))


def norm(kind: str = "dynamo", x: str = "s", y: str = "n", g: str = "g") -> str:
    return NORMS[kind].format(x=x, y=y, g=g)


def stream(
    body: str,
    results: str = "float[b, t, 16] q, float[b, t, 8] k",
    opset: int = 18,
    **held: np.ndarray,
) -> ir.Model:
    """``x W -> s``, and ``body``, which leads from ``s`` to the ``results``."""
    given = {"W": normal(FFN, D, seed=1), "g": gain(2), "Q": normal(D, D, seed=3)}
    given |= {"K": normal(D, 8, seed=4), "O": normal(D, 7, seed=5)} | HELD | held
    text = f"(float[b, t, {FFN}] x) => ({results}) {{ s = MatMul(x, W) {body} }}"
    used = {name for name in given if f"{name})" in text or f"{name}," in text}
    return graph(text, opset, **{name: given[name] for name in sorted(used)})


HEADS = "q0 = MatMul(n, Q) q = Softmax(q0) k0 = MatMul(n, K) k = Softmax(k0)"
"""Readers whose outputs are not graph outputs, so that they can be cut."""


def saved(columns: int, panels: int, width: int = D) -> int:
    """Zeros below the diagonal of the first ``columns`` columns, as whole panels."""
    share = columns // panels
    return sum(share * (width - share * (index + 1)) for index in range(panels))


@pytest.mark.parametrize("kind", NORMS)
def test_each_spelling_of_a_norm(kind):
    model = stream(norm(kind) + HEADS, opset=23 if kind == "operator" else 18)
    result = folded(model, saved(D, B), **ROTATE)
    (report,) = result.report.folded
    assert report.folded.strategy == "rotate"
    assert report.folded.nodes_added == len(operators(result.model)) - len(operators(model))
    assert set(operators(model)) - set(operators(result.model)) == set()


def test_the_operator_of_onnxruntime():
    """It stands in ONNX's own domain, which the checker does not know it in."""
    body = "n = SimplifiedLayerNormalization<axis = -1, epsilon = 0.1>(s, g)" + HEADS
    model = stream(body)
    result = fold(model, **ROTATE)
    assert result.report.saving.weights == saved(D, B)
    x = normal(2, 3, FFN, seed=19)
    for before, after in zip(
        *(outputs(m, x=x).values() for m in (model, result.model)), strict=True
    ):
        assert_close(after, before)


@pytest.mark.parametrize("panels", [2, 4, 8])
def test_what_goes_is_half_of_d_squared_but_for_the_panels(panels):
    assert saved(D, panels) == (1 - 1 / panels) / 2 * D * D


def test_four_panels_where_time_is_the_objective_and_it_is_forced():
    options = {"strategy": "rotate", "force": True, "target": "cpu"}
    result = folded(stream(norm() + HEADS), saved(D, 4), **options)
    assert "(4 panels)" in result.report.folded[0].folded.text


def test_whole_heads_to_a_panel():
    """Two heads of Q: one panel each, where eight would be cut if nothing but size counted."""
    body = f"{norm()} q0 = MatMul(n, Q) q1 = Reshape(q0, to) q = Softmax(q1)"
    to = np.array([0, 0, 2, D // 2])
    held = {"E": normal(9, D, seed=8), "g": gain(2), "Q": normal(D, D, seed=3), "to": to}
    held |= {name: HELD[name] for name in ("two", "eps", "last")}
    text = f"(int64[b, t] x) => (float[b, t, 2, {D // 2}] q) {{ s = Gather(E, x) {body} }}"
    result = folded(graph(text, **held), saved(D, 2), **ROTATE)
    assert "(2 panels)" in result.report.folded[0].folded.text


@pytest.mark.parametrize(("width", "panels"), [(512, 2), (1024, 4), (2048, 4)])
def test_as_many_panels_as_pay_in_time(width, panels):
    """On a processor, in float32: a panel costs two operators and a copy of what it reads."""
    held = {"W": (FFN, width), "Q": (width, width), "g": (width,)}
    text = f"(float[b, t, {FFN}] x) => (float[b, t, {width}] q) {{ s = MatMul(x, W)"
    text += " n = RMSNormalization(s, g) q0 = MatMul(n, Q) q = Softmax(q0) }"
    found = find_norm_streams(graph(text, 23, **{k: normal(*v) for k, v in held.items()}))
    (proposal,) = RotatePass(Options(target="cpu")).candidates(found[0])
    assert f"({panels} panels)" in proposal.text


def test_narrow_readers_side_by_side_are_not_put_together():
    """K and V of GQA: each reads its own share of the channels, and nothing is concatenated."""
    body = """k0 = MatMul(n, K) v0 = MatMul(n, V) q0 = MatMul(n, Q)
        k = Softmax(k0) v = Softmax(v0) q = Softmax(q0)"""
    results = "float[b, t, 16] q, float[b, t, 4] k, float[b, t, 4] v"
    held = {"K": normal(D, 4, seed=6), "V": normal(D, 4, seed=7)}
    model = stream(norm() + body, results, **held)
    result = folded(model, saved(D, 4), strategy="rotate", force=True, target="cpu")
    (report,) = result.report.folded
    assert report.folded.nodes_added == 5
    assert operators(result.model).count("Slice") == 3
    assert operators(result.model).count("Concat") == 1


def test_a_writer_becomes_the_triangle_where_no_reader_is_as_wide():
    model = stream(norm() + "q = MatMul(n, K)", "float[b, t, 8] q")
    result = folded(model, saved(D, B), **ROTATE)
    assert (
        result.report.folded[0].folded.text == "triangle of MatMul -> s (8 panels) into MatMul -> q"
    )


def test_a_reader_that_writes_a_graph_output():
    held = {"E": normal(9, D, seed=8), "g": gain(2), "Q": normal(D, D, seed=3)}
    text = f"(int64[b, t] x) => (float[b, t, 16] q) {{ s = Gather(E, x) {norm()}"
    held |= {name: HELD[name] for name in ("two", "eps", "last")}
    model = graph(text + " q = MatMul(n, Q) }", **held)
    result = folded(model, saved(D, B), **ROTATE)
    (report,) = result.report.folded
    assert report.folded.nodes_added == len(operators(result.model)) - len(operators(model))


def test_a_table_its_positions_and_a_bias_are_rotated():
    held = {"E": normal(9, D, seed=8), "P": normal(5, D, seed=9), "b": normal(D, seed=10)}
    held |= {"g": gain(2), "Q": normal(D, D, seed=3), "K": normal(D, 8, seed=4)}
    text = "(int64[b, 5] x) => (float[b, t, 16] q, float[b, t, 8] k) {"
    text += f" e = Gather(E, x) f = Add(e, P) s = Add(f, b) {norm()} {HEADS} }}"
    names = ("two", "eps", "last")
    model = graph(text, **held, **{name: HELD[name] for name in names})
    folded(model, saved(D, B), **ROTATE)


def test_readers_with_and_without_a_norm_and_norms_with_other_gains():
    body = f"""{norm()} {norm(y="m", g="h")} q0 = MatMul(n, Q) q = Softmax(q0)
        k0 = MatMul(m, K) k = Softmax(k0) o = MatMul(s, O)"""
    results = "float[b, t, 16] q, float[b, t, 8] k, float[b, t, 7] o"
    result = folded(stream(body, results, h=gain(11)), **ROTATE)
    assert result.report.saving.weights >= saved(D, B)  # the readers end at other places too


def test_two_streams_that_share_a_gain():
    """Exporters store equal gains once; each norm gets ones of its own, or shares them too."""
    body = f"""{norm()} a0 = MatMul(n, A) a = Relu(a0) r = MatMul(a, B)
        {norm(x="r", y="m")} q0 = MatMul(m, Q) q = Softmax(q0)"""
    held = {"A": normal(D, FFN, seed=12), "B": normal(FFN, D, seed=13)}
    model = stream(body, "float[b, t, 16] q", **held)
    result = fold(model, **ROTATE)
    assert [each.folded.weights_removed for each in result.report.folded] in (
        [saved(D, B) - D, saved(D, B)],
        [saved(D, B), saved(D, B) - D],
    )
    folded(model, 2 * saved(D, B) - D, **ROTATE)


def test_a_bias_behind_the_reader_stays():
    body = norm() + "q1 = MatMul(n, Q) q0 = Add(q1, b) q = Softmax(q0)"
    folded(stream(body, "float[b, t, 16] q", b=normal(D, seed=14)), saved(D, B), **ROTATE)


LAYER_NORM = {"norm": "layer", "num_key_value_heads": 4, "ffn": "mlp", "bias": True}
LAYER_NORM |= {"activation": "gelu", "positions": "learned"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("norm_", [{"norm": "rms"}, LAYER_NORM])
def test_sixteen_bits(norm_, dtype, tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.config import SkiplessConfig
    from onnx_fold.models.export import export

    shape = SkiplessConfig(hidden_size=128, head_dim=32, intermediate_size=448, **norm_)
    path = export(shape, tmp_path / "m.onnx", dtype=dtype, kv_cache=True)
    result = onnx_fold.fold(path, provider="cpu", **ROTATE)
    report = result.report
    assert len(report.folded) == 5
    # in front of Q, K and V of the first block there is a table alone, and a panel is a head
    zeros = (4 * 7 * 128 * 128 + 6 * 128 * 128) // 16
    added = shape.vocab_size if shape.bias else 0  # the last norm's bias, behind the logits
    assert report.saving.weights == zeros - added
    assert report.proof.proved == [each.name for each in report.folded]
    assert report.verification.ok
    # the processor's kernels keep float32 between operators of the original, where they can
    parity = onnx_fold.verify(path, result.model, provider="cpu", emulate=True)
    ratios = {each.name: each.ratio for each in parity.outputs}
    assert max(ratios.values()) <= 2.0, ratios


def test_it_is_proved_and_verified_by_default(tmp_path):
    path = tmp_path / "m.onnx"
    ir.save(stream(norm() + HEADS), path)
    report = onnx_fold.fold(path, provider="cpu", **ROTATE).report
    assert report.proof.error < 1e-12
    assert report.verification.ok


@pytest.mark.parametrize("norm_", [norm(), "n = LayerNormalization(s, g) "])
def test_a_stream_is_proved_by_itself(norm_, tmp_path, monkeypatch):
    """As in a model too large to be run whole: the squares of the stream are no place to cut."""
    monkeypatch.setattr(proof, "WHOLE", 0)
    path = tmp_path / "m.onnx"
    ir.save(stream(norm_ + HEADS), path)
    found = onnx_fold.fold(path, provider="cpu", **ROTATE).report.proof
    assert found.scope == "each stream"
    assert len(found.proved) == 1
    assert found.error < 1e-12


# --- LayerNorm ------------------------------------------------------------------------------------

LAYER_NORMS = {
    "operator": "{y} = LayerNormalization<axis = -1, epsilon = 0.1>({x}, {g}, {b})",
    "decomposed": """{y}_m = ReduceMean<keepdims = 1>({x}, last) {y}_d = Sub({x}, {y}_m)
        {y}_p = Pow({y}_d, two) {y}_v = ReduceMean<keepdims = 1>({y}_p, last)
        {y}_e = Add({y}_v, eps) {y}_s = Sqrt({y}_e) {y}_n = Div({y}_d, {y}_s)
        {y}_o = Mul({y}_n, {g}) {y} = Add({y}_o, {b})""",
}


def layer_norm(kind: str = "operator", x: str = "s", y: str = "n") -> str:
    return LAYER_NORMS[kind].format(x=x, y=y, g="g", b="b") + " "


BIASED = """q1 = MatMul(n, Q) q0 = Add(q1, c) q = Softmax(q0)
    k1 = MatMul(n, K) k0 = Add(e, k1) k = Softmax(k0)"""
BIASES = {"b": normal(D, seed=21), "c": normal(D, seed=22), "e": normal(8, seed=23)}


@pytest.mark.parametrize("kind", LAYER_NORMS)
def test_a_layer_norm_stays_as_it_is(kind):
    """Its bias goes through the readers into theirs; no operator is replaced."""
    model = stream(layer_norm(kind) + BIASED, **BIASES)
    result = folded(model, saved(D, B), **ROTATE)
    (report,) = result.report.folded
    assert report.folded.error < 3 * report.folded.error_original
    assert report.folded.nodes_added == 15
    assert operators(result.model).count("LayerNormalization") == (kind == "operator")


def test_a_layer_norm_without_a_bias():
    model = stream("n = LayerNormalization(s, g) " + HEADS)
    folded(model, saved(D, B), **ROTATE)


def test_the_bias_of_a_layer_norm_becomes_one_of_a_reader():
    model = stream(layer_norm() + HEADS, b=BIASES["b"])
    result = folded(model, saved(D, B) - D - 8, **ROTATE)
    assert operators(result.model).count("Add") == 2


@pytest.mark.parametrize("kind", LAYER_NORMS)
def test_a_writer_in_front_of_a_layer_norm_becomes_the_triangle(kind):
    model = stream(layer_norm(kind) + "q = MatMul(n, K)", "float[b, t, 8] q", b=BIASES["b"])
    (report,) = folded(model, saved(D, B) - 8, **ROTATE).report.folded
    assert report.folded.text.startswith("triangle of MatMul -> s")


def test_rows_without_zeros_of_a_writer_in_front_of_a_layer_norm_keep_their_length():
    """They are multiplied by ``T`` alone: what would make them longer would be rounded, too."""
    model = stream(layer_norm() + "q = MatMul(n, K)", "float[b, t, 8] q", b=BIASES["b"])
    panels = [
        each.const_value.numpy()
        for each in fold(model, **ROTATE).model.graph.initializers.values()
        if "panel" in each.name
    ]
    heights = [len(each) for each in panels]
    assert heights == [FFN - share * D // B for share in range(B)]
    rows = np.hstack([each[-heights[-1] :] for each in panels])
    before = normal(FFN, D, seed=1)[-heights[-1] :]
    np.testing.assert_allclose(
        np.linalg.norm(rows, axis=1), np.linalg.norm(before, axis=1), rtol=1e-6
    )


def test_a_layer_norm_beside_an_rms_norm_and_a_reader_without():
    """Behind an RMSNorm the channels do not add up to zero: only the others can be triangular."""
    body = f"""{layer_norm()} {norm(y="m", g="h")} q1 = MatMul(n, Q) q0 = Add(q1, c) q = Softmax(q0)
        k0 = MatMul(m, K) k = Softmax(k0) o = MatMul(s, O)"""
    results = "float[b, t, 16] q, float[b, t, 8] k, float[b, t, 7] o"
    held = {name: BIASES[name] for name in "bc"} | {"h": gain(11)}
    (report,) = folded(stream(body, results, **held), saved(D, B), **ROTATE).report.folded
    assert report.folded.text.startswith("triangle of MatMul -> q1 (8 panels)")


def test_a_mean_that_is_used_for_more_forbids_a_triangular_writer():
    body = """m = ReduceMean<keepdims = 1>(s, last) n = LayerNormalization(s, g)
        q = MatMul(n, Q)"""
    model = stream(body, "float[b, t, 16] q, float[b, t, 1] m")
    (report,) = folded(model, saved(D, B), **ROTATE).report.folded
    assert report.folded.text == "triangle of MatMul -> q (8 panels) into MatMul -> s"


# --- The norm of a sum, as ONNX Runtime's optimizers write it -----------------------------------

SKIPS = {
    "rms": "{y} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.1>({x}, {g}{c})",
    "layer": "{y} = com.microsoft.SkipLayerNormalization<epsilon = 0.1>({x}, {g}, b{c})",
}
SUM = "n, mean, deviation, sum"
RESULTS = "float[b, t, 16] q, float[b, t, 8] k"


def sum_and_norm(
    kind: str, body: str, results: str = RESULTS, y: str = "n", c: str = "", **held: np.ndarray
) -> ir.Model:
    """``x W + z U (+ f)`` and its norm, as one operator; ``y`` are its outputs."""
    given = {"W": normal(FFN, D, seed=1), "U": normal(FFN, D, seed=25), "f": normal(D, seed=26)}
    given |= {"Q": normal(D, D, seed=3), "K": normal(D, 8, seed=4), "O": normal(D, 7, seed=5)}
    given |= {"g": gain(2), "h": gain(11)} | BIASES | held
    text = f"(float[b, t, {FFN}] x, float[b, t, {FFN}] z) => ({results}) {{ s = MatMul(x, W)"
    text += f" r = MatMul(z, U) {SKIPS[kind].format(x='s, r', y=y, g='g', c=c)} {body} }}"
    words = set(re.findall(r"\w+", text))
    return graph(text, **{name: given[name] for name in sorted(words & set(given))})


def assert_rotates(model: ir.Model, *, matrices: int) -> None:
    """It folds, to ``matrices`` weights less but for biases, and the operator stays."""
    result = fold(model, **ROTATE)
    inputs = feeds(model)
    for before, after in zip(
        *(outputs(each, **inputs).values() for each in (model, result.model)), strict=True
    ):
        assert_close(after, before)
    (report,) = result.report.folded
    assert result.report.saving.weights == matrices
    assert report.folded.error < 3 * report.folded.error_original
    (name,) = (each for each in operators(model) if each.startswith("Skip"))
    assert operators(result.model).count(name) == 1


@pytest.mark.parametrize("kind", SKIPS)
@pytest.mark.parametrize("c", ["", ", f"])
def test_a_norm_of_a_sum_is_one_operator(kind, c):
    """The bias ``f`` in front of it is rotated, the one behind the gain goes into the readers."""
    assert_rotates(sum_and_norm(kind, BIASED, c=c), matrices=saved(D, B))


@pytest.mark.parametrize("kind", SKIPS)
def test_the_sum_in_front_of_the_norm_may_be_read_too(kind):
    """It is in the stream, without the gain: as where GPT-NeoX's two norms read one sum."""
    body = """o0 = MatMul(sum, O) o = Softmax(o0) m = LayerNormalization(sum, h)
        p0 = MatMul(m, J) p = Softmax(p0) """
    results = f"{RESULTS}, float[b, t, 7] o, float[b, t, 16] p"
    model = sum_and_norm(kind, body + BIASED, results, SUM, J=normal(D, D, seed=27))
    assert_rotates(model, matrices=saved(D, B))


@pytest.mark.parametrize("kind", SKIPS)
def test_a_sum_in_front_of_the_norm_that_is_looked_at(kind):
    results = f"{RESULTS}, float[b, t, 16] o"
    text = reason(sum_and_norm(kind, BIASED + " o = Relu(sum)", results, SUM))
    assert "'sum' is read by Relu" in text
    results = f"{RESULTS}, float[b, t, 16] sum"
    assert "'sum' is a graph output" in reason(sum_and_norm(kind, BIASED, results, SUM))


@pytest.mark.parametrize("kind", SKIPS)
def test_a_norm_of_a_sum_whose_gain_is_computed(kind):
    computed = "i = Relu(h) " + SKIPS[kind].format(x="s, r", y="m", g="i", c="")
    model = sum_and_norm(kind, f"{computed} {BIASED.replace('n, ', 'm, ')}", y="unused")
    assert "has a gain that is not constant" in reason(model)


def test_gemms_with_biases():
    held = {"W": normal(FFN, D, seed=1), "Q": normal(D, D, seed=3), "g": gain(2)} | BIASES
    held["e"] = normal(D, seed=24)
    text = f"""(float[n, {FFN}] x) => (float[n, 16] q) {{ s = Gemm(x, W, e)
        n = LayerNormalization(s, g, b) q0 = Gemm<transB = 1>(n, Q, c) q = Softmax(q0) }}"""
    folded(graph(text, **held), saved(D, B), **ROTATE)


# --- What is left alone ---------------------------------------------------------------------------


def reason(model: ir.Model, **options) -> str:
    """Why nothing is folded."""
    return refused(model, **(options or ROTATE))


def test_a_narrow_stream_does_not_pay_by_default():
    text = reason(stream(norm() + HEADS), skip=["merge"], target="cpu")
    assert "norms kept: 0.375 d² by rotation (does not pay in time on cpu)" in text
    assert "fine-tuning" not in text


def test_a_narrow_stream_folds_for_size():
    assert not refused(stream(norm() + HEADS), skip=["merge", "rotate"]).startswith("norms kept")
    folded(stream(norm() + HEADS), saved(D, B))


def test_a_residual_stream_is_left():
    body = f"""{norm()} a0 = MatMul(n, A) a = Relu(a0) r = MatMul(a, B) u = Add(s, r)
        {norm(x="u", y="m")} c0 = MatMul(m, C) c = Relu(c0) p = MatMul(c, B) v = Add(u, p)
        {norm(x="v", y="l")} q0 = MatMul(l, Q) q = Softmax(q0)"""
    held = {
        "A": normal(D, FFN, seed=15),
        "B": normal(FFN, D, seed=16),
        "C": normal(D, FFN, seed=20),
    }
    model = stream(body, "float[b, t, 16] q", **held)
    assert "0.375 d² by rotation (does not pay in a residual model)" in refused(model)
    folded(model, **ROTATE)  # but it can be asked for


@pytest.mark.parametrize(
    ("body", "results"),
    [
        ("q = Softmax(n)", "float[b, t, 16] q"),
        ("q = Relu(n) k0 = MatMul(n, K) k = Softmax(k0)", "float[b, t, 16] q, float[b, t, 8] k"),
        ("k0 = MatMul(n, K) k = Softmax(k0)", "float[b, t, 16] s, float[b, t, 8] k"),
        ("k0 = MatMul(n, K) k = Softmax(k0)", "float[b, t, 16] n, float[b, t, 8] k"),
    ],
)
def test_what_else_looks_at_the_channels_opens_the_stream(body, results):
    assert "is read by" in reason(stream(norm() + body, results))


@pytest.mark.parametrize(
    "body",
    [
        f"{norm()} {norm(x='n', y='m', g='h')}",  # the length of what has a gain
        f"{norm()} m = Add(n, s)",  # with a gain and without
        f"{norm()} {norm(y='l', g='h')} m = Add(n, l)",  # two gains
        f"{norm()} m = Add(n, k9)",  # a table behind the gain
    ],
)
def test_a_gain_that_cannot_be_moved_opens_the_stream(body):
    held = {"h": gain(17), "k9": normal(9, D)}
    model = stream(body + " k0 = MatMul(m, K) k = Softmax(k0)", "float[b, t, 8] k", **held)
    (found,) = find_norm_streams(model)
    assert found.group == Group.ORTHOGONAL
    assert not found.is_closed
    refused(model, **ROTATE)


def test_the_second_of_two_gains_goes_into_the_layer_behind_it():
    body = f"{norm()} m = Mul(n, h) k0 = MatMul(m, K) k = Softmax(k0)"
    model = stream(body, "float[b, t, 8] k", h=gain(17))
    (found,) = find_norm_streams(model)
    assert not found.is_closed
    result = folded(model, **ROTATE)
    assert operators(result.model).count("Mul") == operators(model).count("Mul") - 1


def test_a_gain_that_a_caller_can_override():
    model = stream(norm() + HEADS)
    model.graph.inputs.append(model.graph.initializers["g"])
    assert not any(each.is_closed for each in find_norm_streams(model))


def test_streams_without_norms_are_not_offered():
    model = stream("n = Identity(s) " + HEADS)
    assert find_norm_streams(model) == []
    assert not fold(model, only=["rotate"]).report.folded


def test_the_others_do_not_see_it():
    model = stream(norm() + HEADS)
    for name in ("absorb", "interpolate", "select"):
        result = fold(model, strategy=name)
        assert proto(result.model) == proto(model)
        assert weights(result.model) == weights(model)


def test_folding_twice_changes_nothing_more():
    assert not fold(fold(stream(norm() + HEADS), **ROTATE).model, **ROTATE).report.folded


def test_a_protected_layer_is_left():
    assert "'Q' is protected" in reason(stream(norm() + HEADS), **ROTATE, protect=["Q"])


# --- The algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [3, 6, 9])
def test_the_factor_is_orthogonal_and_makes_a_triangle(columns):
    matrix = normal(6, columns, seed=18, dtype=np.float64)
    factor = orthogonal_factor(literal(matrix), Spool())
    rotation = evaluate(factor)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(6), atol=1e-14)
    triangle = evaluate(OrthogonalBasis(factor).of_reader(literal(matrix)))
    np.testing.assert_allclose(np.tril(triangle, -1), 0.0, atol=1e-14)


def test_scaled_rows_multiply_exactly():
    matrix, factors = normal(6, 4, dtype=np.float64), normal(6, dtype=np.float64)
    x, y = normal(3, 6, dtype=np.float64), normal(3, 4, dtype=np.float64)
    scaled = exact(scaled_rows(literal(matrix), literal(factors)))
    expected = np.diag(factors) @ matrix
    np.testing.assert_allclose(values(scaled), expected)
    np.testing.assert_allclose(Multiplier().times(x, scaled), x @ expected)
    np.testing.assert_allclose(Multiplier().times(y, transpose(scaled)), y @ expected.T)
    rows = evaluate(scaled.take(literal(np.array([2, 0])), 0))
    np.testing.assert_allclose(rows, expected[[2, 0]])


def test_a_mean_without_its_axis_takes_off_something_else() -> None:
    """``[3, 1, 16] - [3, 1]`` has other rows taken off each: its channels do not add up to zero."""
    model = graph(
        "(float[3, 1, 12] x) => (float[a, b, 8] z, float[c, d, 4] k) { h = Relu(x)"
        " s = MatMul(h, W) m = ReduceMean<keepdims = 0>(s, last) d = Sub(s, m) p = Pow(d, two)"
        " v = ReduceMean(p, last) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)"
        " q0 = MatMul(n, Q) z = Softmax(q0) k0 = MatMul(n, K) k = Softmax(k0) }",
        W=normal(12, 16),
        Q=normal(16, 8),
        K=normal(16, 4, seed=3),
        **{name: HELD[name] for name in ("two", "eps", "last")},
    )
    assert_same_function(model, fold(model, **ROTATE).model)
