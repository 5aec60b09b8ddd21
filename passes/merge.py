"""Merge a sole writer into its readers, or a sole reader into its writers.

``(x P + b) M = x (P M) + b M``: two projections become one, nothing is inverted, and the error is
no worse than before. This is P into the FFN of Graef, arXiv 2404.12362, fig. 2(a), where ``M`` is
the FFN's input layer or its gate and up layers. Weights that would grow (a low-rank pair) refuse
it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_fold.basis import Basis, FoldedTensor
from onnx_fold.constants import Array, constant, scalar
from onnx_fold.folding import Candidate, FoldPass
from onnx_fold.linear import Linear, compact
from onnx_fold.rebase import become_identity, rebase
from onnx_fold.resize import CannotResizeError, resize_stream
from onnx_fold.rewrite import Rewrite
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


class MergePass(FoldPass):
    """Multiply out two linear layers in a row, wherever weights do not grow."""

    name = "merge"

    def candidates(self, stream: Stream) -> Iterator[Candidate]:
        """Yield the merge of the sole writer, and of the sole reader, if there is one."""
        if len(stream.writers) == 1 and not stream.tables:
            yield from _merge_writer(stream, stream.writers[0])
        if len(stream.readers) == 1 and len(stream.writers) != 1:
            yield from _merge_reader(stream, stream.readers[0])


def _merge_writer(stream: Stream, writer: Linear) -> Iterator[Candidate]:
    """Readers become ``P R``; the stream carries what ``P`` read."""
    width = writer.in_features
    rewrite = Rewrite()
    if not writer.keeps_layout:
        return
    for constant_writer in stream.constants:
        if not _bypass(constant_writer, rewrite):
            return
    rewrite.replaced[writer.y] = writer.x
    basis = Basis(writer.matrix, inverted=True)
    rebased = rebase(stream, basis, width, pivot=writer)
    for reader in stream.readers:
        rewrite.stored[reader.edge] = rebased.stored[reader.edge]
        carried = _carried(reader.x, writer, stream) if stream.constants else []
        if carried is None:
            return
        if carried:
            _add_bias(rewrite, reader, carried)
    try:
        if width != stream.width:
            kept = [value for value in stream.values if value not in rewrite.replaced]
            resize_stream(stream, kept, width, rewrite)
    except CannotResizeError:
        return
    into = compact([reader.label for reader in stream.readers])
    writers = [side for side in rebased.writers if not side.is_table]
    yield Candidate(
        strategy=MergePass.name,
        text=f"{writer.label} into {into}",
        rewrite=rewrite,
        writers=writers,
        readers=rebased.readers,
    )


def _merge_reader(stream: Stream, reader: Linear) -> Iterator[Candidate]:
    """Writers become ``W R``; the stream carries what ``R`` wrote."""
    width = reader.out_features
    if not reader.keeps_layout:
        return
    rebased = rebase(stream, Basis(reader.matrix), width, pivot=reader)
    rewrite = Rewrite(stored=rebased.stored)
    if not become_identity(rewrite, reader):
        return
    try:
        if width != stream.width:
            resize_stream(stream, stream.values, width, rewrite)
    except CannotResizeError:
        return
    into = compact([writer.label for writer in (*stream.tables, *stream.writers)])
    yield Candidate(
        strategy=MergePass.name,
        text=f"{reader.label} into {into}",
        rewrite=rewrite,
        writers=rebased.writers,
        readers=rebased.readers,
    )


def _bypass(writer: ConstantWriter, rewrite: Rewrite) -> bool:
    """Take an added vector out of the stream; its share is added behind the readers."""
    node = writer.node
    if writer.is_table or node.op_type not in ("Add", "Sub", "Gemm"):
        return False
    if node.op_type == "Gemm":
        return True  # goes with the node
    other = node.inputs[1 - writer.index]
    if other is None or (node.op_type == "Sub" and writer.index == 0):
        return False
    rewrite.replaced[node.outputs[0]] = other
    return True


def _carried(value: ir.Value, writer: Linear, stream: Stream) -> Carried | None:
    """The constants that arrive at ``value``, or None if they differ from position to position."""
    node = value.producer()
    assert node is not None  # a closed stream has no graph input
    own = [(c, 1.0) for c in stream.constants if c.node is node and not c.is_zero()]
    if node is writer.node:
        beta = node.attributes.get_float("beta", 1.0)
        return [(c, beta) for c, _ in own]
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

    def through() -> Array:
        vectors = [gain * writer.channels_last().reshape(-1) for writer, gain in carried]
        total: Array = np.sum(vectors, axis=0) @ reader.matrix()
        return total

    dtype, width = reader.weight.dtype, reader.out_features
    node = reader.node
    if node.op_type == "Gemm":
        beta = node.attributes.get_float("beta", 1.0)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        held = constant(bias)
        if beta != 0.0 and (bias is None or held is not None):
            own = held.wide if held is not None else lambda: np.zeros(width)
            shape = np.broadcast_shapes(held.shape if held is not None else (), (width,))
            rewrite.stored[node, 2] = FoldedTensor(lambda: own() + through() / beta, dtype, shape)
            return
    if reader.y_axis == -1 and len(reader.y.uses()) == 1 and not reader.y.is_graph_output():
        ((add, index),) = reader.y.uses()
        held = constant(add.inputs[1 - index]) if add.op_type == "Add" else None
        if held is not None and held.dtype == dtype and held.size == width == held.shape[-1]:
            stored = held
            rewrite.stored[add, 1 - index] = FoldedTensor(
                lambda: stored.wide() + through(), dtype, held.shape
            )
            return
    shape = (width,) + (1,) * (-1 - reader.y_axis)
    tensor = FoldedTensor(lambda: through().reshape(shape), dtype, shape)
    rewrite.biases[reader.y] = (reader.y_axis, tensor)
