"""Vectors that are added to a stream, carried through its readers: ``(x + b) R = x R + b R``.

No basis has to be inverted for them, but they must be the same at every position where a reader
reads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_fold.constants import constant, scalar
from onnx_fold.expression import FoldedTensor, Held, Sum, product, reshape, scale
from onnx_fold.linear import Linear
from onnx_fold.rewrite import CannotRewriteError, Rewrite
from onnx_fold.stream import ConstantWriter, Stream

Carried = list[tuple[ConstantWriter, float]]
"""Constants that reach a value, each with its factor."""

_UNIFORM = frozenset(
    (
        *("Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
        *("Expand", "Tile", "Slice", "Split", "Gather", "ReduceMean"),
    )
)
"""Operators that leave a vector which is the same at every position as it is."""

_ADDS_BIAS = frozenset(("Add", "BiasGelu", "FastGelu"))
"""Operators of two inputs that first of all add them."""


def carry_biases(stream: Stream, writer: Linear, rewrite: Rewrite) -> None:
    """Plan to take every constant out of ``stream``, whose sole linear writer is ``writer``.

    Raises:
        CannotRewriteError: One of them differs from position to position where a reader reads it.
    """
    for constant_writer in stream.constants:
        if not _bypass(constant_writer, writer, stream, rewrite):
            raise CannotRewriteError(
                f"'{constant_writer.label}' cannot be carried behind the readers"
            )
    for reader in stream.readers if stream.constants else ():
        carried = _carried(reader.x, writer, stream)
        if carried is None:
            raise CannotRewriteError(f"the bias of {writer.label} reaches {reader.label} unevenly")
        if carried:
            _add_bias(rewrite, reader, carried)


def _bypass(writer: ConstantWriter, layer: Linear, stream: Stream, rewrite: Rewrite) -> bool:
    """Take an added vector out of the stream; its share is added behind the readers."""
    node = writer.node
    if writer.edge == layer.bias:
        return not writer.is_table  # goes with the node
    if writer.is_table or node.op_type not in ("Add", "Sub"):
        return False
    other = node.inputs[1 - writer.index]
    if other not in stream.values or (node.op_type == "Sub" and writer.index == 0):
        return False
    if len(writer.weight.shape) > max(1, stream.shapes.rank(other) or 0):
        return False  # the sum has more axes than the stream
    rewrite.replaced[node.outputs[0]] = other
    return True


def _carried(value: ir.Value, writer: Linear, stream: Stream) -> Carried | None:
    """The constants that arrive at ``value``, or None if they differ from position to position."""
    node = value.producer()
    assert node is not None  # a closed stream has no graph input
    own = [(c, 1.0) for c in stream.constants if c.node is node and not c.is_zero()]
    if node is writer.node:
        return [(c, writer.beta) for c, _ in own]
    if node.op_type in _UNIFORM:
        return _carried(_operand(node, 0), writer, stream)
    if node.op_type == "Neg":
        return _scaled(_carried(_operand(node, 0), writer, stream), -1.0)
    if node.op_type in ("Mul", "Div"):
        index = 1 if _operand(node, 1) in stream.values else 0
        gain = scalar(_operand(node, 1 - index))
        if gain is None or (node.op_type == "Div" and gain == 0.0):
            return None
        carried = _carried(_operand(node, index), writer, stream)
        return _scaled(carried, gain if node.op_type == "Mul" else 1.0 / gain)
    if node.op_type not in ("Add", "Sub", "Sum"):
        return None
    total: Carried = []
    for index, operand in enumerate(node.inputs):
        sign = -1.0 if node.op_type == "Sub" and index == 1 else 1.0
        if operand in stream.values:
            carried = _carried(operand, writer, stream)
        else:
            carried = [(c, factor) for c, factor in own if c.index == index]
        scaled = _scaled(carried, sign)
        if scaled is None:
            return None
        total += scaled
    return total


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _scaled(carried: Carried | None, factor: float) -> Carried | None:
    return None if carried is None else [(writer, factor * gain) for writer, gain in carried]


def _add_bias(rewrite: Rewrite, reader: Linear, carried: Carried) -> None:
    """Add ``b R`` behind ``reader``: into the bias that it has, else as an Add of its own."""
    vectors = (scale(reshape(writer.channels_last(), (-1,)), gain) for writer, gain in carried)
    through = product(Sum(tuple(vectors)), reader.matrix(is_writer=False))
    dtype, width = reader.weight.dtype, reader.out_features
    node, edge = reader.node, reader.bias
    if reader.beta != 0.0 and (edge is not None or node.op_type == "Gemm"):
        held = constant(node.inputs[edge[1]]) if edge is not None else None
        if edge is None or held is not None:
            own = held.wide() if held is not None else Held(np.zeros(width))
            total = Sum((own, scale(through, 1.0 / reader.beta)))
            rewrite.stored[edge or (node, 2)] = FoldedTensor(total, dtype)
            return
    shape = reader.vector_shape
    if shape is None:
        raise CannotRewriteError(f"a bias cannot be added behind {reader.label}")
    if shape == (width,) and len(reader.y.uses()) == 1 and not reader.y.is_graph_output():
        ((add, index),) = reader.y.uses()
        is_sum = add.op_type in _ADDS_BIAS and len(add.inputs) == 2
        held = constant(add.inputs[1 - index]) if is_sum else None
        if held is not None and held.dtype == dtype and held.is_vector and held.size == width:
            rewrite.stored[add, 1 - index] = FoldedTensor(Sum((held.wide(), through)), dtype)
            return
    rewrite.biases[reader.y] = FoldedTensor(reshape(through, shape), dtype)
