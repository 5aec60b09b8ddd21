"""The examples run, and show what docs/pipelines.md says of them."""

import importlib.util
from pathlib import Path

import onnx_ir as ir
import pytest

import onnx_fold

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_order_among_other_optimizers(tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    optimizers = example("with_other_optimizers")
    exported = ir.load(export("tiny-fused", tmp_path / "m.onnx", exporter="torchscript"))
    after = {}
    for order in (("onnxscript", "onnx-fold", "onnxruntime"), ("onnxruntime", "onnx-fold")):
        model = exported.clone()
        for name in order:
            model = optimizers.TOOLS[name](model)
        assert optimizers.weights(model) < 112_000 < optimizers.weights(exported)
        assert onnx_fold.verify(exported, model)
        after[order[0]] = optimizers.PROVED.pop()
    assert after == {"onnxscript": "5 of 5", "onnxruntime": "1 of 5"}
