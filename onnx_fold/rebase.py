"""A stream in another basis: the new weight of every writer and reader."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.basis import Basis, Expression, FoldedTensor, Side, TableSide, product_dtype
from onnx_fold.constants import Array, constant
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
        rows, columns = (layer.in_features, width) if is_writer else (width, layer.out_features)
        weight = layer.weight
        key = (weight.leaf, weight.permutation, is_writer, layer.transposed, layer.alpha)
        if key not in tied:
            tied[key] = FoldedTensor(
                _expression(layer, basis, is_writer),
                layer.weight.dtype,
                layer.packed_shape(rows, columns),
            )
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
            result.stored[writer.edge] = _constant(writer, basis, width)
            result.writers.append(_constant_side(writer, basis))
        elif width != stream.width:
            result.stored[writer.edge] = _constant(writer, basis, width)
    return result


def stored_matrix(layer: Linear, tensor: FoldedTensor) -> Expression:
    """What ``layer`` multiplies by once it stores ``tensor``, rounding included."""
    return lambda: layer.unpack(tensor.numpy().astype(product_dtype(tensor.dtype)))


def weights_of(layer: Linear) -> Expression:
    """What ``layer`` multiplies by now, in the type in which its products accumulate."""
    return lambda: layer.matrix(product_dtype(layer.weight.dtype))


def _expression(layer: Linear, basis: Basis, is_writer: bool) -> Expression:
    dtype = product_dtype(layer.weight.dtype)

    def evaluate() -> Array:
        matrix = layer.matrix(dtype)
        return layer.pack(basis.of_writer(matrix) if is_writer else basis.of_reader(matrix))

    return evaluate


def _constant(writer: ConstantWriter, basis: Basis, width: int) -> FoldedTensor:
    shape = list(writer.shape)
    shape[writer.axis] = width

    def evaluate() -> Array:
        return np.moveaxis(basis.of_writer(writer.channels_last()), -1, writer.axis)

    return FoldedTensor(evaluate, writer.weight.dtype, shape)


def _constant_side(writer: ConstantWriter, basis: Basis) -> TableSide:
    """Rows of a table do not mix, so those that are probed are all that is evaluated."""
    narrow = writer.weight.dtype.numpy()

    def take(rows: npt.NDArray[np.intp]) -> tuple[Array, Array]:
        before = writer.take(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            after = basis.of_writer(before).astype(narrow).astype(np.float64)
        return before, after

    return TableSide(writer.num_rows, take)


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
        wide = stored.wide if isinstance(stored, FoldedTensor) else held.wide
        shape = stored.shape.numpy() if stored is not None else held.shape
        rewrite.stored[node, 2] = FoldedTensor(lambda: beta * wide(), held.dtype, shape)
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
