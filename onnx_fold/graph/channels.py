"""What every operator does to the channels of the values that pass through it: one table.

A stream is free in the changes of basis that all its operators let through. The groups are nested:
whoever lets a general basis through lets an orthogonal, a diagonal one and a permutation through.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import onnx_ir as ir

from onnx_fold.graph import commute, layout
from onnx_fold.graph.commute import Port, Rule
from onnx_fold.graph.layout import Columns, Layout, Step
from onnx_fold.graph.operators import MICROSOFT, operator
from onnx_fold.graph.shapes import Shapes

__all__ = ["CUTS", "OPERATORS", "Channels", "Group", "channels", "ports", "taken"]


class Group(IntEnum):
    """Changes of basis ``x → x T``, the smallest group first."""

    NONE = 0
    PERMUTATION = 1
    DIAGONAL = 2
    ORTHOGONAL = 3
    GENERAL = 4


@dataclass(frozen=True)
class Channels:
    """What one operator does to channels.

    Attributes:
        group: The changes of basis that commute with it; positive ones of the diagonal group.
        ports: Which of its inputs and outputs carry the channels then; None if the stream cannot
            be followed through it yet.
        reordered: The same where channels are only reordered, if that lets more through: products
            of two values of the stream.
        layout: How it moves the channels of a layer; None if that is not followed.
        is_uniform: Whether a vector that is the same at every position is the same behind it.
        leads_to_heads: Whether it may stand between a projection and the cut into heads.
        shape_input: The input that names the width of its output.
    """

    group: Group
    ports: Rule | None = None
    reordered: Rule | None = None
    layout: Step | None = None
    is_uniform: bool = False
    leads_to_heads: bool = False
    shape_input: int | None = None


_NONE = Channels(Group.NONE)


def channels(node: ir.Node) -> Channels:
    """What ``node`` does to channels; nothing is known of operators that are not in the table."""
    return OPERATORS.get(operator(node), _NONE)


def ports(
    node: ir.Node, known: Port, width: int, shapes: Shapes, group: Group = Group.GENERAL
) -> list[Port] | None:
    """Return every port of ``node`` in the stream of ``known``, itself included.

    Args:
        node: The operator.
        known: A port of ``node`` that carries the channel axis.
        width: Size of the channel axis.
        shapes: Shapes of the values.
        group: The changes of basis that have to commute with ``node``.

    Returns:
        The ports, or None if ``node`` does not commute with such a change of basis.

    Raises:
        OpensStreamError: As None, with a reason more telling than the operator's name.
    """
    own = channels(node)
    rule = own.ports if own.group >= group else None
    if group == Group.PERMUTATION and own.reordered is not None:
        rule = own.reordered
    return None if rule is None else rule(node, known, width, shapes)


CUTS = ("Split", "Slice", "Gather")
"""Operators that take some of the channels."""


def taken(node: ir.Node, axis: int, width: int, shapes: Shapes) -> list[Columns]:
    """Which of the channels along ``axis`` each output of a Split, Slice or Gather has.

    Nothing if that cannot be told, or if the outputs have not the axes of the input.
    """
    x, step = node.inputs[0], channels(node).layout
    rank = None if x is None else shapes.rank(x)
    if rank is None or step is None or not -rank <= axis < 0:
        return []
    start = Layout.along(axis, rank, width)
    found = list(step(node, start, shapes))
    is_told = len(found) == len(node.outputs) and all(each.axes == start.axes for each in found)
    return [each.columns for each in found] if is_told else []


_general = partial(Channels, Group.GENERAL)
_SUM = _general(commute.add, reordered=commute.elementwise)
_FACTOR = _general(commute.scale, reordered=commute.elementwise)
_ACTIVATION = Channels(Group.PERMUTATION, commute.elementwise)
_RECTIFIER = Channels(Group.DIAGONAL, reordered=commute.elementwise)
_ROTARY = Channels(Group.NONE, leads_to_heads=True)

OPERATORS: dict[str, Channels] = {
    # general: another basis of the channels comes out as it went in
    "Identity": _general(
        commute.same, layout=layout.identity, is_uniform=True, leads_to_heads=True
    ),
    "Neg": _general(commute.same),
    "Cast": _general(commute.cast, is_uniform=True, leads_to_heads=True),
    "CastLike": _general(commute.cast_like, is_uniform=True, leads_to_heads=True),
    "Dropout": _general(commute.dropout, is_uniform=True),
    "Add": _general(commute.add, reordered=commute.elementwise, leads_to_heads=True),
    "Sub": _SUM,
    "Sum": _SUM,
    "Mul": _FACTOR,
    "Div": _FACTOR,
    "Where": _general(commute.where),
    "Transpose": _general(commute.transpose, layout=layout.transpose, is_uniform=True),
    "Reshape": _general(
        commute.reshape,
        layout=layout.reshape,
        is_uniform=True,
        leads_to_heads=True,
        shape_input=1,
    ),
    "Flatten": _general(commute.reshape, is_uniform=True),
    "Squeeze": _general(commute.reshape, layout=layout.squeeze, is_uniform=True),
    "Unsqueeze": _general(commute.reshape, layout=layout.unsqueeze, is_uniform=True),
    "Expand": _general(commute.expand, is_uniform=True, shape_input=1),
    "Tile": _general(commute.expand, is_uniform=True),
    "Slice": _general(commute.cut, layout=layout.cut, is_uniform=True),
    "Split": _general(commute.split, layout=layout.split, is_uniform=True),
    "Gather": _general(commute.gather, layout=layout.gather, is_uniform=True),
    "GatherND": _general(commute.gather_nd, layout=layout.gather_nd, is_uniform=True),
    "Concat": _general(commute.concat),
    "Pad": _general(commute.pad),
    "ReduceSum": _general(commute.reduce),
    "ReduceMean": _general(commute.reduce, is_uniform=True),
    "AveragePool": _general(commute.pool),
    "GlobalAveragePool": _general(commute.pool, is_uniform=True),
    "Resize": _general(commute.resize, is_uniform=True),
    # permutation: each channel is convolved by itself; other convolutions are layers
    "Conv": Channels(Group.NONE, reordered=commute.depthwise),
    # diagonal: each channel may be scaled by a positive number
    "Relu": _RECTIFIER,
    "LeakyRelu": _RECTIFIER,
    # permutation: each channel is treated alike
    **dict.fromkeys(
        (
            *("Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"),
            *("Log", "Max", "Min", "Mish", "Pow", "Reciprocal", "Selu", "Sigmoid", "Softplus"),
            *("Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
            *(f"{MICROSOFT}::{name}" for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")),
        ),
        _ACTIVATION,
    ),
    # none: pairs of channels are turned by their position
    "RotaryEmbedding": _ROTARY,
    f"{MICROSOFT}::RotaryEmbedding": _ROTARY,
}
"""By operator, see :func:`onnx_fold.graph.operators.operator`."""
