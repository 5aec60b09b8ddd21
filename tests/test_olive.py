"""The pass for Olive, run by Olive."""

import json
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from helpers import chain, normal

import onnx_fold
from onnx_fold.errors import MissingExtraError
from onnx_fold.files.load import data_files

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore")  # Olive's own


def test_where_olive_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "olive.model", None)
    monkeypatch.delitem(sys.modules, "onnx_fold.integrations.olive", raising=False)
    with pytest.raises(MissingExtraError, match=r"onnx-fold\[olive\]"):
        import onnx_fold.integrations.olive  # noqa: F401


def test_the_package_configuration_names_the_pass():
    packages = json.loads((EXAMPLES / "olive_packages.json").read_text())["passes"]
    run = json.loads((EXAMPLES / "olive_fold.json").read_text())
    assert {each["type"] for each in run["passes"].values()} == set(packages)
    assert packages["OnnxFold"]["module_path"] == "onnx_fold.integrations.olive.OnnxFold"


@pytest.fixture
def olive(monkeypatch):
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    pytest.importorskip("olive.passes", reason="olive-ai is not installed", exc_type=ImportError)
    return pytest.importorskip("onnx_fold.integrations.olive")


def handler(folder: Path, data: str | None = None, **options):
    from olive.model import ONNXModelHandler

    folder.mkdir()
    weights = {"P": normal(16, 16), "M": normal(16, 5, seed=1)}
    ir.save(
        chain("m = Identity(p)", width=16, **weights),
        folder / "net.onnx",
        external_data=data,
        size_threshold_bytes=0 if data else 256,
    )
    if data:
        return ONNXModelHandler(folder, onnx_file_name="net.onnx", **options)
    return ONNXModelHandler(folder / "net.onnx", **options)


def make(config, device="cpu", provider="CPUExecutionProvider", disable_search=True):
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.passes.olive_pass import create_pass_from_dict

    from onnx_fold.integrations.olive import OnnxFold

    accelerator = AcceleratorSpec(device, provider)
    return create_pass_from_dict(OnnxFold, config, disable_search, accelerator)


def test_a_model_in_one_file(olive, tmp_path):
    attributes = {"who": "me", "io": [1, 2]}
    settings = {"execution_provider": ["CPUExecutionProvider"]}
    model = handler(tmp_path / "in", model_attributes=attributes, inference_settings=settings)
    report = tmp_path / "r.json"
    step = make({"objective": "size", "report": str(report)})
    folded = step.run(model, str(tmp_path / "out"))
    assert Path(folded.model_path) == tmp_path / "out" / "net.onnx"
    assert folded.model_attributes == attributes
    assert folded.inference_settings == settings
    assert onnx_fold.verify(model.model_path, folded.model_path)
    assert json.loads(report.read_text())["weights_removed"] == 16 * 16
    assert json.loads(report.read_text())["proof"]["proved"]


def test_a_model_with_its_data_in_another_file(olive, tmp_path):
    model = handler(tmp_path / "in", "net.data")
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    model.model_attributes = {"additional_files": [str(extra)]}
    folded = make({"objective": "size"}).run(model, str(tmp_path / "out"))
    assert [path.name for path in data_files(Path(folded.model_path))] == ["net.onnx.data"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert onnx_fold.verify(model.model_path, folded.model_path)


def test_a_model_without_attributes_has_none(olive, tmp_path):
    folded = make({}).run(handler(tmp_path / "in"), str(tmp_path / "out"))
    assert not folded.model_attributes


def test_files_beside_the_model_go_with_it(olive, tmp_path):
    handler(tmp_path / "in", "net.data")
    (tmp_path / "in" / "constants.npz").write_bytes(b"1")
    from olive.model import ONNXModelHandler

    named = {"onnx_file_name": "net.onnx", "constant_inputs_file_name": "constants.npz"}
    model = ONNXModelHandler(tmp_path / "in", **named)
    folded = make({}).run(model, str(tmp_path / "out"))
    assert Path(folded.constant_inputs_path) == tmp_path / "out" / "constants.npz"


def test_the_target_is_what_the_accelerator_is(olive):
    assert make({}).config.target == "cpu"
    assert make({}, "gpu", "CUDAExecutionProvider").config.target == "cuda"
    assert make({"target": "cpu"}, "gpu", "CUDAExecutionProvider").config.target == "cpu"


def test_options_are_checked(olive, tmp_path):
    with pytest.raises(onnx_fold.UsageError, match="unknown pivot"):
        make({"pivot": "z"}).run(handler(tmp_path / "in"), str(tmp_path / "out"))


def test_the_example_runs(olive, tmp_path, monkeypatch):
    from olive.workflows import run

    from onnx_fold.models.export import export

    monkeypatch.chdir(tmp_path)
    export("tiny-gqa", tmp_path / "model.onnx")
    run(str(EXAMPLES / "olive_fold.json"), package_config=str(EXAMPLES / "olive_packages.json"))
    (model,) = (tmp_path / "olive_output").rglob("*.onnx")
    assert onnx_fold.verify(tmp_path / "model.onnx", model)
    saving = json.loads((tmp_path / "fold.json").read_text())["weights_removed"]
    assert saving == 7 * 64 * 64  # two a block and one before the head
