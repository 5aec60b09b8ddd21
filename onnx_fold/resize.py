"""Operators that name the width of the channel axis, and what they have to name instead."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnx_fold.constants import integers
from onnx_fold.rewrite import Build, CannotRewriteError, Rewrite, unused_name, unused_node_name
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
        rewrite.resized[value] = (stream.values[value], width)
        node = value.producer()
        if node is None or node.op_type not in ("Reshape", "Expand"):
            continue
        resized = resized_shape(node, stream.values[value], width)
        if isinstance(resized, ir.TensorProtocol):
            rewrite.stored[node, 1] = resized
        elif resized is not None:
            rewrite.rewired[node, 1] = resized


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
        name = f"{concat.outputs[0].name}_resized"
        tail = ir.Value(
            name=unused_name(graph, f"{name}_width"),
            const_value=ir.tensor(np.asarray(changed, dtype=np.int64)),
        )
        graph.register_initializer(tail)
        new = ir.node(
            "Concat",
            [*concat.inputs[:-1], tail],
            attributes={"axis": 0},
            name=unused_node_name(graph, f"{concat.name}_resized"),
        )
        new.outputs[0].name = unused_name(graph, name)
        graph.insert_after(concat, new)
        return new.outputs[0]

    return build
