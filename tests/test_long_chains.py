"""Long chains of each kind of operator: no recursion, and no exponential time."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_same_function, fold, graph, normal, square
from onnx import helper

D, LENGTH = 4, 300
LAYERS = 8  # a chain of layers, each of which folds
STEPS = {
    "Neg": "v{i} = Neg(v{j})",
    "Identity": "v{i} = Identity(v{j})",
    "Add a bias": "v{i} = Add(v{j}, b)",
    "Sub a bias": "v{i} = Sub(v{j}, b)",
    "Mul by a scalar": "v{i} = Mul(v{j}, s)",
    "Mul by a gain": "v{i} = Mul(v{j}, g)",
    "skip": "v{i} = Sub(v{j}, v0)",
    "Transpose": "v{i} = Transpose<perm=[0, 1]>(v{j})",
    "Reshape": "v{i} = Reshape(v{j}, same)",
    "Unsqueeze and Squeeze": "u{i} = Unsqueeze(v{j}, axis) v{i} = Squeeze(u{i}, axis)",
    "a dead skip": "z{i} = Mul(v{j}, zero) v{i} = Add(v{j}, z{i})",
    "Cast": "c{i} = Cast<to=11>(v{j}) v{i} = Cast<to=1>(c{i})",
    "MatMul": "v{i} = MatMul(v{j}, W)",
    "Relu and MatMul": "r{i} = Relu(v{j}) v{i} = MatMul(r{i}, W)",
}
HELD = {
    "b": np.full(D, 1e-3, np.float32), "s": np.float32(-1.0), "g": np.full(D, -1, np.float32),
    "same": np.array([0, D]), "axis": np.array([0]), "zero": np.float32(0),
    "W": np.linalg.qr(square(D))[0],
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_long_chain_between_two_layers(name):
    length = LAYERS if "MatMul" in name or "gain" in name else LENGTH
    body = " ".join(STEPS[name].format(i=i + 1, j=i) for i in range(length))
    text = f"""(float[n, {D}] x) => (float[n, 5] y)
        {{ v0 = MatMul(x, P) {body} y = MatMul(v{length}, M) }}"""
    held = {name: array for name, array in HELD.items() if f" {name})" in body}
    model = graph(text, P=square(D, 1), M=normal(D, 5), **held)
    assert_same_function(model, fold(model).model, {"n": 3})


@pytest.mark.parametrize("step", ["Add(v{j}, v{j})", "Sub(v{j}, v{j})", "Sum(v{j}, v{j}, v{j})"])
def test_a_value_that_is_used_twice_each_time(step):
    body = " ".join(f"v{i + 1} = {step.format(j=i)}" for i in range(40))
    text = f"""(float[n, {D}] x) => (float[n, 5] y)
        {{ p = MatMul(x, P) v0 = Add(p, b) {body} y = MatMul(v40, M) }}"""
    model = graph(text, P=square(D, 1), M=normal(D, 5), b=normal(D))
    assert_same_function(model, fold(model).model, {"n": 3})


@pytest.mark.parametrize(
    "step", ["Identity({w})", "Transpose<perm=[1, 0]>({w})", "Cast<to=1>({w})"]
)
def test_a_weight_behind_a_long_chain(step):
    body = " ".join(f"w{i + 1} = {step.format(w=f'w{i}')}" for i in range(LENGTH))
    text = f"""(float[n, {D}] x) => (float[n, {D}] y)
        {{ {body} p = MatMul(x, P) y = MatMul(p, w{LENGTH}) }}"""
    model = graph(text, P=square(D, 1), w0=square(D, 2))
    result = fold(model)
    assert result.report.folded
    assert_same_function(model, result.model, {"n": 3})


def test_functions_that_call_functions():
    model = graph(
        f"(float[n, {D}] x) => (float[n, 5] y) {{ p = MatMul(x, P) m = Neg(p) y = MatMul(m, M) }}",
        P=square(D, 1), M=normal(D, 5),
    )  # fmt: skip
    proto = ir.to_proto(model)
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "F20", "local"
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    proto.opset_import.append(imports[1])
    for i in range(1, 21):
        calls = [helper.make_node(f"F{i - 1}", [a], [b], domain="local") for a, b in ("at", "to")]
        proto.functions.append(helper.make_function("local", f"F{i}", ["a"], ["o"], calls, imports))
    relu = [helper.make_node("Relu", ["a"], ["o"])]
    proto.functions.append(helper.make_function("local", "F0", ["a"], ["o"], relu, imports))
    onnx.checker.check_model(proto)
    assert not fold(ir.from_proto(proto)).report.folded
