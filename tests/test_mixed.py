"""Mixed precision as ONNX Runtime's converter writes it: islands of float32 in a float16 model.

The converter puts Casts around the operators that stay float32, also in the middle of a stream, and
writes them at the end of the file. All families under ``make fuzz``, a few here.
"""

import os
from itertools import product

import onnx
import pytest

import onnx_fold

pytest.importorskip("torch")
pytest.importorskip("transformers")
from families import FAMILIES, case, export
from onnxruntime.transformers import float16

ISLANDS = {
    "activations": ("Softmax", "Sigmoid", "Erf", "Tanh", "Pow", "Sqrt", "ReduceMean"),
    "layouts": ("Add", "Reshape", "Transpose"),
}
USUAL = [("llama", "layouts"), ("gpt2", "activations"), ("bert", "layouts")]
CASES = list(product(FAMILIES, ISLANDS)) if os.environ.get("ONNX_FOLD_FUZZ") else USUAL
NOT_SEEN = {("gpt2", "layouts")}  # a Cast hides what the Shape is for: one fold less


def mixed(path, islands: str) -> onnx.ModelProto:
    return float16.convert_float_to_float16(
        onnx.load(path), keep_io_types=True, op_block_list=ISLANDS[islands]
    )


@pytest.mark.parametrize(("name", "islands"), CASES)
def test_islands_of_float32(tmp_path, name, islands):
    path = export(case(name), tmp_path / "wide.onnx", "torchscript", 17)
    source = tmp_path / "mixed.onnx"
    onnx.save(mixed(path, islands), source)
    result = onnx_fold.fold(source, objective="size", output=tmp_path / "folded.onnx")
    assert len(result.report.folded) == FAMILIES[name].streams - ((name, islands) in NOT_SEEN)
    assert result.report.verification.ok
    onnx.checker.check_model(str(tmp_path / "folded.onnx"), full_check=True)


@pytest.mark.parametrize("islands", ISLANDS)
def test_with_norms_and_skips_nothing_changes(tmp_path, islands):
    unmodified = case("bert", skipless=False)
    source, target = tmp_path / "mixed.onnx", tmp_path / "same.onnx"
    onnx.save(mixed(export(unmodified, tmp_path / "wide.onnx", "torchscript", 17), islands), source)
    assert not onnx_fold.fold(source, output=target).report.folded
    assert target.read_bytes() == source.read_bytes()
