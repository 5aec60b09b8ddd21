"""Reorder the channels of a value at no cost: the order goes into the weights that make it.

A permutation commutes with more than a change of basis does: with every operator that treats each
channel alike. So the hidden value of an FFN can be reordered by the columns of its input layers
(gate and up alike), through the activation between.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_fold.commute import Port, ports
from onnx_fold.expression import Expression, FoldedTensor, take
from onnx_fold.linear import Linear
from onnx_fold.rewrite import Rewrite
from onnx_fold.shapes import Shapes
from onnx_fold.stream import ConstantWriter, Stream

_ELEMENTWISE = frozenset(
    (
        *(
            "Abs",
            "BiasGelu",
            "Celu",
            "Clip",
            "Elu",
            "Erf",
            "Exp",
            "FastGelu",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
        ),
        *("LeakyRelu", "Log", "Mish", "Pow", "QuickGelu", "Reciprocal", "Relu", "Selu", "Sigmoid"),
        *("Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
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


def hidden_stream(stream: Stream, layer: Linear) -> Stream | None:
    """The other side of a layer of ``stream``, if its channels can be reordered at no cost."""
    is_reader = layer in stream.writers  # a writer of the stream reads the hidden value
    value, axis, width = (
        (layer.x, layer.x_axis, layer.in_features)
        if is_reader
        else (layer.y, layer.y_axis, layer.out_features)
    )
    if axis is None:
        return None
    hidden = stream.search.stream(value, axis, width, permutable)
    return hidden if hidden.is_closed and hidden.writers and hidden.readers else None


def permute(hidden: Stream, pivot: Linear, order: Expression, rewrite: Rewrite) -> None:
    """Plan to reorder the channels of ``hidden``; the weight of ``pivot`` is left to the caller.

    Args:
        hidden: What :func:`hidden_stream` gave.
        pivot: The layer for whose sake it is done.
        order: Which old channel stands at each new place.
        rewrite: Receives the reordered weights.
    """
    rewrite.reordered.extend(hidden.values)
    for layer in (*hidden.writers, *hidden.readers):
        if layer.node is not pivot.node:
            axes = layer.out_axes if layer in hidden.writers else layer.in_axes
            _reorder(layer, axes[0], order, rewrite)
    for writer in hidden.constants:
        if writer.weight.size > 1:
            _reorder(writer, writer.axis, order, rewrite)


def _reorder(
    member: Linear | ConstantWriter, axis: int, order: Expression, rewrite: Rewrite
) -> None:
    """Reorder one axis of a weight, on top of what ``rewrite`` does to it already."""
    planned = rewrite.stored.get(member.edge)
    values = planned.expression if isinstance(planned, FoldedTensor) else member.weight.values
    rewrite.stored[member.edge] = FoldedTensor(take(values, order, axis), member.weight.dtype)
