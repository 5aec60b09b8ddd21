"""A stream in another basis: the new weight of every writer and reader."""

from __future__ import annotations

import numpy as np

from onnx_fold.algebra.basis import Basis, DiagonalBasis
from onnx_fold.algebra.expression import (
    Diagonal,
    FoldedTensor,
    ImpliedTensor,
    cast,
    implied_gain,
    of_tensor,
    reshape,
    scale,
)
from onnx_fold.graph.constants import constant
from onnx_fold.graph.linear import Linear
from onnx_fold.rewriting.record import Operand, Present
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite, stored_size
from onnx_fold.streams.ends import End, Reader, Writer
from onnx_fold.streams.stream import Stream


def rebase(
    stream: Stream, basis: Basis, width: int | None = None, pivot: Linear | None = None
) -> Rewrite:
    """Express every writer (``W T``) and reader (``T⁻¹ R``) but ``pivot`` in ``basis``.

    A reader behind a gain is ``G R``; its gain is left to the caller.

    Args:
        stream: A closed stream.
        basis: The new basis, ``[stream.width, width]``.
        width: Channels of the stream afterwards, if that is another number.
        pivot: The layer that goes, or is written by the caller; it gets no new weight.
    """
    rewrite = Rewrite()
    tied: dict[tuple[object, ...], FoldedTensor] = {}

    def store(end: End) -> None:
        if end.identity not in tied:
            tied[end.identity] = _in_basis(end, basis)
        rewrite.stored[end.edge] = tied[end.identity]

    layers: tuple[Writer | Reader, ...] = (*stream.writers, *stream.readers)
    for layer in layers:
        if layer is not pivot:
            store(layer)
    for added in stream.constants:
        if not added.is_zero() or (width or stream.width) != stream.width:
            store(added)
    return rewrite


def _in_basis(end: End, basis: Basis) -> FoldedTensor:
    """``W T``, or ``T⁻¹ R``; a gain, which is a product for the time of the fold, stays one."""
    factors = implied_gain(end.weight.tensor) if isinstance(basis, DiagonalBasis) else None
    is_reader = isinstance(end, Reader)
    if factors is None:
        return end.store(basis.of_reader(end.matrix) if is_reader else basis.of_writer(end.matrix))
    column = reshape(factors, (-1, 1))
    changed = basis.of_reader(column) if is_reader else basis.of_writer(factors)
    gain = Diagonal(reshape(changed, factors.shape))
    return ImpliedTensor(gain, end.weight.dtype, stored_size(end.weight.tensor))


def become_identity(rewrite: Rewrite, layer: Linear) -> None:
    """Let what ``layer`` reads take the place of what it writes; its own bias stays as an Add.

    Raises:
        CannotRewriteError: The axes differ, or a bias computed at run time is scaled.
    """
    node = layer.node
    if not layer.keeps_layout:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' {layer.moves}")
    value = in_place(rewrite, layer) if layer.bias is None else layer.x
    rewrite.replaced[layer.y] = with_bias(rewrite, layer, value)


def with_bias(rewrite: Rewrite, layer: Linear, value: Operand) -> Operand:
    """``value``, and the bias of ``layer`` added by an Add if it has one.

    Raises:
        CannotRewriteError: The bias is computed at run time, and scaled or of another axis.
    """
    node, edge = layer.node, layer.bias
    if edge is None:
        return value
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
    return rewrite.before(node)("Add", value, Present(edge), like=layer.y)


def in_place(rewrite: Rewrite, layer: Linear) -> Operand:
    """What ``layer`` reads, as it has to be shaped to stand where it wrote."""
    shape = layer.identity_shape
    if shape is None:
        return layer.x
    at = rewrite.before(layer.node)
    return at("Reshape", layer.x, at.integers(shape, f"{layer.y.name}_shape"))
