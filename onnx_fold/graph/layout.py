"""Where the channels of a layer stand in the values behind it, and how operators move them.

Each step takes a node and the layout of what it reads, and yields the layout of each of its
outputs, or nothing if it cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.graph.constants import axes_of, constant, integers
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Dims, Shapes

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

    @classmethod
    def along(cls, axis: int, rank: int, width: int) -> Layout:
        """All channels in order, along one axis, from the end."""
        return cls((*range(rank + axis), CHANNELS, *range(rank + axis, rank - 1)), np.arange(width))

    @property
    def num_leading(self) -> int:
        """How many leading axes there are."""
        return sum(axis != CHANNELS for axis in self.axes)

    @property
    def is_in_order(self) -> bool:
        """Whether the leading axes come first and in their order, the channels behind them."""
        leading = self.num_leading
        return self.axes == (*range(leading), *(CHANNELS,) * (len(self.axes) - leading))

    @property
    def computed_shape(self) -> ComputedShape | None:
        """What the graph has to compute for it, once for all layouts that need the same."""
        if self.reshape is None or integers(self.reshape.inputs[1]) is not None:
            return None
        source = self.reshape.inputs[1]
        assert source is not None
        return source, self.num_leading, self.columns.shape


ComputedShape = tuple[ir.Value, int, tuple[int, ...]]
"""A shape that the graph computes, how many leading axes are taken from it, and the other ones."""


Step = Callable[[ir.Node, Layout, Shapes], Iterator[Layout]]
"""The layouts of a node's outputs from that of its input; none if it cannot be told."""


def identity(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Identity: nothing moves."""
    yield layout


def transpose(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Transpose: axes change places."""
    rank = len(layout.axes)
    perm = node.attributes.get_ints("perm") or tuple(reversed(range(rank)))
    if sorted(perm) != list(range(rank)):
        return
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


def reshape(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """The channels stay behind the leading axes: the last dimensions hold all of them."""
    target, leading = shapes(node.outputs[0]), layout.num_leading
    if target is None or not layout.is_in_order:
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


def squeeze(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Squeeze of channel axes of size 1."""
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


def unsqueeze(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Unsqueeze: the new axes count as channels."""
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


def split(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Split and SplitToSequence along channels."""
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


def cut(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Slice of channels."""
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


def gather(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
    """Gather of channels."""
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


def gather_nd(node: ir.Node, layout: Layout, shapes: Shapes) -> Iterator[Layout]:
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
