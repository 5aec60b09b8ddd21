"""Files that ONNX Runtime runs, however odd: each folds, and what is written runs as well."""

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from helpers import graph, normal
from onnx import helper

import onnx_fold

FLOAT = onnx.TensorProto.FLOAT


def model() -> onnx.ModelProto:
    text = (
        "(float[n, 4] x) => (float[n, 4] y) { p = MatMul(x, P) h = Identity(p) y = MatMul(h, M) }"
    )
    return ir.to_proto(graph(text, P=normal(4, 4), M=normal(4, 4, seed=1)))


def opset_twice(m):
    m.opset_import.add(domain="", version=18)


def opset_by_its_long_name(m):
    m.opset_import[0].domain = "ai.onnx"


def nodes_of_the_long_name(m):
    for node in m.graph.node:
        node.domain = "ai.onnx"


def opset_that_nothing_uses(m):
    m.opset_import.add(domain="com.foo", version=3)


def ir_version_3(m):
    m.ir_version = 3


def weight_that_is_an_input(m):
    m.graph.input.append(helper.make_tensor_value_info("M", FLOAT, [4, 4]))


def weight_that_nothing_uses(m):
    m.graph.initializer.append(helper.make_tensor("U", FLOAT, [2], [1, 2]))


def weight_without_a_name(m):
    m.graph.initializer.append(helper.make_tensor("", FLOAT, [2], [1, 2]))


def weight_twice(m):
    m.graph.initializer.append(m.graph.initializer[0])


def types_of_other_elements(m):
    for kind in (onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.COMPLEX64):
        m.graph.initializer.append(helper.make_tensor(f"U{kind}", kind, [4], [1, 2, 3, 4]))


def no_names(m):
    m.graph.name = ""
    for node in m.graph.node:
        node.name = ""


def no_type_of_the_output(m):
    m.graph.output[0].ClearField("type")


def size_below_zero(m):
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def size_that_is_no_formula(m):
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "2*(n-1) + floor(n/"


def wrong_value_info(m):
    m.graph.value_info.append(helper.make_tensor_value_info("p", FLOAT, [7, 9]))
    m.graph.value_info.append(helper.make_tensor_value_info("nothing", FLOAT, [7, 9]))
    m.graph.value_info.add(name="h")


def output_twice(m):
    m.graph.output.append(m.graph.output[0])


def outputs_that_nothing_computes(m):
    m.graph.output.append(m.graph.input[0])
    m.graph.output.append(helper.make_tensor_value_info("P", FLOAT, [4, 4]))


def no_inputs(m):
    del m.graph.input[:]
    m.graph.initializer.append(helper.make_tensor("x", FLOAT, [2, 4], list(range(8))))


def no_nodes(m):
    del m.graph.node[:]
    m.graph.output[0].CopyFrom(m.graph.input[0])


def function_of_another_opset(m):
    negate = helper.make_node("Neg", ["a"], ["b"])
    opsets = [helper.make_opsetid("", 17)]
    m.functions.append(helper.make_function("foo", "bar", ["a"], ["b"], [negate], opsets))
    m.graph.node[1].op_type, m.graph.node[1].domain = "bar", "foo"
    m.opset_import.add(domain="foo", version=1)


FOLDS = [
    *(opset_twice, opset_by_its_long_name, nodes_of_the_long_name, opset_that_nothing_uses),
    *(ir_version_3, weight_that_nothing_uses, weight_without_a_name, weight_twice),
    *(types_of_other_elements, no_names, no_type_of_the_output, size_below_zero),
    *(size_that_is_no_formula, wrong_value_info, output_twice),
]
OTHERS = [
    *(weight_that_is_an_input, outputs_that_nothing_computes, no_inputs, no_nodes),
    function_of_another_opset,
]


def runs(path) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return bool(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


@pytest.mark.parametrize("change", FOLDS + OTHERS, ids=lambda change: change.__name__)
def test_what_onnx_runtime_takes(tmp_path, change):
    source, target = tmp_path / "m.onnx", tmp_path / "f.onnx"
    made = model()
    change(made)
    source.write_bytes(made.SerializeToString())
    assert runs(source)
    result = onnx_fold.fold(source, output=target)
    assert runs(target)
    assert onnx_fold.verify(source, target).ok
    assert onnx_fold.inspect(source).to_dict()
    if change in FOLDS:
        assert result.report.folded
        assert result.report.verification.ok
