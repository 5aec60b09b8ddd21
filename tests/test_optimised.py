"""Optimised files: what ONNX Runtime and its transformer tools fuse stays fused, the rest folds."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import (
    assert_same_function,
    feeds,
    fold,
    folded,
    graph,
    normal,
    operators,
    outputs,
    proto,
    square,
    stream_of,
)

import onnx_fold
from onnx_fold.models.presets import PRESETS
from onnx_fold.models.savings import closed_streams

# --- Real exports, through real optimisers -------------------------------------------------------

SKIPLESS = ["tiny-fused", "tiny-gqa", "tiny-mha", "tiny-parallel"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of a preset, exported once."""
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    folder: Path = tmp_path_factory.mktemp("exports")

    def get(preset: str, **options) -> Path:
        path = folder / f"{preset}{'-residual' if options else ''}.onnx"
        return path if path.exists() else export(preset, path, **options)

    return get


def by_session(source: Path, target: Path, level: str) -> Path:
    """Write what a session makes of ``source`` at one optimisation level."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return target


def by_transformers(source: Path, target: Path, preset: str) -> Path:
    """Write what the transformer optimizer makes of ``source``."""
    from onnxruntime.transformers import optimizer

    config = PRESETS[preset]
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimizer.optimize_model(str(source), "bert", **sizes).save_model_to_file(str(target))
    return target


def optimise(source: Path, folder: Path, how: str, preset: str) -> Path:
    target = folder / "optimised.onnx"
    if how == "transformers":
        return by_transformers(source, target, preset)
    return by_session(source, target, f"ORT_ENABLE_{how}")


@pytest.mark.parametrize("preset", SKIPLESS)
@pytest.mark.parametrize("how", ["BASIC", "EXTENDED", "ALL", "transformers"])
@pytest.mark.filterwarnings("ignore")  # the optimizer's own
def test_skipless_exports_fold_as_before(exported, tmp_path, preset, how):
    source, config = exported(preset), PRESETS[preset]
    result = fold(optimise(source, tmp_path, how, preset))
    assert_same_function(result.original, result.model)
    assert result.report.saving.weights == fold(source).report.saving.weights
    assert result.report.saving.weights >= closed_streams(config) * config.hidden_size**2


@pytest.mark.parametrize("how", ["BASIC", "EXTENDED", "transformers"])
@pytest.mark.parametrize("preset", ["tiny-mha", "tiny-gemma"])
@pytest.mark.filterwarnings("ignore")
def test_residual_exports_stay_as_they_are(exported, tmp_path, preset, how):
    if (how, preset) == ("transformers", "tiny-gemma"):
        pytest.skip("the optimizer asks for heads that make up the hidden size")
    source = exported(preset, residual=True)
    path = optimise(source, tmp_path, how, preset)
    result = onnx_fold.fold(path, objective="size", verify=False)
    assert not result.report.folded
    result.save(tmp_path / "folded.onnx")
    assert (tmp_path / "folded.onnx").read_bytes() == path.read_bytes()
    reasons = [reason for stream in result.report.left_alone for reason in stream.reasons]
    kept = "norms kept: 0.375 d² by rotation (does not pay in a residual model)"
    assert any("no change of basis passes" in each or kept in each for each in reasons)


# --- Fused operators, by hand --------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, F = 4, 2, 16, 80
D, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
WEIGHTS = {
    "E": normal(11, D),
    "Q": square(D, seed=1),
    "K": square(D, seed=2),
    "V": square(D, seed=3),
    "K2": normal(D, KV, seed=2),
    "V2": normal(D, KV, seed=3),
    "P": square(D, seed=4),
    "M": normal(D, F, seed=5),
    "O": normal(F, D, seed=12),
    "QKV": normal(D, 3 * D, seed=6),
    "bias": normal(3 * D, seed=7),
    "d": normal(D, seed=8),
    "f": normal(F, seed=9),
    "past": np.zeros((2, KV_HEADS, 0, HEAD_DIM), np.float32),
    "keys": np.array([6, 6], np.int32),
    "total": np.array(7, np.int32),
    "cos": normal(8, HEAD_DIM // 2, seed=10),
    "sin": normal(8, HEAD_DIM // 2, seed=11),
    "zero": np.array([0]),
}


def optimised(text: str, opset: int = 18) -> ir.Model:
    """``text`` with the weights that it names; ``ms.`` is the domain of the contrib operators."""
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    held = {name: array for name, array in WEIGHTS.items() if name in words}
    model = graph(text.replace("ms.", "com.microsoft."), opset, **held)
    model.opset_imports["com.microsoft"] = 1
    outputs(model, **feeds(model))  # it is a graph that ONNX Runtime runs
    return model


MHA = "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)"
GQA = "q = MatMul(x, Q) k = MatMul(x, K2) v = MatMul(x, V2)"
CORES = {
    "MultiHeadAttention": f"{MHA} c = ms.MultiHeadAttention<num_heads = 4>(q, k, v)",
    "MultiHeadAttention, bias": f"{MHA} c = ms.MultiHeadAttention<num_heads = 4>(q, k, v, bias)",
    "GroupQueryAttention": f"{GQA} c, i, j = ms.GroupQueryAttention<num_heads = 4,"
    " kv_num_heads = 2>(q, k, v, past, past, keys, total)",
    "GroupQueryAttention, rotary": f"{GQA} c, i, j = ms.GroupQueryAttention<num_heads = 4,"
    " kv_num_heads = 2, do_rotary = 1>(q, k, v, past, past, keys, total, cos, sin)",
    "RotaryEmbedding": f"{MHA} r = ms.RotaryEmbedding<num_heads = 4>(q, zero, cos, sin)"
    " s = ms.RotaryEmbedding<num_heads = 4>(k, zero, cos, sin)"
    " c = ms.MultiHeadAttention<num_heads = 4>(r, s, v)",
    "Attention of opset 23": f"{GQA} c = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)",
}


@pytest.mark.parametrize("core", CORES)
def test_attention_operators_are_opaque(core):
    """Q goes into the table, P into M; what lies between is not touched."""
    text = f"(int64[2, 7] ids) => (float[2, 7, {F}] y) {{ x = Gather(E, ids) {CORES[core]}"
    model = optimised(f"{text} p = MatMul(c, P) y = MatMul(p, M) }}", 23 if "opset" in core else 18)
    result = folded(model, removed=2 * D * D)
    (before,), (after,) = (
        [node for node in each.graph if node.op_type == core.split(",")[0].split()[0]][-1:]
        for each in (model, result.model)
    )
    assert after.attributes == before.attributes
    assert [v and v.name for v in after.inputs[3:]] == [v and v.name for v in before.inputs[3:]]
    (attention,) = onnx_fold.inspect(model).attention
    assert attention.projections == "{MatMul -> q, MatMul -> k, MatMul -> v}"


def test_a_packed_attention_writes_a_stream():
    """Its own weight is no layer of the graph, but P behind it folds into M."""
    text = f"(int64[2, 7] ids) => (float[2, 7, {F}] y) {{ x = Gather(E, ids)"
    text += " c = ms.Attention<num_heads = 4>(x, QKV, bias) p = MatMul(c, P) y = MatMul(p, M) }"
    result = folded(optimised(text), removed=D * D)
    assert operators(result.model) == ["Gather", "Attention", "MatMul"]


def test_a_packed_attention_reads_a_stream():
    """Q, K and V cannot become the identity, but a writer can, and QKV takes up its basis."""
    text = f"(float[2, 7, {F}] x0, float[2, 7, {D}] x1) => (float[2, 7, {F}] y)"
    text += " { o = MatMul(x0, O) e = MatMul(x1, Q) x = Add(o, e)"
    text += " c = ms.Attention<num_heads = 4>(x, QKV, bias) p = MatMul(c, P) y = MatMul(p, M) }"
    result = folded(optimised(text), removed=2 * D * D)
    (node,) = [node for node in result.model.graph if node.op_type == "Attention"]
    assert node.inputs[1].const_value.shape == (D, 3 * D)
    np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), WEIGHTS["bias"])


NORMS = {
    "SkipLayerNormalization": "m = ms.SkipLayerNormalization(p, x, d, d, d)",
    "SkipSimplifiedLayerNormalization": "m = ms.SkipSimplifiedLayerNormalization(x, p, d)",
    "SimplifiedLayerNormalization": "m = SimplifiedLayerNormalization(p, d)",
}
FUSED = {
    "BiasGelu": "m = ms.BiasGelu(p, d)",
    "FastGelu": "m = ms.FastGelu(p, d)",
    "Gelu": "m = ms.Gelu(p)",
    "QuickGelu": "m = ms.QuickGelu(p)",
    "RotaryEmbedding": "m = ms.RotaryEmbedding<num_heads = 4>(p, zero, cos, sin)",
    "MultiHeadAttention": "m = ms.MultiHeadAttention<num_heads = 4>(p, p, p)",
}


@pytest.mark.parametrize("name", [*NORMS, *FUSED])
def test_a_fused_operator_opens_the_stream(name):
    body = (NORMS | FUSED)[name]
    text = f"(float[2, 7, {D}] x) => (float[2, 7, {F}] y)"
    model = optimised(f"{text} {{ p = MatMul(x, P) {body} y = MatMul(m, M) }}")
    result = fold(model, skip=["rotate"])  # which passes through norms
    assert not result.report.folded
    assert proto(result.model) == proto(model)
    openings = stream_of(model, "p").openings
    assert any(f"'p' is read by {name}" in str(opening) for opening in openings)
    assert any(opening.is_norm for opening in openings) == (name in NORMS)


def test_an_embedding_with_a_norm_in_it_writes_no_stream():
    text = f"""(int32[2, 7] ids) => (float[2, 7, {F}] y)
        {{ x, mask = ms.EmbedLayerNormalization(ids, , E, E, , d, d)
        p = MatMul(x, Q) y = MatMul(p, M) }}"""
    model = optimised(text)
    result = folded(model, removed=D * D)
    assert operators(result.model) == ["EmbedLayerNormalization", "MatMul"]
    assert "'x' is written by EmbedLayerNormalization" in str(stream_of(model, "x").openings[0])


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "LeakyRelu"])
def test_a_gemm_with_an_activation_is_not_linear(activation):
    extra = ", activation_alpha = 0.1" if activation == "LeakyRelu" else ""
    attributes = f'activation = "{activation}"{extra}'
    text = f"(float[7, {D}] x) => (float[7, {F}] y)"
    text += f" {{ p = ms.FusedGemm<{attributes}>(x, P, d) y = MatMul(p, M) }}"
    model = optimised(text)
    assert not fold(model).report.folded
    behind = optimised(text.replace("(x, P", "(h, P").replace("{ p", "{ h = MatMul(x, Q) p"))
    assert not fold(behind).report.folded


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("attributes", ["", ", transB = 1", ", transA = 1"])
def test_a_fused_product_is_what_it_says(alpha, attributes):
    """Read as a linear layer or not: the numbers are the same."""
    text = f"(float[{D}, {D}, {D}] x) => (float[a, b, {F}] y) {{ h = MatMul(x, Q)"
    text += f" p = ms.FusedMatMul<alpha = {alpha}{attributes}>(h, P) y = MatMul(p, M) }}"
    model = optimised(text)
    assert_same_function(model, fold(model).model)


@pytest.mark.parametrize("operator", ["BiasGelu", "FastGelu"])
def test_the_bias_of_a_fused_activation(operator):
    """The bias of P goes through M into that of the activation."""
    text = f"(float[2, 7, {D}] x) => (float[2, 7, {F}] y)"
    text += f" {{ h = MatMul(x, P) p = Add(h, d) m = MatMul(p, M) y = ms.{operator}(m, f) }}"
    result = folded(optimised(text), removed=D * D + D)
    assert operators(result.model) == ["MatMul", operator]


def test_a_fused_activation_without_a_bias():
    text = f"(float[2, 7, {D}] x) => (float[2, 7, {F}] y)"
    text += " { h = MatMul(x, P) p = Add(h, d) m = MatMul(p, M) y = ms.FastGelu(m) }"
    result = folded(optimised(text), removed=D * D - (F - D))  # the bias becomes wider
    assert sorted(operators(result.model)) == ["Add", "FastGelu", "MatMul"]


@pytest.mark.parametrize("operator", ["BiasGelu", "FastGelu"])
def test_hidden_channels_are_reordered_through_a_fused_activation(operator):
    """O is interpolated: the order of its rows goes into the layer and bias before it."""
    text = f"(float[2, 7, {D}] x) => (float[2, 7, {D}] y, float[2, 7, {D}] z)"
    text += f" {{ h = MatMul(x, M) a = ms.{operator}(h, f) o = MatMul(a, O)"
    text += " y = MatMul(o, Q) z = MatMul(o, K) }"
    result = folded(optimised(text), removed=D * D, only=["interpolate"])
    assert "Gather" not in operators(result.model)
