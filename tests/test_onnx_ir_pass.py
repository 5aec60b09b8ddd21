"""``OnnxFold`` among the passes of onnx_ir."""

import onnx_ir as ir
import pytest
from helpers import assert_same_function, chain, graph, normal, operators, proto
from onnx_ir.passes import PassError, Sequential
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from onnx_fold import OnnxFold
from onnx_fold.errors import NotFiniteError, UsageError
from onnx_fold.integrations import onnx_ir as integration
from onnx_fold.passes import MergePass


@pytest.fixture
def model():
    return chain("m = Identity(p)", width=4, bias=True)


def test_among_others(model):
    original, step = model.clone(), OnnxFold(objective="size")
    result = Sequential(CommonSubexpressionEliminationPass(), step, RemoveUnusedNodesPass())(model)
    assert result.model is model
    assert result.modified
    assert operators(model).count("MatMul") == 1
    assert_same_function(original, model)
    assert step.report.proof.proved
    assert step.report.verification.ok


def test_what_folds_nothing_stays_itself():
    model = chain("m = Relu(p)")
    nodes, before = list(model.graph), proto(model)
    result = OnnxFold()(model)
    assert not result.modified
    assert list(model.graph) == nodes
    assert proto(model) == before


def test_a_second_time_nothing_is_left(model):
    assert OnnxFold(objective="size")(model).modified
    assert not OnnxFold(objective="size")(model).modified


class WrongPass(MergePass):
    """Raises in the middle of the work."""

    name = "wrong"

    def candidates(self, stream):
        raise ZeroDivisionError


@pytest.mark.parametrize("options", [{"passes": [WrongPass]}, {"protect": "nobody"}])
def test_a_pass_that_raises_leaves_the_model(model, options):
    nodes, before = list(model.graph), proto(model)
    with pytest.raises(PassError):
        Sequential(OnnxFold(**options))(model)
    assert list(model.graph) == nodes
    assert proto(model) == before


def test_weights_that_cannot_be_stored_leave_the_model(model, monkeypatch):
    def evaluate(*_):
        raise NotFiniteError("too large")

    monkeypatch.setattr(integration, "evaluate", evaluate)
    nodes, before = list(model.graph), proto(model)
    with pytest.raises(NotFiniteError):
        OnnxFold(objective="size", verify=False)(model)
    assert list(model.graph) == nodes
    assert proto(model) == before


def test_functions_that_were_inlined_go():
    text = """
        <ir_version: 10, opset_import: ["": 20, "own": 1]>
        g (float[n, 4] x) => (float[n, 5] y) {
            p = own.Layer(x, P)
            y = MatMul(p, M)
        }
        <domain: "own", opset_import: ["": 20]> Layer (a, b) => (c) { c = MatMul(a, b) }
    """
    held = [ir.tensor(normal(4, 4), name="P"), ir.tensor(normal(4, 5), name="M")]
    model = ir.from_onnx_text(text, initializers=held)
    original = model.clone()
    assert OnnxFold(objective="size")(model).modified
    assert operators(model) == ["MatMul"]
    assert_same_function(original, model)


def test_metadata_stays(model):
    model.metadata_props["who"] = "me"
    model.producer_name = "someone"
    OnnxFold(objective="size")(model)
    assert model.metadata_props["who"] == "me"
    assert model.producer_name == "someone"


def test_weights_in_files_stay_there(tmp_path):
    source = graph(
        "(float[n, 8] x) => (float[n, 8] y) { p = MatMul(x, P) q = MatMul(p, M) r = Relu(q)"
        " y = MatMul(r, O) }",
        P=normal(8, 8, seed=1),
        M=normal(8, 8, seed=2),
        O=normal(8, 8, seed=3),
    )
    ir.save(source, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    assert OnnxFold(objective="size")(model).modified
    assert isinstance(model.graph.initializers["O"].const_value, ir.ExternalTensor)
    written = ir.external_data.load_to_model(model.clone())
    assert_same_function(source, written)


def test_options_are_checked_at_once():
    assert {"pivot", "protect", "verify"} <= integration.OPTIONS
    with pytest.raises(UsageError, match="unknown option 'output' of OnnxFold"):
        OnnxFold(output="m.onnx")
    with pytest.raises(UsageError, match="unknown option 'pivots'"):
        OnnxFold(pivots="q")
