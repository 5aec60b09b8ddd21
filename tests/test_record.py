"""Rewrites as they are recorded: what they cost is read off the steps, and the graph is built."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import (
    announced_is_done,
    assert_same_function,
    feeds,
    graph,
    normal,
    operators,
    outputs,
    proto,
)

from onnx_fold.algebra.expression import FoldedTensor, literal
from onnx_fold.graph.edit import Editor
from onnx_fold.rewriting.record import Present
from onnx_fold.rewriting.rewrite import Rewrite, Work

F, D = 6, 4


def layer(reads: str = "y = MatMul(h, O)", **held: np.ndarray) -> ir.Model:
    text = f"(float[n, {F}] h) => (float[n, c] out) {{ {reads} out = Relu(y) }}"
    return graph(text, **({"O": normal(F, D)} | held))


def node(model: ir.Model, output: str) -> ir.Node:
    return next(n for n in model.graph for value in n.outputs if value.name == output)


def tensor(array: np.ndarray) -> FoldedTensor:
    return FoldedTensor(literal(array), ir.DataType.FLOAT)


def apply(rewrite: Rewrite, model: ir.Model) -> None:
    with announced_is_done():
        rewrite.apply(Editor(model.graph))


def interpolated(model: ir.Model, *, gather: bool = False, bias: bool = False) -> Rewrite:
    """``h₂ B + h₁ (+ b)`` in the place of ``h O``, with ``O = [B; I]``."""
    multiply, rewrite = node(model, "y"), Rewrite()
    at = rewrite.before(multiply)
    h = model.graph.inputs[0]
    if gather:
        h = at("Gather", h, at.integers(literal(np.arange(F)), "order"), axis=-1)
    h2, h1 = at.split(h, [F - D, D])
    total = at("Add", at("MatMul", h2, at.constant(tensor(normal(F - D, D)), "rest")), h1)
    if bias:
        total = at("Add", total, at.constant(tensor(normal(D)), "bias"))
    rewrite.replaced[multiply.outputs[0]] = total
    return rewrite


@pytest.mark.parametrize(
    ("options", "work", "weights"),
    [
        ({}, Work(2, copied=F + D), D * D),
        ({"gather": True}, Work(3, copied=F + D, gathered=F), D * D),
        ({"bias": True}, Work(3, copied=F + D), D * D - D),
    ],
)
def test_work_and_weights_follow_from_the_steps(options, work, weights):
    model = layer()
    before = proto(model)
    rewrite = interpolated(model, **options)
    assert rewrite.work() == work
    assert rewrite.nodes_change() == work.nodes
    assert rewrite.weights_removed() == weights
    assert rewrite.weights_removed(min_rank=2) == D * D
    assert proto(model) == before, "planning changed the graph"
    apply(rewrite, model)


@pytest.mark.parametrize("opset", [11, 18])
def test_the_steps_are_built_as_an_editor_builds_them(opset):
    recorded, edited = layer(), layer()
    for model in (recorded, edited):
        model.graph.opset_imports[""] = opset
    apply(interpolated(recorded, bias=True), recorded)
    editor, multiply = Editor(edited.graph), node(edited, "y")
    h2, h1 = editor.split(multiply, edited.graph.inputs[0], [F - D, D])
    rest = editor.constant(tensor(normal(F - D, D)), "rest")
    product = editor.node(multiply, "MatMul", [h2, rest]).outputs[0]
    total = editor.node(multiply, "Add", [product, h1]).outputs[0]
    bias = editor.constant(tensor(normal(D)), "bias")
    total = editor.node(multiply, "Add", [total, bias]).outputs[0]
    node(edited, "out").replace_input_with(0, total)
    editor.remove_dead(multiply.outputs)
    assert proto(recorded) == proto(edited)


def test_slices_and_concats_copy_their_channels_and_shapes_cost_nothing():
    model, rewrite = layer(), Rewrite()
    multiply, h = node(model, "y"), model.graph.inputs[0]
    at = rewrite.before(multiply)
    product = at("MatMul", h, at.constant(tensor(normal(F, 3)), "rest"))
    bounds = [at.integers([number], "bound") for number in (1, 3, -1)]
    part = at("Slice", product, *bounds)
    joined = at("Concat", part, product, axis=-1)
    sizes = at("Concat", at("Shape", h), at.integers([1], "one"), axis=0)
    rewrite.replaced[multiply.outputs[0]] = at("Reshape", joined, sizes)
    assert rewrite.work() == Work(nodes=3, copied=2 + 5)  # without Shape, and Concat of sizes
    assert rewrite.nodes_change() == 5


def test_what_a_split_in_the_graph_copied_is_taken_off():
    model = graph(
        """(float[n, 6] h) => (float[n, 3] out)
        { y = MatMul(h, O) a, b = Split<axis = -1>(y, sizes) out = Add(a, b) }""",
        O=normal(6, 6), sizes=np.array([3, 3]),
    )  # fmt: skip
    split, rewrite = node(model, "a"), Rewrite()
    at = rewrite.before(split)
    for value, piece in zip(split.outputs, at.split(split.inputs[0], [3, 3]), strict=True):
        rewrite.replaced[value] = piece
    assert rewrite.work() == Work(nodes=0, copied=0)
    source = model.clone()
    apply(rewrite, model)
    assert_same_function(source, model)


def test_a_step_reads_what_takes_the_place_of_a_value():
    """``y`` is replaced by ``h`` and ``z`` by what is made of ``y``: of ``h``, that is."""
    model = layer("x = MatMul(h, I) z = Neg(x) y = Relu(z)", I=np.eye(F, dtype=np.float32))
    source, rewrite = model.clone(), Rewrite()
    x, z = node(model, "x"), node(model, "z")
    twice = rewrite.before(z)("Neg", x.outputs[0])
    rewrite.replaced[z.outputs[0]] = twice
    rewrite.replaced[x.outputs[0]] = model.graph.inputs[0]
    assert rewrite.nodes_change() == -1
    assert rewrite.weights_removed() == F * F
    apply(rewrite, model)
    assert operators(model) == ["Neg", "Relu", "Relu"]
    assert node(model, "y").inputs[0].producer().inputs[0] is model.graph.inputs[0]
    assert_same_function(source, model)


@pytest.mark.parametrize("is_output", [False, True])
def test_what_takes_the_place_of_a_value_may_read_it(is_output):
    text = "y = MatMul(h, O)" + ("" if is_output else " out = Relu(y)")
    model = graph(
        f"(float[n, {F}] h) => (float[n, {D}] {'y' if is_output else 'out'}) {{ {text} }}",
        O=normal(F, D),
    )
    source, rewrite = model.clone(), Rewrite()
    multiply = node(model, "y")
    last = model.graph.node(1) if not is_output else multiply
    if is_output:  # something has to stand behind, to build in front of it
        last = ir.node("Identity", [multiply.outputs[0]], name="last")
        model.graph.append(last)
    at = rewrite.before(last)
    rewrite.replaced[multiply.outputs[0]] = at("Neg", multiply.outputs[0])
    assert rewrite.weights_removed() == 0
    apply(rewrite, model)
    inputs = feeds(source)
    (expected,) = outputs(source, **inputs).values()
    (actual,) = outputs(model, **inputs).values()
    product = inputs["h"] @ source.graph.initializers["O"].const_value.numpy()
    np.testing.assert_allclose(expected, product if is_output else product.clip(0), atol=1e-5)
    np.testing.assert_allclose(actual, -product if is_output else (-product).clip(0), atol=1e-5)


@pytest.mark.parametrize("is_new", [False, True])
def test_a_step_reads_the_weight_that_an_input_holds_by_then(is_new):
    """The bias of a Gemm whose product goes stays, or is a new one."""
    model = layer("y = Gemm(h, O, b)", O=normal(F, F), b=normal(F, seed=1))
    gemm, rewrite = node(model, "y"), Rewrite()
    if is_new:
        rewrite.stored[gemm, 2] = tensor(normal(F, seed=2))
    at = rewrite.before(gemm)
    total = at("Add", model.graph.inputs[0], Present((gemm, 2)), like=gemm.outputs[0])
    rewrite.replaced[gemm.outputs[0]] = total
    assert rewrite.weights_removed() == F * F
    assert rewrite.shared() == []
    assert rewrite.work() == Work(nodes=0)
    apply(rewrite, model)
    (bias,) = model.graph.initializers.values()
    np.testing.assert_array_equal(bias.const_value.numpy(), normal(F, seed=2 if is_new else 1))


def test_steps_that_nothing_needs_are_neither_counted_nor_built():
    model = layer()
    rewrite = interpolated(model)
    at = rewrite.before(node(model, "y"))
    at("MatMul", model.graph.inputs[0], at.constant(tensor(normal(F, F)), "unused"))
    assert rewrite.work() == Work(2, copied=F + D)
    apply(rewrite, model)
    assert "unused" not in model.graph.initializers


def test_a_weight_that_something_else_reads_stays():
    model = layer("z = MatMul(h, O) w = Neg(z) v = MatMul(h, O) y = Add(v, w)")
    multiply, rewrite = node(model, "v"), Rewrite()
    rewrite.replaced[multiply.outputs[0]] = node(model, "z").outputs[0]
    assert rewrite.weights_removed() == 0
    assert rewrite.nodes_change() == -1
    assert rewrite.shared() == ["O"]
    assert {"v", multiply.name} - {None, ""} <= rewrite.names()
    assert "O" not in rewrite.names()
    apply(rewrite, model)


def test_sizes_that_only_what_goes_has_read_go_too():
    model = graph(
        """(float[n, 6] h) => (float[n, 6] out)
        { s = Shape(h) t = Gather(s, one) u = Unsqueeze(t, zero) y = Reshape(h, r)
          z = Slice(y, zero, u, one1) out = Relu(z) }""",
        one=np.array(1), zero=np.array([0]), one1=np.array([1]), r=np.array([0, 6]),
    )  # fmt: skip
    rewrite = Rewrite()
    cut = node(model, "z")
    rewrite.replaced[cut.outputs[0]] = model.graph.inputs[0]
    assert rewrite.nodes_change() == -5
    assert rewrite.work().nodes == -2  # Slice and Reshape; the others compute a size
    apply(rewrite, model)
    assert operators(model) == ["Relu"]


def test_each_node_that_goes_is_looked_at_once():
    """Thirty times ``s = s + s``: along every path that would be for ever."""
    sums = " ".join(f"s{i + 1} = Add(s{i}, s{i})" for i in range(30))
    model = layer(f"s0 = MatMul(h, O) {sums} y = Neg(s30)")
    negate, rewrite = node(model, "y"), Rewrite()
    at = rewrite.before(negate)
    product = at("MatMul", model.graph.inputs[0], at.constant(tensor(normal(F, D, seed=1)), "P"))
    rewrite.replaced[negate.outputs[0]] = product
    assert rewrite.nodes_change() == 1 - 32
    assert rewrite.weights_removed() == 0
    apply(rewrite, model)
    assert operators(model) == ["MatMul", "Relu"]


def test_a_weight_that_is_picked_goes_with_what_picks_it():
    """A Gather of a weight makes no constant, so it takes a look behind the layer to count it."""
    held = {"E": normal(1, F, D), "which": np.array(0)}
    model = layer("p = Gather(E, which) v = MatMul(h, p) y = Neg(v)", **held)
    rewrite = Rewrite()
    rewrite.replaced[node(model, "v").outputs[0]] = model.graph.inputs[0]
    assert rewrite.weights_removed() == F * D
    assert rewrite.nodes_change() == -2
    apply(rewrite, model)
    assert operators(model) == ["Neg", "Relu"]
