"""Fused projections: one layer whose output channels are several things, as in a fused QKV.

Layouts differ: contiguous thirds (GPT-2), three parts in each head (NeoX), a group of query heads
with its key and value (Falcon), a new axis in front (``nn.MultiheadAttention``, timm). So none is
known by name: the numbers of the channels are followed through Reshape, Transpose, Split, Slice and
Gather to the places where a value is only one of those things, and from there any layout can be
written back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_fold.graph.channels import channels
from onnx_fold.graph.constants import constant
from onnx_fold.graph.layout import CHANNELS, Columns, Layout
from onnx_fold.graph.layout import split as layout_split
from onnx_fold.graph.linear import Edge, Linear
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.heads import roles


@dataclass(frozen=True)
class Part:
    """One of the things that a fused projection makes.

    Attributes:
        value: The value that is only this.
        role: ``"q"``, ``"k"``, ``"v"``, or None.
        layout: Which channels it is, and how they lie.
    """

    value: ir.Value
    role: str | None
    layout: Layout

    @property
    def columns(self) -> Columns:
        """Its channels, flat, in the order in which the value has them."""
        return self.layout.columns.reshape(-1)

    @property
    def name(self) -> str:
        """``[first:last]`` if the channels are contiguous, else its role or value."""
        first, size = int(self.columns[0]), len(self.columns)
        if np.array_equal(self.columns, np.arange(first, first + size)):
            return f"[{first}:{first + size}]"
        return f"[{self.role or self.value.name}]"


@dataclass(frozen=True)
class Fused:
    """A linear layer whose output is taken apart.

    Attributes:
        linear: The layer.
        biases: Inputs on the way that add a vector to all its channels.
        parts: What it is taken apart into; no channel is in two of them.
        nodes: The operators between the layer and the parts.
        shape_readers: Shape operators that read what is between for more than to take it apart.
    """

    linear: Linear
    biases: tuple[Edge, ...]
    parts: tuple[Part, ...]
    nodes: tuple[ir.Node, ...]
    shape_readers: tuple[ir.Node, ...]


@dataclass
class _Trace:
    shapes: Shapes
    biases: list[Edge] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    shape_readers: list[ir.Node] = field(default_factory=list)


def fused(linear: Linear, shapes: Shapes) -> Fused | None:
    """Read ``linear`` as a fused projection, if its output is taken apart and nothing else."""
    rank = shapes.rank(linear.y)
    if not linear.is_plain or rank is None or len(roles(linear.y)) == 1:
        return None
    trace = _Trace(shapes)
    if linear.bias is not None:
        if not _is_vector(linear.node.inputs[linear.bias[1]], linear.out_features, rank):
            return None
        trace.biases.append(linear.bias)
    start = Layout((*range(rank - 1), CHANNELS), np.arange(linear.out_features))
    if not _follow(linear.y, start, linear.out_features, trace) or len(trace.parts) < 2:
        return None
    if trace.shape_readers and any(part.layout.computed_shape for part in trace.parts):
        return None  # a shape that is still needed may be read from what goes
    used = np.concatenate([part.columns for part in trace.parts])
    if len(np.unique(used)) != len(used):
        return None
    return Fused(
        linear,
        tuple(trace.biases),
        tuple(trace.parts),
        tuple(trace.nodes),
        tuple(node for node in trace.shape_readers if not serves(node, trace.nodes)),
    )


def serves(node: ir.Node, readers: Sequence[ir.Node]) -> bool:
    """Whether what ``node`` makes goes to ``readers`` only."""
    queue, seen = [node], {node}
    while queue:
        outputs = queue.pop().outputs
        if any(output.is_graph_output() for output in outputs):
            return False
        users = {user for output in outputs for user, _ in output.uses()}
        new = users - seen - set(readers)
        if any(not user.outputs for user in new):
            return False
        seen |= new
        queue.extend(new)
    return True


def _follow(start: ir.Value, layout: Layout, width: int, trace: _Trace) -> bool:
    """Collect the parts below ``start``; False if something else reads what is not yet a part."""
    queue = [(start, layout)]
    while queue:
        value, layout = queue.pop()
        found = roles(value) if layout.columns.size < width else frozenset()
        if layout.columns.size < width and len(found) <= 1:
            trace.parts.append(Part(value, next(iter(found), None), layout))
            continue
        if value.is_graph_output() or not value.uses():
            return False
        onward: list[tuple[ir.Value, Layout]] = []
        for node, index in value.uses():
            if node.graph is not value.graph:
                return False  # in the body of a control-flow operator
            if operator(node) == "Shape":
                trace.shape_readers.append(node)
                continue
            behind = _behind(node, index, layout, width, trace)
            if not behind:
                return False
            onward += behind
        queue += reversed(onward)
    return True


def _behind(
    node: ir.Node, index: int, layout: Layout, width: int, trace: _Trace
) -> list[tuple[ir.Value, Layout]]:
    """The values behind ``node``, with their layouts; none if it cannot be told."""
    if operator(node) == "SplitToSequence":
        return _pieces(node, layout, trace)
    if operator(node) == "Add" and layout.columns.size == width:
        is_last = layout.columns.ndim == 1 and layout.axes[-1] == CHANNELS
        if not is_last or not _is_vector(node.inputs[1 - index], width, len(layout.axes)):
            return []
        trace.biases.append((node, 1 - index))
        layouts = [layout]
    else:
        step = channels(node).layout if index == 0 else None
        layouts = list(step(node, layout, trace.shapes)) if step is not None else []
    if len(layouts) != len(node.outputs):
        return []
    trace.nodes.append(node)
    return list(zip(node.outputs, layouts, strict=True))


def _pieces(split: ir.Node, layout: Layout, trace: _Trace) -> list[tuple[ir.Value, Layout]]:
    """Behind SplitToSequence, whose pieces are taken out one by one by SequenceAt."""
    pieces = list(layout_split(split, layout, trace.shapes)) if len(split.inputs) > 1 else []
    users = [node for node, _ in split.outputs[0].uses()]
    found: list[tuple[ir.Value, Layout]] = []
    for node in users if pieces else ():
        at = trace.shapes.integers(node.inputs[1]) if operator(node) == "SequenceAt" else None
        if at is None or node.graph is not split.graph or not -len(pieces) <= at[0] < len(pieces):
            return []
        found.append((node.outputs[0], pieces[at[0]]))
    if found:
        trace.nodes += [split, *users]
    return found


def _is_vector(value: ir.Value | None, width: int, rank: int) -> bool:
    """Whether ``value`` adds a number to each channel of a value of that rank."""
    held = constant(value)
    is_vector = held is not None and held.is_vector and held.size == width
    return is_vector and len(held.shape) <= rank if held is not None else False
