"""A stream in another basis: the new weight of every writer and reader."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_fold.basis import Basis, Side, TableSide, product_dtype
from onnx_fold.constants import constant
from onnx_fold.expression import (
    Expression,
    FoldedTensor,
    cast,
    of_tensor,
    reshape,
    scale,
    transpose,
)
from onnx_fold.linear import Linear
from onnx_fold.rewrite import CannotRewriteError, Rewrite, new_node
from onnx_fold.stream import ConstantWriter, Edge, Stream


@dataclass
class Rebased:
    """New weights by node input, with what the probe needs to judge them."""

    stored: dict[Edge, ir.TensorProtocol] = field(default_factory=dict)
    writers: list[Side | TableSide] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)


def rebase(stream: Stream, basis: Basis, width: int, pivot: Linear) -> Rebased:
    """Express every writer (``W T``) and reader (``T⁻¹ R``) but ``pivot`` in ``basis``.

    Args:
        stream: A closed stream.
        basis: The new basis, ``[stream.width, width]``.
        width: Channels of the stream afterwards.
        pivot: The layer that becomes the identity; it gets no new weight.
    """
    result = Rebased()
    tied: dict[tuple[object, ...], FoldedTensor] = {}

    def store(layer: Linear, is_writer: bool) -> FoldedTensor:
        weight = layer.weight
        key = (weight.leaf, weight.permutation, is_writer, layer.transposed, layer.alpha)
        if key not in tied:
            matrix = weights_of(layer)
            after = basis.of_writer(matrix) if is_writer else basis.of_reader(matrix)
            tied[key] = FoldedTensor(layer.pack(after), weight.dtype)
        return tied[key]

    def side(layer: Linear, is_writer: bool) -> Side:
        after = None
        if layer is not pivot:
            tensor = result.stored[layer.edge] = store(layer, is_writer)
            after = stored_matrix(layer, tensor)
        rows = stream.rows_of(layer) if is_writer else None
        return Side(weights_of(layer), after, rows)

    result.writers += [side(layer, is_writer=True) for layer in stream.writers]
    result.readers += [side(layer, is_writer=False) for layer in stream.readers]
    for writer in stream.constants:
        if not writer.is_zero():
            result.stored[writer.edge] = _constant(writer, basis)
            result.writers.append(_constant_side(writer, basis))
        elif width != stream.width:
            result.stored[writer.edge] = _constant(writer, basis)
    return result


def stored_matrix(layer: Linear, tensor: FoldedTensor) -> Expression:
    """What ``layer`` multiplies by once it stores ``tensor``, rounding included."""
    return layer.unpack(cast(tensor.rounded, product_dtype(tensor.dtype)))


def weights_of(layer: Linear) -> Expression:
    """What ``layer`` multiplies by now, in the type in which its products accumulate."""
    return layer.matrix(product_dtype(layer.weight.dtype))


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
    """Let what ``layer`` reads take the place of what it writes; its Gemm bias stays as an Add.

    Raises:
        CannotRewriteError: The axes differ, or a bias computed at run time is scaled.
    """
    node = layer.node
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if not layer.keeps_layout:
        raise CannotRewriteError(f"{node.op_type} '{node.name}' moves the channels to another axis")
    if bias is None:
        rewrite.replaced[layer.y] = layer.x
        return
    beta = node.attributes.get_float("beta", 1.0)
    if beta != 1.0:
        held, stored = constant(bias), rewrite.stored.get((node, 2))
        if held is None:
            raise CannotRewriteError(f"Gemm '{node.name}' scales a bias computed at run time")
        wide = held.wide() if stored is None else cast(of_tensor(stored), np.float64)
        rewrite.stored[node, 2] = FoldedTensor(scale(wide, beta), held.dtype)
    if (node, 2) not in rewrite.stored:
        rewrite.kept.add(bias)

    def build(graph: ir.Graph) -> ir.Value:
        current = node.inputs[2]  # what is stored there by now
        assert current is not None
        total = new_node(graph, node, "Add", [layer.x, current]).outputs[0]
        total.type, total.shape = layer.y.type, layer.y.shape
        return total

    rewrite.replaced[layer.y] = build
    rewrite.nodes_added += 1
