"""Reorder the channels of a value at no cost: the order goes into the weights that make it.

A permutation commutes with more than a change of basis does: with every operator that treats each
channel alike. So the hidden value of an FFN can be reordered by the columns of its input layers
(gate and up alike), through the activation between.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.basis import FoldedTensor
from onnx_fold.commute import Port, ports
from onnx_fold.linear import Linear
from onnx_fold.rewrite import Rewrite
from onnx_fold.shapes import Shapes
from onnx_fold.stream import ConstantWriter, Stream

Order = Callable[[], npt.NDArray[np.intp]]
"""Which old channel stands at each new place; evaluated when the weights are."""

_ELEMENTWISE = frozenset(
    (
        *(
            "Abs",
            "Celu",
            "Clip",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "LeakyRelu",
        ),
        *("Log", "Mish", "Pow", "QuickGelu", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus"),
        *("Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum"),
    )
)
_DOMAINS = ("", "ai.onnx", "com.microsoft")


def permutable(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """The ports of ``node`` that a permutation of the channels of ``known`` reorders alike."""
    if node.op_type not in _ELEMENTWISE or node.domain not in _DOMAINS:
        return ports(node, known, width, shapes)
    found = [Port(True, 0, known.axis)]
    for index, value in enumerate(node.inputs):
        size = 1 if value is None else shapes.dim(value, known.axis)
        if size == width:
            found.append(Port(False, index, known.axis))
        elif size != 1:
            return None
    return found if known in found else None


def permute(stream: Stream, reader: Linear, order: Order, rewrite: Rewrite) -> bool:
    """Plan to reorder the channels that ``reader`` reads; its own weight is left to the caller.

    Args:
        stream: The stream that ``reader`` writes.
        reader: A linear layer whose input is to be reordered.
        order: The new order.
        rewrite: Receives the reordered weights.

    Returns:
        False if something else looks at these channels.
    """
    hidden = stream.search.stream(reader.x, reader.x_axis, reader.in_features, permutable)
    others = [layer for layer in hidden.readers if layer.node is not reader.node]
    if not hidden.is_closed or not hidden.writers:
        return False
    for layer in (*hidden.writers, *others):
        axis = int(layer in hidden.writers) ^ layer.transposed
        rewrite.stored[layer.edge] = _reordered(layer, axis, order)
    for writer in hidden.constants:
        if writer.weight.size > 1:
            rewrite.stored[writer.edge] = _reordered(writer, writer.axis, order)
    return True


def _reordered(member: Linear | ConstantWriter, axis: int, order: Order) -> FoldedTensor:
    held = member.weight
    return FoldedTensor(lambda: np.take(held.wide(), order(), axis=axis), held.dtype, held.shape)
