"""Fused projections: one layer whose output channels are several things, as in a fused QKV.

Layouts differ: contiguous thirds (GPT-2), three parts in each head (NeoX), a group of query heads
with its key and value (Falcon), a new axis in front (``nn.MultiheadAttention``, timm). So none is
known by name: the numbers of the channels are followed through Reshape, Transpose, Split, Slice and
Gather to the places where a value is only one of those things, and from there any layout can be
written back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.graph.constants import axes_of, constant, integers
from onnx_fold.graph.edit import new_integers, new_node
from onnx_fold.graph.linear import Edge, Linear
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Dims, Shapes
from onnx_fold.streams.heads import roles

Columns = npt.NDArray[np.intp]
"""Numbers of output channels of a layer."""

CHANNELS = -1
"""Marks an axis that holds channels, among the numbers of leading axes."""


@dataclass(frozen=True)
class Layout:
    """Where the channels of a layer stand in a value further down.

    Attributes:
        axes: For each axis of the value, the leading axis (batch, sequence) that it is, counted
            from 0, or :data:`CHANNELS`.
        columns: The channel at each place, with an axis for each of the channel axes.
        reshape: The Reshape that cut the leading axes anew; None if they are those of the layer.
    """

    axes: tuple[int, ...]
    columns: Columns
    reshape: ir.Node | None = None

    @property
    def num_leading(self) -> int:
        """How many leading axes there are."""
        return sum(axis != CHANNELS for axis in self.axes)

    @property
    def _is_in_order(self) -> bool:
        """Whether the leading axes come first and in their order, the channels behind them."""
        leading = self.num_leading
        return self.axes == (*range(leading), *(CHANNELS,) * (len(self.axes) - leading))

    @property
    def num_nodes(self) -> int:
        """Operators that :meth:`build` makes, but for those that compute a shape."""
        cut = self.reshape is not None or self.columns.ndim != 1
        return cut + (not self._is_in_order)

    @property
    def computed_shape(self) -> ComputedShape | None:
        """What two more operators compute, once for all layouts that need the same."""
        if self.reshape is None or integers(self.reshape.inputs[1]) is not None:
            return None
        source = self.reshape.inputs[1]
        assert source is not None
        return source, self.num_leading, self.columns.shape

    def build(
        self,
        graph: ir.Graph,
        before: ir.Node,
        value: ir.Value,
        shapes: Mapping[ComputedShape, ir.Value],
    ) -> ir.Value:
        """Lay out ``value`` (``[leading axes of the layer..., columns.size]``) in this way.

        Args:
            graph: Where to put new nodes.
            before: The node in front of which they come.
            value: What to lay out.
            shapes: What :func:`compute_shapes` made, for this layout among others.
        """
        leading = self.num_leading
        if self.reshape is not None or self.columns.ndim != 1:
            computed = self.computed_shape
            shape = self._held_shape(graph, before) if computed is None else shapes[computed]
            value = new_node(graph, before, "Reshape", [value, shape]).outputs[0]
        if not self._is_in_order:
            channel = iter(range(leading, len(self.axes)))
            perm = [next(channel) if axis == CHANNELS else axis for axis in self.axes]
            value = new_node(graph, before, "Transpose", [value], perm=perm).outputs[0]
        return value

    def _held_shape(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        given = None if self.reshape is None else integers(self.reshape.inputs[1])
        leading = (0,) * self.num_leading if given is None else given[: self.num_leading]
        name = f"{before.name or before.op_type}_shape"
        return new_integers(graph, [*leading, *self.columns.shape], name)


ComputedShape = tuple[ir.Value, int, tuple[int, ...]]
"""A shape that the graph computes, how many leading axes are taken from it, and the other ones."""


def compute_shapes(graph: ir.Graph, layouts: Sequence[Layout]) -> dict[ComputedShape, ir.Value]:
    """Make the shapes that ``layouts`` need and the graph computes, each once.

    Args:
        graph: Where to put the nodes that compute them.
        layouts: The layouts; those whose Reshape comes first in the graph come first.
    """
    made: dict[ComputedShape, ir.Value] = {}
    for layout in layouts:
        needed, before = layout.computed_shape, layout.reshape
        if needed is None or before is None or needed in made:
            continue
        source, leading, tail = needed
        name = before.name or before.op_type
        start, stop, heads = (
            new_integers(graph, numbers, f"{name}_{suffix}")
            for numbers, suffix in (([0], "start"), ([leading], "stop"), (tail, "heads"))
        )
        part = new_node(graph, before, "Slice", [source, start, stop]).outputs[0]
        made[needed] = new_node(graph, before, "Concat", [part, heads], axis=0).outputs[0]
    return made


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
        tuple(node for node in trace.shape_readers if not _serves(node, trace.nodes)),
    )


def _serves(node: ir.Node, readers: Sequence[ir.Node]) -> bool:
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
        step = _STEPS.get(operator(node)) if index == 0 else None
        layouts = list(step(node, layout, trace.shapes)) if step is not None else []
    if len(layouts) != len(node.outputs):
        return []
    trace.nodes.append(node)
    return list(zip(node.outputs, layouts, strict=True))


def _pieces(split: ir.Node, layout: Layout, trace: _Trace) -> list[tuple[ir.Value, Layout]]:
    """Behind SplitToSequence, whose pieces are taken out one by one by SequenceAt."""
    pieces = list(_split(split, layout, trace.shapes)) if len(split.inputs) > 1 else []
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


Step = Callable[[ir.Node, Layout, Shapes], Iterator[Layout]]
"""The layouts of a node's outputs from that of its input; none if it cannot be told."""


def _identity(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    yield layout


def _transpose(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    rank = len(layout.axes)
    perm = node.attributes.get_ints("perm") or tuple(reversed(range(rank)))
    places = _places(layout)
    yield replace(
        layout,
        axes=tuple(layout.axes[axis] for axis in perm),
        columns=layout.columns.transpose([places[axis] for axis in perm if axis in places]),
    )


def _places(layout: Layout) -> dict[int, int]:
    """Channel axes of the value → axes of ``columns``."""
    channel = [axis for axis, lead in enumerate(layout.axes) if lead == CHANNELS]
    return {axis: place for place, axis in enumerate(channel)}


def _reshape(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """The channels stay behind the leading axes: the last dimensions hold all of them."""
    target, leading = shapes(node.outputs[0]), layout.num_leading
    if target is None or not layout._is_in_order:
        return
    source = node.inputs[0]
    assert source is not None
    dims = shapes(source)
    is_kept = dims is not None and _agree(dims[:leading], target[:leading])
    tail = target[leading:] if is_kept else ()
    sizes = _solved(tail, layout.columns.size)
    if sizes is not None:
        yield replace(
            layout,
            axes=(*range(leading), *(CHANNELS,) * len(sizes)),
            columns=layout.columns.reshape(sizes),
        )
        return
    for count in range(1, len(target)):  # the leading axes are cut in another way
        tail = target[count:]
        known = [size for size in tail if isinstance(size, int)]
        if len(known) < len(tail) or math.prod(known) != layout.columns.size:
            continue
        given = integers(node.inputs[1])
        if given is not None and (0 in given[:count] or -1 in given[count:]):
            return
        yield Layout((*range(count), *(CHANNELS,) * len(tail)), layout.columns.reshape(known), node)
        return


def _agree(dims: Dims, target: Dims) -> bool:
    """Whether dimensions are the same, by number or by symbol."""
    return len(dims) == len(target) and all(
        a == b and a is not None for a, b in zip(dims, target, strict=True)
    )


def _solved(dims: Dims, size: int) -> list[int] | None:
    """``dims`` as numbers whose product is ``size``; one of them may be unknown."""
    known = math.prod(dim for dim in dims if isinstance(dim, int))
    unknown = sum(not isinstance(dim, int) for dim in dims)
    if not dims or unknown > 1 or known == 0 or size % known or (not unknown and known != size):
        return None
    return [dim if isinstance(dim, int) else size // known for dim in dims]


def _squeeze(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    axes = axes_of(node, shapes.integers)
    places = _places(layout)
    if axes is None:
        return
    gone = {axis % len(layout.axes) for axis in axes}
    if not all(axis in places and layout.columns.shape[places[axis]] == 1 for axis in gone):
        return
    yield replace(
        layout,
        axes=tuple(lead for axis, lead in enumerate(layout.axes) if axis not in gone),
        columns=layout.columns.squeeze(tuple(places[axis] for axis in gone)),
    )


def _unsqueeze(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    axes = axes_of(node, shapes.integers)
    if axes is None:
        return
    rank = len(layout.axes) + len(axes)
    new = {axis % rank for axis in axes}
    old = iter(layout.axes)
    after = tuple(CHANNELS if axis in new else next(old) for axis in range(rank))
    places = _places(replace(layout, axes=after))
    columns = np.expand_dims(layout.columns, tuple(places[axis] for axis in new))
    yield replace(layout, axes=after, columns=columns)


def _split(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    place = _places(layout).get(node.attributes.get_int("axis", 0) % len(layout.axes))
    if place is None:
        return
    size, count = layout.columns.shape[place], len(node.outputs)
    given: Sequence[int] = node.attributes.get_ints("split") or ()
    if not given and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = shapes.integers(node.inputs[1]) or ()
        if not given:
            return
    is_sequence = operator(node) == "SplitToSequence"
    if is_sequence and len(given) == 1:
        count, given = -(-size // given[0]), ()
    each = -(-size // count)
    sizes = given or [min(each, size - each * index) for index in range(count)]
    if sum(sizes) == size and min(sizes) > 0 and (is_sequence or len(sizes) == count):
        for columns in np.split(layout.columns, np.cumsum(sizes)[:-1], axis=place):
            yield replace(layout, columns=columns)


def _slice(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    places = _places(layout)
    bounds = [shapes.integers(value) for value in node.inputs[1:]]
    bounds += [None] * (4 - len(bounds))
    starts, ends, axes, steps = bounds
    if starts is None or ends is None or axes is None or (steps is None and len(node.inputs) > 4):
        return
    cut = [slice(None)] * layout.columns.ndim
    for position, axis in enumerate(axes):
        place = places.get(axis % len(layout.axes))
        if place is None:
            return
        cut[place] = slice(starts[position], ends[position], steps[position] if steps else 1)
    columns = layout.columns[tuple(cut)]
    if columns.size:
        yield replace(layout, columns=columns)


def _gather(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    indices = constant(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(layout.axes)
    place = _places(layout).get(axis)
    if (
        indices is None
        or place is None
        or indices.dtype not in (ir.DataType.INT64, ir.DataType.INT32)
    ):
        return
    yield _taken(layout, indices.numpy(), axis, place)


def _gather_nd(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """GatherND that counts one axis, the first: a Gather."""
    indices, place = constant(node.inputs[1]), _places(layout).get(0)
    if indices is None or place is None or indices.shape[-1:] != (1,):
        return
    if node.attributes.get_int("batch_dims", 0) == 0:
        yield _taken(layout, indices.numpy()[..., 0], 0, place)


def _taken(layout: Layout, indices: Columns, axis: int, place: int) -> Layout:
    new = (CHANNELS,) * indices.ndim
    axes = (*layout.axes[:axis], *new, *layout.axes[axis + 1 :])
    return replace(layout, axes=axes, columns=np.take(layout.columns, indices, axis=place))


_STEPS: dict[str, Step] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
}
