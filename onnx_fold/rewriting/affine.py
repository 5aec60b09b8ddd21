"""Affine operators between linear layers: gains, centring, skips that are multiplied by zero.

``x · g`` is ``x diag(g)`` and ``x - mean(x)`` is ``x (I - 11ᵀ/d)``: linear layers that store ``d``
numbers or none. Where such an operator stands between projections in what would otherwise be a
closed stream (LayerScale, a norm with a fixed standard deviation), it is written as a MatMul for
the time of the fold, and merges like any other layer. What has not merged is written back.

So is a gain between two closed streams, as those along a residual chain (NoNorm, Z. Sun et al.,
"MobileBERT", arXiv 2004.02984): a diagonal change of basis of one of them takes it away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from onnx_fold.algebra.expression import (
    Diagonal,
    FoldedTensor,
    ImpliedTensor,
    Sum,
    evaluate,
    implied_gain,
    literal,
    reshape,
)
from onnx_fold.graph.channels import ports
from onnx_fold.graph.commute import Port
from onnx_fold.graph.constants import FLOATS, Constant, constant
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import Edge
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.norms import is_centring
from onnx_fold.streams.stream import Search, Stream


@dataclass(frozen=True)
class Affine:
    """What an operator does to the channels, the last axis, of one of its inputs.

    Attributes:
        index: The input that it multiplies, or passes on. The output has the shape of this input.
        gain: The factors of the channels, if it is a gain.
        is_skip: Whether it adds something that is zero; else it is centring if there is no gain.
    """

    index: int
    gain: Constant | None = None
    is_skip: bool = False

    @property
    def is_centring(self) -> bool:
        """Whether it takes the mean of the channels off them."""
        return self.gain is None and not self.is_skip


def make_explicit(
    model: ir.Model,
    shapes: Shapes,
    editor: Editor,
    protect: Collection[str] = (),
    norms: Collection[ir.Node] = (),
) -> ExitStack:
    """Write gains and centring in closed streams of ``model`` as MatMuls, and leave dead skips out.

    A stream counts as closed if it is when these operators are followed too, and if layers both
    write and read it; or if it is but for gains, with a closed stream on the other side of each.
    Those of ``norms`` need one behind them only: what they read may be anything.
    ``shapes`` are those of ``model``, whose graph ``editor`` changes. Everything is decided before
    anything is changed. What has to do with a name in ``protect`` stays as it is.

    Returns:
        What writes back, when it is closed, those that have not merged.
    """
    found = {
        node: affine
        for node in model.graph
        if (affine := as_affine(node, shapes)) is not None
        if not {node.name, *(value.name for value in node.inputs if value)}.intersection(protect)
    }
    if not found:
        return ExitStack()
    search = Search(model.graph, shapes)
    rule = partial(affine_ports, found)
    done: set[ir.Node] = set()
    plan: list[tuple[ir.Node, Stream]] = []
    for node in found:
        value = node.outputs[0]
        width = search.shapes.dim(value, -1)
        if node in done or not isinstance(width, int):
            continue
        stream = search.stream(value, -1, width, rule)
        inside = [other for other in found if other.outputs[0] in stream.values]
        done.update(inside)
        if stream.is_closed and stream.written_by and stream.readers:
            plan += [(other, stream) for other in inside]
        else:
            plan += _between_closed(inside, found, search, norms)
    with ExitStack() as explicit:
        skips = [(node, stream, _weights(node, found, stream)) for node, stream in plan]
        for node, stream, weights in skips:
            if found[node].is_skip:
                _leave_out(node, found[node].index, weights, explicit, editor)
            else:
                _as_matmul(node, found[node], stream, explicit, editor)
        return explicit.pop_all()


def _between_closed(
    nodes: Sequence[ir.Node],
    found: Mapping[ir.Node, Affine],
    search: Search,
    norms: Collection[ir.Node],
) -> Iterator[tuple[ir.Node, Stream]]:
    """The gains of ``nodes`` with a closed stream on either side, and the one behind each.

    A stream counts as closed here if it is but for gains.
    """
    known: dict[ir.Value, Stream] = {}
    gains = {node for node in nodes if found[node].gain is not None}

    def beside(value: ir.Value, width: int) -> Stream:
        if value not in known:
            stream = search.stream(value, -1, width, partial(_up_to, gains))
            known.update(dict.fromkeys(stream.values, stream))
        return known[value]

    for node in nodes:
        x, y = node.inputs[found[node].index], node.outputs[0]
        width = search.shapes.dim(y, -1)
        if node in gains and x is not None and isinstance(width, int):
            front, behind = beside(x, width), beside(y, width)
            is_between = front is not behind and (front.is_closed or node in norms)
            if is_between and behind.is_closed:
                yield node, behind


def _up_to(
    gains: Collection[ir.Node], node: ir.Node, known: Port, width: int, shapes: Shapes
) -> list[Port] | None:
    """The ports of ``node`` that share the channels of ``known``; a stream ends at ``gains``."""
    return [known] if node in gains else ports(node, known, width, shapes)


def affine_ports(
    found: Mapping[ir.Node, Affine], node: ir.Node, known: Port, width: int, shapes: Shapes
) -> list[Port] | None:
    """The ports of ``node`` that share the channels of ``known``, affine operators included."""
    if known.axis == -1 and width > 1:
        affine = found.get(node)
        if affine is None and _is_mean_of(node, found):
            return [known]
        if affine is not None and shapes.dim(node.outputs[0], -1) == width:
            if known.is_output or known.index == affine.index:
                return [Port(False, affine.index, -1), Port(True, 0, -1)]
            return [known] if affine.is_skip else None
    return ports(node, known, width, shapes)


def _is_mean_of(node: ir.Node, found: Mapping[ir.Node, Affine]) -> bool:
    """Whether ``node`` only makes the mean that centring takes off."""
    if operator(node) != "ReduceMean" or node.outputs[0].is_graph_output():
        return False
    return all(user in found and found[user].is_centring for user, _ in node.outputs[0].uses())


def as_affine(node: ir.Node, shapes: Shapes) -> Affine | None:
    """Read ``node`` as an affine operator, if it is one and keeps the shape of what it reads."""
    if is_centring(node, shapes):
        return Affine(0)
    found = _gain(node) or _dead_skip(node)
    if found is None:
        return None
    kept, other = node.inputs[found.index], node.inputs[1 - found.index]
    assert kept is not None
    assert other is not None
    return found if shapes.broadcasts_to(other, kept) else None


def _gain(node: ir.Node) -> Affine | None:
    """A Mul or Div that has a factor for each channel."""
    if operator(node) not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for index in (1, 0) if operator(node) == "Mul" else (1,):
        held = constant(node.inputs[index])
        if held is not None and held.dtype in FLOATS and held.is_vector:
            is_gain = held.size > 1 and constant(node.inputs[1 - index]) is None
            return Affine(1 - index, held) if is_gain else None
    return None


def _dead_skip(node: ir.Node) -> Affine | None:
    """An Add of something times zero."""
    if operator(node) != "Add" or len(node.inputs) != 2:
        return None
    for index, value in enumerate(node.inputs):
        factor = value.producer() if value is not None else None
        if factor is not None and operator(factor) == "Mul":
            held = next((c for c in map(constant, factor.inputs) if c is not None), None)
            if held is not None and held.dtype in FLOATS and not held.numpy().any():
                return Affine(1 - index, is_skip=True)
    return None


def _as_matmul(
    node: ir.Node, affine: Affine, stream: Stream, explicit: ExitStack, editor: Editor
) -> None:
    """Let ``node`` multiply its input by a matrix, and note how to write it back."""
    index, op_type, inputs = affine.index, node.op_type, tuple(node.inputs)
    tensor, other = _matrix(node, affine, stream), inputs[1 - index]
    matrix = editor.constant(tensor, f"{node.outputs[0].name}_matrix")
    held = other
    if affine.gain is not None:  # a fold of what reads it too must leave it for the way back
        held = editor.node(node, "Identity", [other]).outputs[0]
    node.op_type = "MatMul"
    node.replace_input_with(0, inputs[index])
    node.replace_input_with(1, matrix)

    def write_back() -> None:
        now = constant(node.inputs[1]) if node.graph is not None else None
        gain = None if now is None else implied_gain(now.tensor)
        if now is None or (now.leaf is not matrix and gain is None):  # it has merged
            editor.remove_dead([held])
            return
        if now.leaf is not matrix and gain is not None:  # it has become another one
            changed = FoldedTensor(gain, now.dtype)
            node.op_type = "Mul"
            node.replace_input_with(1, editor.constant(changed, f"{node.outputs[0].name}_gain"))
            editor.remove_dead([now.leaf, held])
            return
        node.op_type = op_type
        node.replace_input_with(index, node.inputs[0])
        node.replace_input_with(1 - index, other)
        editor.remove_dead([matrix, held])

    explicit.callback(write_back)


def _matrix(node: ir.Node, affine: Affine, stream: Stream) -> ImpliedTensor:
    """What a gain, or centring, multiplies by."""
    if affine.gain is None:
        width, value = stream.width, node.outputs[0]
        dtype = stream.shapes.dtype(value) or stream.dtype
        centre = Sum(Diagonal(literal(np.ones(width))), literal(np.full((1, 1), -1.0 / width)))
        return ImpliedTensor(centre, dtype, 0)
    held = affine.gain
    vector = reshape(held.wide(), (held.size,))
    if operator(node) == "Div":
        with np.errstate(divide="ignore"):
            vector = literal(1.0 / evaluate(vector))
    return ImpliedTensor(Diagonal(vector), held.dtype, held.size)


def _weights(
    node: ir.Node, found: Mapping[ir.Node, Affine], stream: Stream
) -> dict[Edge, ir.Value]:
    """The weights of the stream that a dead skip lies in, and of the closed one that it adds."""
    members = list(stream.members)
    dead = node.inputs[1 - found[node].index]
    if found[node].is_skip and dead is not None and dead not in stream.values:
        other = stream.search.stream(dead, -1, stream.width, stream.rule)
        members += other.members if other.is_closed else []
    return {member.edge: member.weight.leaf for member in members}


def _leave_out(
    node: ir.Node,
    alive: int,
    weights: Mapping[Edge, ir.Value],
    explicit: ExitStack,
    editor: Editor,
) -> None:
    """Let ``node`` pass on what is not dead, and note how to write it back."""
    inputs = tuple(node.inputs)
    dead = 1 - alive
    node.op_type = "Identity"
    node.replace_input_with(0, inputs[alive])
    node.resize_inputs(1)

    def write_back() -> None:
        if node.graph is None:
            editor.remove_dead([inputs[dead]])
            return
        current = node.inputs[0]
        if all(_holds(edge, leaf) for edge, leaf in weights.items()):
            node.op_type = "Add"
            node.resize_inputs(2)
            node.replace_input_with(alive, current)
            node.replace_input_with(dead, inputs[dead])
            return
        assert current is not None
        replace_all_uses_with(node.outputs[0], current)
        editor.remove_dead([node.outputs[0], inputs[dead]])

    explicit.callback(write_back)


def _holds(edge: Edge, leaf: ir.Value) -> bool:
    """Whether an input still has the weight that it had."""
    node, index = edge
    held = constant(node.inputs[index]) if node.graph is not None else None
    return held is not None and held.leaf is leaf
