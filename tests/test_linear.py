"""How linear layers are read: operators, constants, names."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import graph, normal, outputs

from onnx_fold.expression import evaluate
from onnx_fold.linear import Linear, compact, find_linears

X = normal(3, 4, seed=9)


def linear(model: ir.Model) -> Linear:
    (found,) = find_linears(model.graph)
    return found


@pytest.mark.parametrize(
    ("body", "shape", "transposed"),
    [
        ("y = MatMul(x, w)", (4, 5), False),
        ("y = Gemm(x, w)", (4, 5), False),
        ("y = Gemm<alpha = 0.5>(x, w)", (4, 5), False),
        ("y = Gemm<transB = 1>(x, w)", (5, 4), True),
        ("y = Gemm<alpha = -2.0, transB = 1>(x, w)", (5, 4), True),
        ("t = Transpose(x) y = Gemm<transA = 1>(t, w)", (4, 5), False),
        ("i = Identity(w) y = MatMul(x, i)", (4, 5), False),
        ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", (5, 4), False),
        ("t = Transpose(w) i = Identity(t) u = Transpose(i) y = MatMul(x, u)", (4, 5), False),
        ("t = Transpose(w) y = Gemm<transB = 1>(x, t)", (4, 5), True),
    ],
)
def test_matrix_is_what_the_node_multiplies_by(body, shape, transposed):
    model = graph(f"(float[3, 4] x) => (float[3, 5] y) {{ {body} }}", w=normal(*shape))
    found = linear(model)
    assert (found.in_features, found.out_features) == (4, 5)
    assert found.transposed is transposed
    np.testing.assert_allclose(outputs(model, x=X)["y"], X @ evaluate(found.matrix()), rtol=1e-5)
    stored = found.pack(found.matrix())
    assert stored.shape == found.weight.shape
    np.testing.assert_allclose(evaluate(found.unpack(stored)), evaluate(found.matrix()))


def test_left_matmul_contracts_the_axis_before_the_last():
    w = normal(5, 4)
    model = graph("(float[2, 4, 3] x) => (float[2, 5, 3] y) { y = MatMul(w, x) }", w=w)
    found = linear(model)
    assert (found.x_axis, found.y_axis, found.index) == (-2, -2, 0)
    np.testing.assert_array_equal(evaluate(found.matrix()), w.T)


def test_the_weight_may_be_a_constant_node():
    text = "(float[n, 2] x) => (float[n, 2] y) { w = Constant<value = float[2, 2] {1, 2, 3, 4}>() "
    found = linear(graph(text + "y = MatMul(x, w) }"))
    np.testing.assert_array_equal(evaluate(found.matrix()), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    "text",
    [
        "(float[3, 4] x, float[4, 5] w) => (float[3, 5] y) { y = MatMul(x, w) }",  # overridable
        "(float[3, 4] x, float[4, 5] v) => (float[3, 5] y) { y = MatMul(x, v) }",
        "(float[3, 4] x) => (double[3, 5] y) { a = Cast<to = 11>(x) b = Cast<to = 11>(w)"
        " y = MatMul(a, b) }",
        "(float[3, 4] x) => (float[3, 5] y) { y = Gemm<alpha = 0.0>(x, w) }",
        "(float[3, 4] x) => (float[4, 5] y) { y = Identity(w) }",
        "(float[3, 4] x) => (float[3, 5] y) { y = MatMul(x) }",  # not valid
    ],
)
def test_no_linear_layer(text):
    assert not find_linears(graph(text, w=normal(4, 5)).graph)


def test_weights_that_are_no_float_matrix():
    text = "(T[2, 3, 4] x) => (T[2, 3, 5] y) { y = MatMul(x, w) }"
    assert not find_linears(graph(text.replace("T", "float"), w=normal(2, 4, 5)).graph)
    assert not find_linears(graph(text.replace("T", "int32"), w=np.ones((4, 5), np.int32)).graph)


@pytest.mark.parametrize(
    ("name", "scopes", "weight", "label"),
    [
        (
            "node_MatMul_3",
            "['', 'layers.0', 'layers.0.q_proj', 'matmul']",
            "val_3",
            "layers.0.q_proj",
        ),
        ("node_MatMul_3", None, "layers.0.q_proj.weight", "layers.0.q_proj"),
        ("/layers.0/q_proj/MatMul", None, "onnx::MatMul_7", "layers.0.q_proj"),
        ("node_MatMul_3", None, "val_3", "node_MatMul_3"),
        ("", None, "val_3", "MatMul -> y"),
    ],
)
def test_labels(name, scopes, weight, label):
    model = graph("(float[3, 4] x) => (float[3, 5] y) { y = MatMul(x, w) }", w=normal(4, 5))
    model.graph.initializers["w"].name = weight
    (node,) = model.graph
    node.name = name
    if scopes:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert linear(model).label == label


def test_labels_of_one_module_are_written_together():
    assert compact(["a.q", "a.k", "b"]) == "a.{q, k}, b"
    assert compact(["a.q", "b.q", "c.q", "d.q", "e.q"]) == "a.q, b.q, c.q, 2 more"
