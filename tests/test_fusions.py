"""What ONNX Runtime fuses in a model it fuses in the folded one too, but for layers that are gone.

Fusions are found by looking for the operators that an optimiser writes and the export does not
have: activations with their bias, norms, products with a gain or a transpose, convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnx_fold
from onnx_fold.graph.linear import find_linears
from onnx_fold.models.presets import PRESETS

pytest.importorskip("torch")
pytest.importorskip("transformers")
import families

from onnx_fold.models.export import export

PRODUCTS = ("FusedGemm", "FusedMatMul", "Gemm")
"""Operators that hold a linear layer, or else multiply what the graph computes."""

MOVES = ("Concat", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that compute nothing; how many an optimiser needs depends on the layout of Q, K, V."""

Operators = Counter[tuple[str, bool]]
"""How often there is an operator, apart by whether it is a product that holds a weight."""


def operators(model: onnx.ModelProto) -> Operators:
    weights = {tensor.name for tensor in model.graph.initializer}
    return Counter(
        (node.op_type, node.op_type in PRODUCTS and not weights.isdisjoint(node.input))
        for node in model.graph.node
        if node.op_type not in MOVES
    )


def by_session(level: str) -> Callable[[Path], onnx.ModelProto]:
    def optimise(path: Path) -> onnx.ModelProto:
        target = path.with_suffix(f".{level}.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(target)
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return onnx.load(target)

    return optimise


def by_transformers(kind: str) -> Callable[[Path], onnx.ModelProto]:
    def optimise(path: Path) -> onnx.ModelProto:
        from onnxruntime.transformers.optimizer import optimize_model

        return optimize_model(str(path), kind).model

    return optimise


OPTIMISERS = {
    "all": by_session("ORT_ENABLE_ALL"),
    "extended": by_session("ORT_ENABLE_EXTENDED"),
    "bert": by_transformers("bert"),
    "gpt2": by_transformers("gpt2"),
}


def fusions(path: Path, optimise: Callable[[Path], onnx.ModelProto]) -> Operators:
    """The operators of ``path`` that only optimisers write, once ``optimise`` has; no MatMul is."""
    exported, found = operators(onnx.load(path)), operators(optimise(path))
    more = {key: count for key, count in found.items() if count > exported[key]}
    return Counter({key: count for key, count in more.items() if key[0] != "MatMul"})


def assert_no_fusion_is_lost(source: Path, folder: Path, **options: object) -> set[str]:
    """Fold ``source`` and compare; return what was fused."""
    result = onnx_fold.fold(source, objective="size", verify=False, **options)
    assert result.report.folded
    folded = folder / "folded.onnx"
    result.save(folded)
    layers, kept = (len(find_linears(ir.load(path).graph)) for path in (source, folded))
    # columns of an FFN's first layer put a Concat between its product and its bias
    joined = sum(" columns of " in stream.folded.text for stream in result.report.folded)
    fused = set()
    for name, optimise in OPTIMISERS.items():
        before, after = fusions(source, optimise), operators(optimise(folded))
        fused |= {operator for operator, _ in before}
        for key, count in before.items():
            allowed = layers - kept if key[1] else joined * (key[0] == "BiasGelu")
            assert count - after[key] <= allowed, (name, key)
    return fused


CASES = [
    *((n, "torchscript") for n in PRESETS if n.startswith("tiny-") and "norms" not in n),
    *((name, "dynamo") for name in ("tiny-fused", "tiny-gqa", "tiny-parallel-glu")),  # the slower
]
FUSED_BY_ACTIVATION = {
    "gelu": {"BiasGelu"},
    "silu": {"QuickGelu"},
    "relu": set(),
    "sigmoid": set(),
}


@pytest.mark.parametrize(("preset", "exporter"), CASES)
@pytest.mark.filterwarnings("ignore")  # the optimizer's own
def test_presets(tmp_path, preset, exporter):
    source = export(preset, tmp_path / "model.onnx", exporter=exporter, kv_cache=True)
    fused = assert_no_fusion_is_lost(source, tmp_path)
    assert FUSED_BY_ACTIVATION[PRESETS[preset].activation] <= fused


@pytest.mark.filterwarnings("ignore")
def test_hidden_channels_in_another_order(tmp_path):
    """O is interpolated in every block: what is fused lies between the layers that change."""
    source = export("tiny-mha", tmp_path / "model.onnx", kv_cache=True)
    fused = assert_no_fusion_is_lost(source, tmp_path, only=["merge", "interpolate"])
    assert "BiasGelu" in fused


FAMILIES = {
    "llama": "QuickGelu",
    "qwen3": "SimplifiedLayerNormalization",
    "gpt2": "FastGelu",
    "gpt-neox": "FusedMatMul",
    "falcon-gqa": "BiasGelu",
    "bert": "BiasGelu",
    "vit": "ReorderOutput",  # of a convolution in ONNX Runtime's own layout
    "whisper": "BiasGelu",
    "timm": "BiasGelu",
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_families(tmp_path, name):
    path = tmp_path / "model.onnx"
    source = families.export(families.case(name), path, "torchscript", 17)
    assert FAMILIES[name] in assert_no_fusion_is_lost(source, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_norms_that_stay(tmp_path):
    """The gain is ones, and its operator stays: without it no norm would be fused."""
    path = tmp_path / "model.onnx"
    source = families.export(families.case("llama", normed=True), path, "torchscript", 17)
    fused = assert_no_fusion_is_lost(source, tmp_path, strategy="rotate", force=True)
    assert "SimplifiedLayerNormalization" in fused
