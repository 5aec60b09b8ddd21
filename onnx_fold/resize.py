"""Operators that name the width of the channel axis, and what they have to name instead."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnx_fold.constants import integers
from onnx_fold.rewrite import Build, CannotRewriteError, Rewrite, new_constant, new_node
from onnx_fold.stream import Stream

_FREE = (0, -1)
"""Entries of a Reshape's shape that follow the input: copied, inferred."""


def resize_stream(stream: Stream, values: Iterable[ir.Value], width: int, rewrite: Rewrite) -> None:
    """Let ``values`` of ``stream`` be ``width`` channels wide: shapes and shape inputs.

    Raises:
        CannotRewriteError: An operator depends on the width in a way that cannot be rewritten.
    """
    if stream.measures:
        raise CannotRewriteError(f"{stream.measures[0].name} reads the width of the stream")
    for value in values:
        resize(value, stream.values[value], width, rewrite)


def resize(value: ir.Value, axis: int, width: int, rewrite: Rewrite) -> None:
    """Let ``axis`` (from the end) of one value be ``width`` wide, and the node that makes it so.

    Raises:
        CannotRewriteError: The node depends on the width in a way that cannot be rewritten.
    """
    rewrite.resized[value] = (axis, width)
    node = value.producer()
    if node is None or node.op_type not in ("Reshape", "Expand"):
        return
    shape = resized_shape(node, axis, width)
    if isinstance(shape, ir.TensorProtocol):
        rewrite.stored[node, 1] = shape
    elif shape is not None:
        rewrite.rewired[node, 1] = shape


def resized_shape(node: ir.Node, axis: int, width: int) -> ir.TensorProtocol | Build | None:
    """The shape input that ``node`` (Reshape, Expand) needs for an ``axis`` of ``width``.

    Returns:
        A new constant, a Concat to build, or None if the shape may stay as it is.

    Raises:
        CannotRewriteError: The shape is computed in another way than by a Concat.
    """
    shape = node.inputs[1]
    entries = integers(shape)
    if entries is not None:
        if -axis > len(entries) or entries[axis] in _FREE:
            return None
        changed = list(entries)
        changed[axis] = width
        return ir.tensor(np.asarray(changed, dtype=np.int64))
    concat = shape.producer() if shape is not None else None
    if concat is None or concat.op_type != "Concat" or axis != -1:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' computes its shape")
    last = integers(concat.inputs[-1])
    if last is None:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' computes the width of its channels")
    if last[-1] in _FREE:
        return None
    changed = [*last[:-1], width]

    def build(graph: ir.Graph) -> ir.Value:
        tensor = ir.tensor(np.asarray(changed, dtype=np.int64))
        tail = new_constant(graph, tensor, f"{concat.outputs[0].name}_width")
        return new_node(graph, node, "Concat", [*concat.inputs[:-1], tail], axis=0).outputs[0]

    return build
