"""From a PyTorch module to a folded file in one call, and the check against the module itself."""

import json
import sys

import families
import onnx_ir as ir
import pytest
from helpers import operators

import onnx_fold
from onnx_fold.errors import CannotWriteError, MissingExtraError, UsageError

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

BY_SIZE = {"objective": "size"}
ANY = torch.export.Dim.DYNAMIC


class Chain(torch.nn.Module):
    """P, then M, with a dropout that nothing may see."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.p, self.m = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8)
        self.dropout = torch.nn.Dropout(0.5)
        self.to(dtype)

    def forward(self, x, scale=None, *, shift=0.0):
        y = self.dropout(self.m(self.p(x)))
        return {"y": y if scale is None else y * scale, "sum": y.sum(-1) + shift}


def x(dtype=torch.float32, seed=1):
    return torch.randn(2, 5, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "m.onnx"
    module = Chain()
    sizes = ({0: ANY, 1: ANY},)
    return path, module, onnx_fold.export(module, x(), path, fold=BY_SIZE, dynamic_shapes=sizes)


def test_one_call_one_report(exported):
    path, module, result = exported
    assert module.training  # as it was
    assert result.report.saving.weights == 16 * 16 + 16
    assert result.report.verification.ok
    assert [output.ok for output in result.report.module.outputs] == [True, True]
    assert operators(ir.load(path)).count("MatMul") + operators(ir.load(path)).count("Gemm") == 1
    assert "Parity with the PyTorch module in float" in str(result.report)
    assert json.loads(json.dumps(result.report.to_dict()))["module"]["ok"]


def test_other_sizes_are_run_where_dimensions_are_dynamic(exported):
    first, *more = exported[2].report.module.shapes
    assert first == "the given arguments"
    assert any("=2 " in shape and shape.endswith("=16") for shape in more)


def test_verify_takes_the_module(exported):
    path, module, _ = exported
    assert onnx_fold.verify(module, path, args=x(seed=3))
    assert onnx_fold.verify(module, path, kwargs={"x": x()}, shapes=()).shapes == [
        "the given arguments"
    ]
    other = Chain()
    with torch.no_grad():
        other.p.weight[3, 4] += 1e-3
    report = onnx_fold.verify(other, path, args=(x(),))
    assert not report
    assert "over the limit" in report.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    report = onnx_fold.export(Chain(dtype), x(dtype), fold=BY_SIZE).report
    assert report.module.ok
    if dtype != torch.float64:
        assert all(output.error_original > 0 for output in report.module.outputs)


def test_keywords():
    kwargs = {"scale": torch.randn(8), "shift": 2.0}
    result = onnx_fold.export(Chain(), x(), kwargs=kwargs, fold=BY_SIZE)
    assert result.report.module.ok
    assert result.report.folded
    assert onnx_fold.verify(Chain(), result.model, args=(x(),), kwargs=kwargs)


def test_the_older_exporter(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    result = onnx_fold.export(
        module, (x(),), tmp_path / "m.onnx", dynamo=False, opset_version=17, fold=BY_SIZE
    )
    assert result.report.folded
    assert result.report.module.ok


def test_a_language_model_with_a_cache(tmp_path):
    case = families.case("llama", cache=True)
    shapes = tuple(case.inputs.values())
    result = onnx_fold.export(
        case.module,
        case.args,
        tmp_path / "m.onnx",
        fold=BY_SIZE,
        input_names=list(case.inputs),
        output_names=list(case.outputs),
        dynamic_shapes=(*shapes[: case.star], shapes[case.star :]),
    )
    assert len(result.report.folded) == families.SERIAL
    assert [output.name for output in result.report.module.outputs] == list(case.outputs)
    assert any("past=7" in shape for shape in result.report.module.shapes)


class SaysOtherwise(torch.nn.Module):
    """Computes something else when it is exported."""

    def __init__(self):
        super().__init__()
        self.p, self.m = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        y = self.m(self.p(x))
        return y * 1.001 if torch.compiler.is_compiling() else y


def test_an_export_that_is_wrong_is_told_from_a_fold_that_is(tmp_path):
    with pytest.raises(onnx_fold.CheckFailedError, match="exported model, before any fold") as why:
        onnx_fold.export(SaysOtherwise(), x(), tmp_path / "m.onnx", fold=BY_SIZE)
    assert not why.value.report.module
    assert why.value.report.verification.ok
    assert not list(tmp_path.iterdir())


def test_nothing_is_checked_where_that_was_asked(tmp_path):
    fold = {"verify": False, "objective": "size"}
    result = onnx_fold.export(SaysOtherwise(), x(), tmp_path / "m.onnx", fold=fold)
    assert result.report.module is None
    assert (tmp_path / "m.onnx").is_file()


def test_what_makes_no_sense(exported, tmp_path, monkeypatch):
    path, module, _ = exported
    with pytest.raises(UsageError, match=r"onnx_fold\.models\.export\.export"):
        onnx_fold.export("tiny-gqa", (), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="'output' is no option"):
        onnx_fold.export(module, x(), fold={"output": "m.onnx"})
    with pytest.raises(CannotWriteError, match="no folder"):
        onnx_fold.export(module, x(), tmp_path / "none" / "m.onnx")
    with pytest.raises(UsageError, match="needs args"):
        onnx_fold.verify(module, path)
    with pytest.raises(UsageError, match="inputs and greedy are for ONNX"):
        onnx_fold.verify(module, path, args=(x(),), greedy=3)
    with pytest.raises(UsageError, match="hold 2 tensors, but the model has 1 inputs"):
        onnx_fold.verify(module, path, args=(x(), x()))
    with pytest.raises(UsageError, match=r"for a torch\.nn\.Module"):
        onnx_fold.verify(path, path, args=(x(),))
    with pytest.raises(UsageError, match="returns 1 tensors, but the model has 2 outputs"):
        onnx_fold.verify(torch.nn.Linear(16, 8), path, args=(x(),))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match="onnxscript is not installed"):
        onnx_fold.export(module, x())
