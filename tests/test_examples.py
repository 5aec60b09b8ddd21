"""The examples run, and show what docs/pipelines.md says of them."""

from pathlib import Path

import onnx_ir as ir
import pytest
from helpers import load_script

import onnx_fold

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_order_among_other_optimizers(tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    optimizers = load_script(EXAMPLES / "with_other_optimizers.py")
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
