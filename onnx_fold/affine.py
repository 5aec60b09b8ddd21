"""Affine operators between linear layers: gains, centring, skips that are multiplied by zero.

``x · g`` is ``x diag(g)`` and ``x - mean(x)`` is ``x (I - 11ᵀ/d)``: linear layers that store ``d``
numbers or none. Where such an operator stands between projections in what would otherwise be a
closed stream (LayerScale, a norm with a fixed standard deviation), it is written as a MatMul for
the time of the fold, and merges like any other layer. What has not merged is written back.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from onnx_fold.commute import Port, ports
from onnx_fold.constants import FLOATS, Constant, axes_of, constant
from onnx_fold.expression import Diagonal, Held, ImpliedTensor, Sum, evaluate, reshape
from onnx_fold.linear import Edge
from onnx_fold.rewrite import new_constant, remove_dead
from onnx_fold.shapes import Shapes
from onnx_fold.stream import Search, Stream


def make_explicit(model: ir.Model, shapes: Shapes) -> ExitStack:
    """Write gains and centring in closed streams of ``model`` as MatMuls, and leave dead skips out.

    A stream counts as closed if it is when these operators are followed too, and if layers both
    write and read it. ``shapes`` are those of ``model``.

    Returns:
        What writes back, when it is closed, those that have not merged.
    """
    explicit = ExitStack()
    candidates = [node for node in model.graph if _is_affine(node)]
    if not candidates:
        return explicit
    search = Search(model.graph, shapes)
    done: set[ir.Node] = set()
    for node in candidates:
        value = node.outputs[0]
        width = search.shapes.dim(value, -1)
        if node in done or node.graph is None or not isinstance(width, int):
            continue
        stream = search.stream(value, -1, width, affine_ports)
        found = [other for other in candidates if other.outputs[0] in stream.values]
        done.update(found)
        if stream.is_closed and stream.written_by and stream.readers:
            for other in found:
                _make_explicit(other, stream, explicit)
    return explicit


def affine_ports(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """The ports of ``node`` that share the channels of ``known``, affine operators included."""
    through = [Port(False, 0, known.axis), Port(True, 0, known.axis)]
    if known.axis == -1 and width > 1:
        if is_centring(node):
            return through if known.is_output or known.index == 0 else None
        if node.op_type == "ReduceMean" and all(is_centring(n) for n, _ in node.outputs[0].uses()):
            return [known]
        if (gain := _gain(node)) is not None and gain[1].size == width:
            return [Port(False, 1 - gain[0], -1), Port(True, 0, -1)]
        if (dead := _dead_operand(node)) is not None:
            if known == Port(False, dead, known.axis):
                return [known]
            alive = node.inputs[1 - dead]
            assert alive is not None
            if shapes(alive) is not None and shapes(alive) == shapes(node.outputs[0]):
                return [Port(False, 1 - dead, -1), Port(True, 0, -1)]
    return ports(node, known, width, shapes)


def _is_affine(node: ir.Node) -> bool:
    return is_centring(node) or _gain(node) is not None or _dead_operand(node) is not None


def is_centring(node: ir.Node) -> bool:
    """Whether ``node`` takes the mean of the channels, the last axis, off its input."""
    if node.op_type != "Sub" or len(node.inputs) != 2 or node.inputs[1] is None:
        return False
    mean = node.inputs[1].producer()
    if mean is None or mean.op_type != "ReduceMean" or mean.inputs[0] is not node.inputs[0]:
        return False
    return tuple(axes_of(mean) or ()) == (-1,) and mean.attributes.get_int("keepdims", 1) == 1


def _gain(node: ir.Node) -> tuple[int, Constant] | None:
    """The input of a Mul or Div that has a factor for each channel, and what it holds."""
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        held = constant(node.inputs[index])
        if held is not None and held.dtype in FLOATS and held.is_vector:
            is_gain = held.size > 1 and constant(node.inputs[1 - index]) is None
            return (index, held) if is_gain else None
    return None


def _dead_operand(node: ir.Node) -> int | None:
    """The operand of an Add that is something times zero."""
    if node.op_type != "Add" or len(node.inputs) != 2:
        return None
    for index, value in enumerate(node.inputs):
        factor = value.producer() if value is not None else None
        if factor is not None and factor.op_type == "Mul":
            held = next((c for c in map(constant, factor.inputs) if c is not None), None)
            if held is not None and held.dtype in FLOATS and not held.numpy().any():
                return index
    return None


def _make_explicit(node: ir.Node, stream: Stream, explicit: ExitStack) -> None:
    if (dead := _dead_operand(node)) is not None:
        _leave_out(node, dead, stream, explicit)
        return
    dtype = stream.dtype
    if (gain := _gain(node)) is not None:
        index, held = gain
        vector = reshape(held.wide(), (held.size,))
        if node.op_type == "Div":
            with np.errstate(divide="ignore"):
                vector = Held(1.0 / evaluate(vector))
        tensor = ImpliedTensor(Diagonal(vector), held.dtype, held.size)
        _as_matmul(node, 1 - index, tensor, explicit)
        return
    width = stream.width
    centre = Sum((Diagonal(Held(np.ones(width))), Held(np.full((1, 1), -1.0 / width))))
    _as_matmul(node, 0, ImpliedTensor(centre, dtype, 0), explicit)


def _as_matmul(node: ir.Node, index: int, tensor: ImpliedTensor, explicit: ExitStack) -> None:
    """Let ``node`` multiply its input ``index`` by ``tensor``, and note how to write it back."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    operator, inputs = node.op_type, tuple(node.inputs)
    matrix = new_constant(graph, tensor, f"{node.outputs[0].name}_matrix")
    node.op_type = "MatMul"
    node.replace_input_with(0, inputs[index])
    node.replace_input_with(1, matrix)

    def write_back() -> None:
        other = inputs[1 - index]
        if node.graph is None or node.inputs[1] is not matrix:  # it has merged
            remove_dead(graph, [other])
            return
        node.op_type = operator
        node.replace_input_with(index, node.inputs[0])
        node.replace_input_with(1 - index, other)
        remove_dead(graph, [matrix])

    explicit.callback(write_back)


def _leave_out(node: ir.Node, dead: int, stream: Stream, explicit: ExitStack) -> None:
    """Let ``node`` pass on what is not dead, and note how to write it back."""
    graph, inputs = node.graph, tuple(node.inputs)
    assert isinstance(graph, ir.Graph)
    before = {member.edge: member.weight.leaf for member in stream.members}
    node.op_type = "Identity"
    node.replace_input_with(0, inputs[1 - dead])
    node.resize_inputs(1)

    def write_back() -> None:
        current = node.inputs[0]
        if all(_holds(edge, leaf) for edge, leaf in before.items()):
            node.op_type = "Add"
            node.resize_inputs(2)
            node.replace_input_with(1 - dead, current)
            node.replace_input_with(dead, inputs[dead])
            return
        assert current is not None
        replace_all_uses_with(node.outputs[0], current)
        remove_dead(graph, [node.outputs[0], inputs[dead]])

    explicit.callback(write_back)


def _holds(edge: Edge, leaf: ir.Value) -> bool:
    """Whether an input still has the weight that it had."""
    node, index = edge
    held = constant(node.inputs[index]) if node.graph is not None else None
    return held is not None and held.leaf is leaf
