"""A stream in another basis: the new weight of every writer and reader."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import Basis, DiagonalBasis, Side, TableSide, product_dtype
from onnx_fold.algebra.expression import (
    Diagonal,
    Expression,
    FoldedTensor,
    ImpliedTensor,
    ScaledRows,
    cast,
    implied_gain,
    of_tensor,
    reshape,
    scale,
    transpose,
)
from onnx_fold.graph.constants import Constant, constant
from onnx_fold.graph.linear import Edge, Linear
from onnx_fold.rewriting.record import Operand, Present
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite, stored_size
from onnx_fold.streams.stream import ConstantWriter, Stream


@dataclass
class Rebased:
    """New weights by node input, with what the probe needs to judge them."""

    stored: dict[Edge, ir.TensorProtocol] = field(default_factory=dict)
    writers: list[Side | TableSide] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)


def rebase(stream: Stream, basis: Basis, width: int, pivot: Linear | None = None) -> Rebased:
    """Express every writer (``W T``) and reader (``T⁻¹ R``) but ``pivot`` in ``basis``.

    A reader behind a gain is ``G R``, see :func:`behind_gain`; its gain is left to the caller.

    Args:
        stream: A closed stream.
        basis: The new basis, ``[stream.width, width]``.
        width: Channels of the stream afterwards.
        pivot: The layer that becomes the identity, if one does; it gets no new weight.
    """
    result = Rebased()
    tied: dict[tuple[object, ...], FoldedTensor] = {}

    def store(layer: Linear, is_writer: bool) -> FoldedTensor:
        weight = layer.weight
        axes = (layer.in_axes, layer.out_axes)
        gain = None if is_writer else stream.gains.get(layer.x)
        key = (weight.leaf, weight.permutation, is_writer, axes, layer.alpha, gain)
        if key not in tied:
            if isinstance(basis, DiagonalBasis) and implied_gain(weight.tensor) is not None:
                tied[key] = _gain_in(basis, weight, is_writer=is_writer)
                return tied[key]
            matrix = weights_of(layer) if is_writer else behind_gain(stream, layer)
            after = basis.of_writer(matrix) if is_writer else basis.of_reader(matrix)
            tied[key] = FoldedTensor(layer.pack(after, is_writer=is_writer), weight.dtype)
        return tied[key]

    def side(layer: Linear, is_writer: bool) -> Side:
        after = None
        if layer is not pivot:
            tensor = result.stored[layer.edge] = store(layer, is_writer)
            after = stored_matrix(layer, tensor, is_writer=is_writer)
        rows = stream.rows_of(layer) if is_writer else None
        before = weights_of(layer) if is_writer else behind_gain(stream, layer)
        return Side(before, after, rows)

    result.writers += [side(layer, is_writer=True) for layer in stream.writers]
    result.readers += [side(layer, is_writer=False) for layer in stream.readers]
    for writer in stream.constants:
        if not writer.is_zero():
            result.stored[writer.edge] = _constant(writer, basis)
            result.writers.append(_constant_side(writer, basis))
        elif width != stream.width:
            result.stored[writer.edge] = _constant(writer, basis)
    return result


def _gain_in(basis: DiagonalBasis, gain: Constant, *, is_writer: bool) -> ImpliedTensor:
    """A gain that is written as a product for the time of the fold: it still is a gain."""
    factors = implied_gain(gain.tensor)
    assert factors is not None
    if is_writer:
        factors = basis.of_writer(factors)
    else:
        factors = reshape(basis.of_reader(reshape(factors, (-1, 1))), factors.shape)
    return ImpliedTensor(Diagonal(factors), gain.dtype, stored_size(gain.tensor))


def stored_matrix(layer: Linear, tensor: FoldedTensor, *, is_writer: bool = True) -> Expression:
    """What ``layer`` multiplies by once it stores ``tensor``, rounding included."""
    stored = cast(tensor.rounded, product_dtype(tensor.dtype))
    return layer.unpack(stored, is_writer=is_writer)


def weights_of(layer: Linear, *, is_writer: bool = True) -> Expression:
    """What ``layer`` multiplies by now, in the type in which its products accumulate."""
    return layer.matrix(product_dtype(layer.weight.dtype), is_writer=is_writer)


def behind_gain(stream: Stream, reader: Linear) -> Expression:
    """``G R``: what ``reader`` multiplies the stream by, the gain ``G`` in front of it included."""
    matrix = weights_of(reader, is_writer=False)
    gain = stream.gains.get(reader.x)
    if gain is None:
        return matrix
    factors = reshape(gain.weight.wide(matrix.dtype), (stream.width,))
    return ScaledRows(matrix, factors)


def _constant(writer: ConstantWriter, basis: Basis) -> FoldedTensor:
    vectors = basis.of_writer(writer.channels_last())
    axes = list(range(len(vectors.shape) - 1))
    axes.insert(len(axes) + 1 + writer.axis, len(axes))
    return FoldedTensor(transpose(vectors, axes), writer.weight.dtype)


def _constant_side(writer: ConstantWriter, basis: Basis) -> TableSide:
    """Rows of a table do not mix, so those that are probed are all that is evaluated."""
    before = reshape(writer.channels_last(), (-1, writer.width))
    rounded = cast(basis.of_writer(before), writer.weight.dtype.numpy())
    return TableSide(before, cast(rounded, np.float64))


def become_identity(rewrite: Rewrite, layer: Linear) -> None:
    """Let what ``layer`` reads take the place of what it writes; its own bias stays as an Add.

    Raises:
        CannotRewriteError: The axes differ, or a bias computed at run time is scaled.
    """
    node, edge = layer.node, layer.bias
    if not layer.keeps_layout:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' moves the channels to another axis")
    if edge is None:
        rewrite.replaced[layer.y] = in_place(rewrite, layer)
        return
    held, stored = constant(node.inputs[edge[1]]), rewrite.stored.get(edge)
    shape = layer.vector_shape
    if held is None and layer.beta != 1.0:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' scales a bias computed at run time")
    if held is None and layer.y_axis != -1:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' adds a bias computed at run time")
    if held is not None and (layer.beta != 1.0 or len(shape or ()) > 1):
        wide = held.wide() if stored is None else cast(of_tensor(stored), np.float64)
        if len(shape or ()) > 1:
            wide = reshape(wide, shape or ())
        rewrite.stored[edge] = FoldedTensor(scale(wide, layer.beta), held.dtype)
    total = rewrite.before(node)("Add", layer.x, Present(edge), like=layer.y)
    rewrite.replaced[layer.y] = total


def in_place(rewrite: Rewrite, layer: Linear) -> Operand:
    """What ``layer`` reads, as it has to be shaped to stand where it wrote."""
    shape = layer.identity_shape
    if shape is None:
        return layer.x
    at = rewrite.before(layer.node)
    return at("Reshape", layer.x, at.integers(shape, f"{layer.y.name}_shape"))
