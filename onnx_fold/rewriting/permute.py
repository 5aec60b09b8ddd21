"""Reorder the channels of a value at no cost: the order goes into the weights that make it.

A permutation commutes with more than a change of basis does: with every operator that treats each
channel alike. So the hidden value of an FFN can be reordered by the columns of its input layers
(gate and up alike), through the activation between. Where a Concat joined it, or a Split cuts it,
only the channels of one layer are free: the others are the basis of another stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnx_fold.algebra.expression import Expression, FoldedTensor, take
from onnx_fold.algebra.selection import Selection
from onnx_fold.graph.channels import Group, ports
from onnx_fold.graph.commute import OpensStreamError, Port
from onnx_fold.graph.linear import Linear
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.ends import ConstantWriter, Reader, Writer
from onnx_fold.streams.stream import Stream


@dataclass(frozen=True)
class Hidden:
    """A value whose channels can be reordered at no cost.

    Attributes:
        stream: All that shares its channels.
        free: The channels that can be reordered.
        end: Where these are not all: the layer that writes (reads) them and no others, and the axis
            of its weight.
    """

    stream: Stream
    free: slice
    end: tuple[Linear, int] | None = None


def permutable(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """The ports of ``node`` that a permutation of the channels of ``known`` reorders alike.

    What a Concat has made of parts, and a Split cuts into parts, ends there: :func:`hidden_stream`
    looks at the parts.
    """
    try:
        return ports(node, known, width, shapes, Group.PERMUTATION)
    except OpensStreamError:
        if _is_joint(node, known):
            return [known]
        raise


def _is_joint(node: ir.Node, known: Port) -> bool:
    return (operator(node), known.is_output) in (("Concat", True), ("Split", False))


def hidden_stream(stream: Stream, layer: Writer | Reader) -> Hidden | None:
    """The other side of a layer of ``stream``, if its channels can be reordered at no cost."""
    value, axis, width = (
        (layer.x, layer.x_axis, layer.in_features)
        if isinstance(layer, Writer)
        else (layer.y, layer.y_axis, layer.out_features)
    )
    if axis is None:
        return None
    hidden = stream.search.stream(value, axis, width, permutable)
    joints = list(_joints(hidden))
    if not hidden.is_closed or len(joints) > 1:
        return None
    if joints:
        return _free_part(hidden, *joints[0])
    is_between = hidden.writers and hidden.readers
    return Hidden(hidden, slice(0, width)) if is_between else None


def hidden_beside(stream: Stream, layer: Writer | Reader) -> Hidden | None:
    """The hidden value, if the basis can stand first in it (of a reader) or last (of a writer).

    So both layers of an FFN find a place: the columns that its first layer copies to the front stay
    there when rows of its last layer are moved to the end.
    """
    hidden = hidden_stream(stream, layer)
    if hidden is None or hidden.free.stop - hidden.free.start <= stream.width:
        return None
    is_last = hidden.free.stop == layer.in_features
    at_the_end = is_last if isinstance(layer, Writer) else hidden.free.start == 0
    return hidden if at_the_end else None


def _joints(hidden: Stream) -> Iterator[tuple[ir.Node, int]]:
    """The nodes at which it ends, and the axis of its channels there."""
    for value, axis in hidden.values.items():
        maker = value.producer()
        is_joined = maker is not None and operator(maker) == "Concat"
        if maker is not None and is_joined and maker.inputs[0] not in hidden.values:
            yield maker, axis
        for user, _ in value.uses():
            if operator(user) == "Split" and user.outputs[0] not in hidden.values:
                yield user, axis


def _free_part(hidden: Stream, joint: ir.Node, axis: int) -> Hidden | None:
    """The only part that a layer of its own writes (reads), if there is one."""
    linears, found, start = hidden.search.linears, [], 0
    is_made = operator(joint) == "Concat"
    for part in joint.inputs if is_made else joint.outputs:
        size = None if part is None else hidden.shapes.dim(part, axis)
        if part is None or not isinstance(size, int):
            return None
        users = [node for node, _ in part.uses()]
        node = part.producer() if is_made else users[0] if users else None
        layer = linears.get(node) if node is not None else None
        is_alone = len(users) == 1 and not part.is_graph_output()
        if layer is not None and is_alone and layer.is_plain and layer.bias is None:
            side = (layer.y, layer.out_axes) if is_made else (layer.x, layer.in_axes)
            if side[0] is part:
                found.append(Hidden(hidden, slice(start, start + size), (layer, side[1][0])))
        start += size
    return found[0] if len(found) == 1 else None


def permute(hidden: Hidden, pivot: Linear, rows: Selection, rewrite: Rewrite) -> None:
    """Plan to reorder the channels of ``hidden``; the weight of ``pivot`` is left to the caller.

    Args:
        hidden: What :func:`hidden_stream` gave.
        pivot: The layer for whose sake it is done.
        rows: The order, in which those that are not free stay in their places.
        rewrite: Receives the reordered weights.
    """
    stream = hidden.stream
    rewrite.reordered |= dict.fromkeys(stream.values, rows.final_order)
    for layer in (*stream.writers, *stream.readers):
        if layer.node is not pivot.node:
            axes = layer.out_axes if isinstance(layer, Writer) else layer.in_axes
            _reorder(layer, axes[0], rows.final_order, rewrite)
    for writer in stream.constants:
        if not writer.is_uniform:
            _reorder(writer, writer.axis, rows.final_order, rewrite)
    if hidden.end is not None:
        _reorder(*hidden.end, rows.final_order_of_free, rewrite)


def _reorder(
    member: Linear | ConstantWriter, axis: int, order: Expression, rewrite: Rewrite
) -> None:
    """Reorder one axis of a weight, on top of what ``rewrite`` does to it already."""
    planned = rewrite.stored.get(member.edge)
    values = planned.expression if isinstance(planned, FoldedTensor) else member.weight.values
    rewrite.stored[member.edge] = FoldedTensor(take(values, order, axis), member.weight.dtype)
