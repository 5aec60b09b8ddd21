"""Channels of several streams side by side, and the one layer that reads them; and the mirror.

``[x, y] F = x F₁ + y F₂``: for each of the streams the layer is a reader like any other. A stream
whose channels go apart is ``[x, y]``, and layers read ``x`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnx_fold.graph.channels import CUTS, Group, channels, ports
from onnx_fold.graph.commute import Port
from onnx_fold.graph.constants import FLOATS
from onnx_fold.graph.layout import Columns, Layout
from onnx_fold.graph.linear import Linear, as_linear, label
from onnx_fold.graph.operators import only_user, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.ends import End, Reader
from onnx_fold.streams.fused import serves
from onnx_fold.streams.stream import Search, Stream

__all__ = ["Divided", "Joined", "find_divided", "find_joined"]


@dataclass(frozen=True, eq=False)
class Part:
    """One operand of the Concat.

    Attributes:
        value: The operand.
        rows: The rows of the reader that belong to it.
        stream: Its stream, if that is closed but for the Concat; else None.
    """

    value: ir.Value
    rows: range
    stream: Stream | None


@dataclass(frozen=True, eq=False)
class Joined:
    """A Concat of channels that one linear layer reads.

    Attributes:
        concat: The Concat.
        reader: The layer, of one position.
        parts: The operands, in order.
        search: What found it.
        is_closed: Whether it can be changed.
        group: The changes of basis that pass through it.
    """

    is_closed: ClassVar[bool] = True
    group: ClassVar[Group] = Group.GENERAL

    concat: ir.Node
    reader: Reader
    parts: list[Part]
    search: Search

    @property
    def streams(self) -> list[Stream]:
        """Those of its streams that are closed but for the Concat."""
        return [part.stream for part in self.parts if part.stream is not None]

    @property
    def width(self) -> int:
        """Channels side by side."""
        return self.reader.in_features

    @property
    def dtype(self) -> ir.DataType:
        """Narrowest type of its streams and of the layer."""
        own = self.search.shapes.dtype(self.reader.y) or self.reader.weight.dtype
        return min([own, *(stream.dtype for stream in self.streams)], key=lambda d: d.bitwidth)

    @property
    def members(self) -> list[End]:
        """Everything that holds a weight of them."""
        return [member for stream in self.streams for member in stream.members] + [self.reader]

    @property
    def labels(self) -> list[str]:
        """Labels of what writes its streams, each once."""
        found = [name for stream in self.streams for name in stream.written_by]
        return list(dict.fromkeys(found)) or [label(self.concat)]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that a fold changes."""
        inside = {node for stream in self.streams for node in stream.nodes}
        return {self.concat, self.reader.node, *inside}

    @property
    def values(self) -> list[ir.Value]:
        """The values that go, or get another basis."""
        inside = [value for stream in self.streams for value in stream.values]
        return [*inside, self.concat.outputs[0], self.reader.y]


def find_joined(graph: ir.Graph, shapes: Shapes) -> Iterator[Joined]:
    """The Concats of channels of the main graph that one layer reads and nothing else."""
    pairs = [(node, as_linear(user, shapes)) for node, user in _read_once(graph)]
    readers = {node: reader for node, reader in pairs if reader and _is_one_matrix(reader)}
    if not readers:
        return  # streams are not looked for
    search = Search(graph, shapes)
    for concat, reader in readers.items():
        axis, rank = reader.x_axis, shapes.rank(reader.x)
        own = concat.attributes.get_int("axis", 0)
        if reader.x is not concat.outputs[0] or axis is None or rank is None:
            continue
        if (own if own < 0 else own - rank) != axis:
            continue
        parts = list(_parts(concat, axis, search))
        if sum(len(part.rows) for part in parts) != reader.in_features:
            continue
        if any(part.stream is not None for part in parts):
            yield Joined(concat, Reader(**vars(reader)), parts, search)


def _read_once(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """The Concats of ``graph`` that one of its nodes reads once, and that node."""
    for node in graph:
        user = only_user(node.outputs[0]) if operator(node) == "Concat" else None
        if user is not None and user.graph is graph:
            yield node, user


def _is_one_matrix(reader: Linear) -> bool:
    return (
        reader.num_matrices == 1
        and reader.x_axis == reader.y_axis
        and reader.keeps_layout
        and reader.identity_shape is None
        and reader.edge[0] is reader.node
        and reader.weight.dtype in FLOATS
        and (reader.x_axis == -1 or operator(reader.node) == "Conv")
    )


def _parts(concat: ir.Node, axis: int, search: Search) -> Iterator[Part]:
    start = 0
    for value in concat.inputs:
        size = None if value is None else search.shapes.dim(value, axis)
        if value is None or not isinstance(size, int):
            return
        stream = search.stream(value, axis, size)
        is_own = [opening.node is concat for opening in stream.openings] == [True]
        is_own = is_own and list(concat.inputs).count(value) == 1
        is_own = is_own and bool(stream.writers) and not stream.readers and not stream.tables
        is_own = is_own and all(writer.num_matrices == 1 for writer in stream.writers)
        yield Part(value, range(start, start + size), stream if is_own else None)
        start += size


@dataclass(frozen=True, eq=False)
class Piece:
    """Some of the channels of a stream, taken out by a Split, a Slice or a Gather.

    Attributes:
        value: The value that is only this.
        layout: Which channels of the stream it has, along one axis.
    """

    value: ir.Value
    layout: Layout

    @property
    def columns(self) -> Columns:
        """The channels of the stream that it has, in its order."""
        return self.layout.columns


@dataclass(frozen=True, eq=False)
class Divided:
    """A stream whose channels go apart, and the layers that read one of the pieces.

    Attributes:
        value: The value of which the pieces are taken.
        stream: Its stream, which is closed but for that.
        pieces: The pieces, in order; no channel is in two of them.
        place: Which of them the layers read.
        behind: The stream of that piece, which is closed but for where it is taken.
        is_closed: Whether it can be changed.
        group: The changes of basis that pass through it.
    """

    is_closed: ClassVar[bool] = True
    group: ClassVar[Group] = Group.GENERAL

    value: ir.Value
    stream: Stream
    pieces: list[Piece]
    place: int
    behind: Stream

    @property
    def piece(self) -> Piece:
        """What the layers read."""
        return self.pieces[self.place]

    @property
    def cuts(self) -> list[ir.Node]:
        """What takes the pieces, in the order of the graph."""
        found = {node for each in self.pieces if (node := each.value.producer()) is not None}
        return sorted(found, key=self.stream.search.position)

    @property
    def width(self) -> int:
        """Channels of the piece."""
        return self.behind.width

    @property
    def dtype(self) -> ir.DataType:
        """Narrowest type of both streams."""
        return min(self.stream.dtype, self.behind.dtype, key=lambda dtype: dtype.bitwidth)

    @property
    def members(self) -> list[End]:
        """Everything that holds a weight of them."""
        return [*self.stream.members, *self.behind.members]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that a fold changes."""
        return {*self.cuts, *self.stream.nodes, *self.behind.nodes}

    @property
    def values(self) -> list[ir.Value]:
        """The values that go, or get another basis."""
        read = [reader.y for reader in self.behind.readers]
        return [*self.stream.values, *self.behind.values, *read]


def find_divided(graph: ir.Graph, shapes: Shapes) -> Iterator[Divided]:
    """The streams of the main graph whose channels go apart, by the pieces that layers read."""
    if not any(operator(node) in CUTS for node in graph):
        return  # streams are not looked for
    search = Search(graph, shapes)
    for linear in search.linears.values():
        if linear.y_axis is None or linear.y in search.seen:
            continue
        stream = search.stream(linear.y, linear.y_axis, linear.out_features)
        places = {opening.value for opening in stream.openings}
        if len(places) != 1 or stream.readers or stream.tables:
            continue
        (value,) = places
        axis = stream.values[value]
        pieces, between = _pieces(value, stream)
        gone = {each for each in stream.shape_readers if operator(each) == "Shape"}
        gone = {each for each in gone if serves(each, between)}
        others = [each for each in stream.shape_readers if each not in gone]
        stream = replace(stream, shape_readers=others)
        for place, piece in enumerate(pieces):
            rule = partial(_apart, cut=piece.value.producer())
            behind = search.stream(piece.value, axis, len(piece.columns), rule)
            is_own = _is_read_alone(behind, piece) and not behind.nodes & stream.nodes
            if is_own and all(_is_in_place(each, value, axis, shapes) for each in pieces):
                yield Divided(value, stream, pieces, place, behind)


def _pieces(value: ir.Value, stream: Stream) -> tuple[list[Piece], list[ir.Node]]:
    """What is taken of ``value``, and what takes it; nothing if pieces are not known or overlap.

    The channels are followed until a value has some of them, and all other axes as they were.
    """
    cuts = [opening.node for opening in stream.openings]
    shapes, rank = stream.shapes, stream.shapes.rank(value)
    if rank is None:
        return [], []
    cuts.sort(key=lambda cut: -1 if cut is None else stream.search.position(cut))
    start = Layout.along(stream.values[value], rank, stream.width)
    queue, found, nodes = [(cut, start) for cut in cuts], list[Piece](), list[ir.Node]()
    while queue:
        node, layout = queue.pop(0)
        step = None if node is None else channels(node).layout
        if node is None or step is None or node.graph is not value.graph:
            return [], []
        behind = list(step(node, layout, shapes))
        if len(behind) != len(node.outputs):
            return [], []
        nodes.append(node)
        for output, moved in zip(node.outputs, behind, strict=True):
            if moved.axes == start.axes and moved.columns.size < stream.width:
                found.append(Piece(output, moved))
            elif output.is_graph_output() or not output.uses():
                return [], []
            else:
                queue += [(None if index else user, moved) for user, index in output.uses()]
    used = np.concatenate([piece.columns for piece in found])
    return (found, nodes) if len(np.unique(used)) == len(used) else ([], [])


def _is_in_place(piece: Piece, value: ir.Value, axis: int, shapes: Shapes) -> bool:
    """Whether ``piece`` has the positions of ``value``, also where a Reshape cut them anew."""
    if piece.layout.reshape is None:
        return True
    rows, whole = shapes.named()(piece.value), shapes.named()(value)
    if rows is None or whole is None or None in rows:
        return False
    at = axis + len(whole)
    return (*rows[:at], *rows[at + 1 :]) == (*whole[:at], *whole[at + 1 :])


def _apart(
    node: ir.Node, known: Port, width: int, shapes: Shapes, cut: ir.Node | None
) -> list[Port] | None:
    """What lies in the stream of a piece: not what takes it, nor what is in front of that."""
    return None if node is cut else ports(node, known, width, shapes)


def _is_read_alone(behind: Stream, piece: Piece) -> bool:
    """Whether layers of one position read ``piece``, and nothing but where it is taken is open."""
    is_own = [opening.node for opening in behind.openings] == [piece.value.producer()]
    is_own = is_own and bool(behind.readers) and not behind.writers and not behind.tables
    return is_own and all(
        reader.num_matrices == 1 and reader.keeps_layout and reader.identity_shape is None
        for reader in behind.readers
    )
