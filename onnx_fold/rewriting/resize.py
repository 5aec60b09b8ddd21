"""Operators that name the width of the channel axis, and what they have to name instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_fold.graph.channels import channels
from onnx_fold.graph.constants import integers
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.record import Made
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.stream import Stream

_COPIED, _INFERRED = 0, -1
"""Entries of a Reshape's shape that follow the input, at the same place or in number."""


def resize_stream(stream: Stream, values: Iterable[ir.Value], width: int, rewrite: Rewrite) -> None:
    """Let ``values`` of ``stream`` be ``width`` channels wide: shapes and shape inputs.

    Raises:
        CannotRewriteError: An operator depends on the width in a way that cannot be rewritten.
    """
    if stream.shape_readers:
        raise CannotRewriteError(f"{stream.shape_readers[0].name} reads the width of the stream")
    for value in values:
        _resize(value, stream, width, rewrite)


def _resize(value: ir.Value, stream: Stream, width: int, rewrite: Rewrite) -> None:
    """Let one value be ``width`` wide, and the node that makes it so."""
    rewrite.resized[value] = (stream.values[value], width)
    node = value.producer()
    if node is None:
        return
    if operator(node) == "Squeeze" and width == 1 and not _names_axes(node):
        raise CannotRewriteError(f"Squeeze '{node.name}' would remove a single channel")
    if operator(node) == "Resize" and len(node.inputs) > 3 and node.inputs[3] is not None:
        raise CannotRewriteError(f"Resize '{node.name}' names the width of its channels")
    shape_input = channels(node).shape_input
    if shape_input is None:
        return
    shape = resized_shape(node, stream, width, rewrite)
    if isinstance(shape, ir.TensorProtocol):
        rewrite.stored[node, shape_input] = shape
    elif shape is not None:
        rewrite.rewired[node, shape_input] = shape


def _names_axes(node: ir.Node) -> bool:
    return "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)


def resized_shape(
    node: ir.Node, stream: Stream, width: int, rewrite: Rewrite
) -> ir.TensorProtocol | Made | None:
    """The shape input that ``node`` (Reshape, Expand) needs for ``width`` channels.

    Returns:
        A new constant, a new Concat, or None if the shape may stay as it is.

    Raises:
        CannotRewriteError: The shape is computed in another way than by a Concat.
    """
    shape, axis = node.inputs[1], stream.values[node.outputs[0]]
    entries = integers(shape)
    if entries is not None:
        changed = _resized_entries(entries, node, stream, width)
        return None if changed == list(entries) else _integers(changed)
    concat = shape.producer() if shape is not None else None
    if concat is None or operator(concat) != "Concat" or axis != -1:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' computes its shape")
    pieces = [integers(piece) or () for piece in concat.inputs]
    last = pieces[-1]
    if not last:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' computes the width of its channels")
    if any(_COPIED in piece for piece in pieces) and not _is_aligned(node, stream):
        raise CannotRewriteError(f"{node.op_type} '{node.name}' copies the width of its channels")
    if last[-1] in (_COPIED, _INFERRED):
        return None
    at = rewrite.before(node)
    tail = at.integers([*last[:-1], width], f"{concat.outputs[0].name}_width")
    return at("Concat", *concat.inputs[:-1], tail, axis=0)


def _resized_entries(
    entries: Sequence[int], node: ir.Node, stream: Stream, width: int
) -> list[int]:
    """``entries`` with the new width; what copied the old one from another place says it itself."""
    changed, axis = list(entries), stream.values[node.outputs[0]]
    if operator(node) == "Reshape" and not node.attributes.get_int("allowzero", 0):
        source = node.inputs[0]
        assert source is not None
        rank = stream.shapes.rank(source)
        if rank is None and _COPIED in entries:
            raise CannotRewriteError(f"Reshape '{node.name}' copies sizes of a shape not known")
        at, origin = axis + len(entries), _axis_in_front(node, stream) + (rank or 0)
        if at != origin and origin < len(entries) and entries[origin] == _COPIED:
            changed[origin] = stream.width
        if entries[at] == _INFERRED or (entries[at] == _COPIED and at == origin):
            return changed
    if -axis <= len(entries):
        changed[axis] = width
    return changed


def _is_aligned(node: ir.Node, stream: Stream) -> bool:
    """Whether the channels of ``node`` are at the same place in front and behind."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = stream.shapes.rank(source)
    same_rank = rank is not None and rank == stream.shapes.rank(result)
    return same_rank and _axis_in_front(node, stream) == stream.values[result]


def _axis_in_front(node: ir.Node, stream: Stream) -> int:
    """The channel axis of what ``node`` reads, which may be a constant."""
    source = node.inputs[0]
    assert source is not None
    if source in stream.values:
        return stream.values[source]
    return next(writer.axis for writer in stream.constants if writer.edge == (node, 0))


def _integers(entries: Sequence[int]) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(entries, dtype=np.int64))
