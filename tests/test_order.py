"""Files whose nodes stand in any order, as ONNX Runtime takes them."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_same_function, fold, graph, normal, outputs, proto

import onnx_fold
from onnx_fold.errors import InvalidModelError
from onnx_fold.files.load import load

D = 4
FOLDS = "p = MatMul(x, P) h = Identity(p) y = MatMul(h, M)"
STAYS = "p = MatMul(x, P) h = Relu(p) y = MatMul(h, M)"


def chain(body: str) -> onnx.ModelProto:
    text = f"(float[n, {D}] x) => (float[n, {D}] y) {{ {body} }}"
    return ir.to_proto(graph(text, P=normal(D, D), M=normal(D, D, seed=1)))


def turned(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the nodes of all its graphs, bodies and functions from last to first."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        turn(nodes)
    return model


def turn(nodes) -> None:
    order = list(nodes)[::-1]
    del nodes[:]
    nodes.extend(order)
    for attribute in (each for node in nodes for each in node.attribute):
        for body in (attribute.g, *attribute.graphs):
            turn(body.node)


WITH_BODY = (
    "(float[n, 4] x, bool c) => (float[n, 4] y) {"
    " p = MatMul(x, P) h = Identity(p) q = MatMul(h, M) late = Neg(q)"
    " y = If(c) <then_branch = a () => (float[n, 4] t) { s = Relu(late) t = Neg(s) },"
    " else_branch = b () => (float[n, 4] e) { s2 = Abs(q) e = Add(s2, late) }> }"
)
WITH_FUNCTION = (
    '<ir_version: 10, opset_import: ["": 18, "local": 1]>'
    " g (float[n, 4] x) => (float[n, 4] y)"
    " { p = MatMul(x, P) h = local.f(p) y = MatMul(h, M) }"
    ' <domain: "local", opset_import: ["": 18]> f (a) => (c) { b = Neg(a) c = Identity(b) }'
)


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    for name, array in {"P": normal(D, D), "M": normal(D, D, seed=1)}.items():
        model.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return model


def models() -> dict[str, onnx.ModelProto]:
    body = ir.to_proto(graph(WITH_BODY, P=normal(D, D), M=normal(D, D, seed=1)))
    function = with_weights(onnx.parser.parse_model(WITH_FUNCTION))
    return {"graph": chain(FOLDS), "body": body, "function": function}


@pytest.mark.parametrize("name", models())
def test_any_order_folds_like_the_right_one(name):
    model = models()[name]
    wrong = ir.from_proto(turned(model))
    before = proto(wrong)
    with pytest.raises(onnx.checker.ValidationError, match="sorted"):
        onnx.checker.check_model(ir.to_proto(wrong))
    result = onnx_fold.fold(wrong)
    assert proto(wrong) == before, "the source was changed"
    assert result.report.folded
    assert result.report.verification.ok
    assert result.report.saving == fold(ir.from_proto(model)).report.saving
    assert_same_function(ir.from_proto(model), result.model)
    assert onnx_fold.verify(wrong, result.model).ok


@pytest.mark.parametrize("external", [False, True])
def test_where_nothing_folds_the_order_stays(tmp_path, external):
    model = turned(chain(STAYS))
    source, target = tmp_path / "m.onnx", tmp_path / "f.onnx"
    onnx.save(model, source, save_as_external_data=external, size_threshold=0)
    in_memory = ir.from_proto(model)
    assert proto(fold(in_memory).model) == proto(in_memory)
    onnx_fold.fold(source, output=target)
    assert onnx.load(target).graph.node == onnx.load(source).graph.node
    if not external:
        assert target.read_bytes() == source.read_bytes()


def test_a_model_in_order_is_not_copied():
    model = ir.from_proto(chain(FOLDS))
    assert load(model) is model


def test_independent_nodes_keep_their_order():
    body = "b = Neg(a) c = Abs(x) a = Exp(x) d = Sqrt(x) y = Sum(b, c, d)"
    model = load(chain(body))
    assert [node.op_type for node in model.graph] == ["Exp", "Neg", "Abs", "Sqrt", "Sum"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("p = Add(x, q) q = Neg(p) y = Add(q, x)", "its nodes form a cycle"),
        ("y = Add(q, x) q = Neg(nothing)", "a node Neg reads 'nothing', which nothing writes"),
        ("y = Add(x, nothing)", "a node Add reads 'nothing', which nothing writes"),
    ],
)
def test_what_no_order_helps(tmp_path, body, reason):
    path = tmp_path / "m.onnx"
    onnx.save(chain(body), path)
    with pytest.raises(InvalidModelError) as error:
        onnx_fold.inspect(path)
    assert str(error.value) == f"{path} is not a valid ONNX model: {reason}"


def test_inspect_and_calibration_take_any_order():
    model = turned(chain(FOLDS))
    rows = {"x": np.ones((3, D), np.float32)}
    assert onnx_fold.inspect(model).plan.folded
    assert onnx_fold.fold(model, calibrate=rows).report.folded
    assert outputs(ir.from_proto(model), **rows)["y"].shape == (3, D)
