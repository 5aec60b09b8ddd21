"""How linear layers are read: operators, constants, names."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import graph, normal, outputs

from onnx_fold.algebra.expression import evaluate
from onnx_fold.graph.linear import Linear, compact, find_linears
from onnx_fold.streams.ends import Reader, Writer

X = normal(3, 4, seed=9)


def linear(model: ir.Model) -> Linear:
    (found,) = find_linears(model.graph)
    return found


FORMS = {
    "MatMul": ("y = MatMul(x, w)", (4, 5)),
    "Gemm": ("y = Gemm(x, w)", (4, 5)),
    "alpha": ("y = Gemm<alpha = 0.5>(x, w)", (4, 5)),
    "transB": ("y = Gemm<transB = 1>(x, w)", (5, 4)),
    "alpha and transB": ("y = Gemm<alpha = -2.0, transB = 1>(x, w)", (5, 4)),
    "transA": ("t = Transpose(x) y = Gemm<transA = 1>(t, w)", (4, 5)),
    "Identity": ("i = Identity(w) y = MatMul(x, i)", (4, 5)),
    "Transpose": ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", (5, 4)),
    "back again": ("t = Transpose(w) i = Identity(t) u = Transpose(i) y = MatMul(x, u)", (4, 5)),
    "twice": ("t = Transpose(w) y = Gemm<transB = 1>(x, t)", (4, 5)),
    "Einsum": ('y = Einsum<equation = "ab,bc->ac">(x, w)', (4, 5)),
    "Einsum, weight first": ('y = Einsum<equation = " cb , ab -> ac">(w, x)', (5, 4)),
    "Einsum, ellipsis": ('y = Einsum<equation = "...b,bc->...c">(x, w)', (4, 5)),
    "FusedMatMul": ("y = com.microsoft.FusedMatMul<alpha = 3.0, transB = 1>(x, w)", (5, 4)),
    "FusedMatMul, transA": (
        "t = Transpose(x) y = com.microsoft.FusedMatMul<transA = 1>(t, w)",
        (4, 5),
    ),
    "FusedMatMul, left": (
        "t = Transpose(x) u = com.microsoft.FusedMatMul<transA = 1>(w, t) y = Transpose(u)",
        (4, 5),
    ),
    "Conv": (
        "t = Transpose(x) u = Unsqueeze(t, a) c = Conv(u, w) s = Squeeze(c, a) y = Transpose(s)",
        (5, 4, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_matrix_is_what_the_node_multiplies_by(form):
    body, shape = FORMS[form]
    axis = {"a": np.array([0])} if "a)" in body else {}
    model = graph(f"(float[3, 4] x) => (float[3, 5] y) {{ {body} }}", w=normal(*shape), **axis)
    found = linear(model)
    assert (found.in_features, found.out_features, found.num_matrices) == (4, 5, 1)
    np.testing.assert_allclose(outputs(model, x=X)["y"], X @ evaluate(found.matrix), rtol=1e-5)
    for end in (Writer(**vars(found)), Reader(**vars(found))):
        stored = end.pack(end.matrix)
        assert stored.shape == found.weight.shape
        np.testing.assert_allclose(evaluate(end.unpack(stored)), evaluate(end.matrix))


def test_left_matmul_contracts_the_axis_before_the_last():
    w = normal(5, 4)
    model = graph("(float[2, 4, 3] x) => (float[2, 5, 3] y) { y = MatMul(w, x) }", w=w)
    found = linear(model)
    assert (found.x_axis, found.y_axis, found.edge[1]) == (-2, -2, 0)
    np.testing.assert_array_equal(evaluate(found.matrix), w.T)


def test_several_matrices_stand_above_each_other_or_side_by_side():
    w = normal(2, 4, 5)
    found = linear(graph("(float[2, 3, 4] x) => (float[2, 3, 5] y) { y = MatMul(x, w) }", w=w))
    assert (found.num_matrices, found.in_features, found.out_features) == (2, 4, 5)
    assert not found.is_plain
    np.testing.assert_array_equal(evaluate(found.matrix), np.vstack(w))
    reader = Reader(**vars(found))
    np.testing.assert_array_equal(evaluate(reader.matrix), np.hstack(w))
    np.testing.assert_array_equal(evaluate(reader.pack(reader.matrix)), w)


def test_heads_are_several_axes():
    model = graph(
        """(float[b, s, 6] x) => (float[b, s, 6] y)
        { q = Einsum<equation = "bsd,dhk->bshk">(x, w)
          y = Einsum<equation = "bshk,hkd->bsd">(q, o) }""",
        w=normal(6, 2, 3), o=normal(2, 3, 6),
    )  # fmt: skip
    into, out = find_linears(model.graph)
    assert (into.x_axis, into.y_axis, into.out_features) == (-1, None, 6)
    assert (out.x_axis, out.y_axis, out.in_features) == (None, -1, 6)
    assert (into.identity_shape, out.identity_shape) == ((0, 0, 2, 3), (0, 0, 6))


def test_a_patch_embedding_holds_a_matrix_for_each_position():
    text = "(float[b, 3, 8, 8] x) => (float[b, 5, 2, 2] y) { y = Conv<strides = [4, 4]>(x, w, c) }"
    found = linear(graph(text, w=normal(5, 3, 4, 4), c=normal(5)))
    assert (found.x_axis, found.y_axis, found.keeps_layout) == (-3, -3, False)
    assert found.num_matrices == 16
    assert found.matrix.shape == (48, 5)


def test_the_weight_may_be_a_constant_node():
    text = "(float[n, 2] x) => (float[n, 2] y) { w = Constant<value = float[2, 2] {1, 2, 3, 4}>() "
    found = linear(graph(text + "y = MatMul(x, w) }"))
    np.testing.assert_array_equal(evaluate(found.matrix), [[1, 2], [3, 4]])


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
        '(float[3, 4] x) => (float[3] y) { y = Einsum<equation = "ab,bc->a">(x, w) }',
        '(float[4, 4] x) => (float[4, 5] y) { y = Einsum<equation = "bb,bc->bc">(x, w) }',
        '(float[3, 4] x) => (float[3, 4, 5] y) { y = Einsum<equation = "ab,bc->abc">(x, w) }',
        '(float[3, 4] x) => (float[5, 3] y) { y = Einsum<equation = "ab,bc">(x, w) }',
    ],
)
def test_no_linear_layer(text):
    assert not find_linears(graph(text, w=normal(4, 5)).graph)


def test_weights_that_are_no_float_matrix():
    text = "(T[2, 3, 4] x) => (T[2, 3, 5] y) { y = MatMul(x, w) }"
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
