"""Streams: values that share a channel axis, who writes them, who reads them, and what opens them.

A stream is *closed* when every writer and every reader is known and constant. A closed stream has a
free choice of basis (see :mod:`onnx_fold.algebra.basis`) and so carries ``d²`` weights too many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import unit_roundoff
from onnx_fold.graph.channels import Group, ports
from onnx_fold.graph.commute import OpensStreamError, Port, Rule
from onnx_fold.graph.constants import FLOATS, constant
from onnx_fold.graph.linear import Linear, described, find_linears
from onnx_fold.graph.operators import contrib, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.ends import Activations, ConstantWriter, End, Gain, Reader, Writer
from onnx_fold.streams.untouched import is_given, is_quantised


@dataclass(frozen=True)
class Opening:
    """Why a stream is open: a value, and the node or graph boundary that looks at its channels."""

    value: ir.Value
    node: ir.Node | None
    text: str

    @property
    def is_norm(self) -> bool:
        """Whether a norm reads the stream: an operator, or what exporters decompose one into."""
        return self.node is not None and _is_norm(self.node)

    def __str__(self) -> str:
        return f"'{self.value.name or '?'}' {self.text}"


_NORMS = frozenset(
    (
        *("GroupNormalization", "InstanceNormalization", "LayerNormalization"),
        *("LpNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
    )
) | contrib("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_STATISTICS = frozenset(("ReduceMean", "ReduceL2", "ReduceSumSquare"))
_TOWARDS_STATISTICS = frozenset(("Cast", "Mul", "Pow", "Sub"))


def _is_norm(node: ir.Node, hops: int = 3) -> bool:
    """Whether ``node`` is a norm, or leads to a mean within a few element-wise operators."""
    return operator(node) in _NORMS or _leads_to_statistics(node, hops)


def _leads_to_statistics(node: ir.Node, hops: int) -> bool:
    if operator(node) in _STATISTICS:
        return True
    if hops == 0 or operator(node) not in _TOWARDS_STATISTICS:
        return False
    return any(_leads_to_statistics(reader, hops - 1) for reader, _ in node.outputs[0].uses())


@dataclass(eq=False)
class Stream:
    """One stream of a graph.

    Attributes:
        width: Number of channels, ``d``.
        search: What found it.
        rule: Which operators lie inside.
        values: The values of the stream and the channel axis of each, from the end.
        writers: Linear layers whose output is in it.
        readers: Linear layers whose input is in it.
        constants: Constants that enter it.
        openings: What stands against a change of basis; empty if the stream is closed.
        shape_readers: Nodes that read only the shape of its values, or whose output is unused.
        group: The changes of basis that it is free in, if it is closed.
        gains: Values that hold the stream times a factor for each channel: value → the factors.
        carried: Constants that are added behind a gain, whose share has to go behind the readers.
        centred: Values whose channels add up to zero, but for gains and what is carried.
        keeps_ones: Whether a change of basis has to leave the vector of ones as it is.
        ignores_ones: Whether it is the same if any multiple of that vector is added to it.
    """

    width: int
    search: Search
    rule: Rule
    values: dict[ir.Value, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    constants: list[ConstantWriter] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    shape_readers: list[ir.Node] = field(default_factory=list)
    group: Group = Group.GENERAL
    gains: dict[ir.Value, Gain] = field(default_factory=dict)
    carried: list[ConstantWriter] = field(default_factory=list)
    centred: set[ir.Value] = field(default_factory=set)
    keeps_ones: bool = False
    ignores_ones: bool = False

    @property
    def shapes(self) -> Shapes:
        """Shapes of all values of the graph."""
        return self.search.shapes

    def rows_of(self, writer: Writer) -> Array | None:
        """Rows ``[n, in_features]`` that ``writer`` was seen to read, if any were recorded."""
        activations = self.search.activations
        if activations is None or writer.num_matrices > 1 or writer.x_axis is None:
            return None
        return activations.of(writer)

    @property
    def is_closed(self) -> bool:
        """Whether its basis is free."""
        return not self.openings

    def around(self, opening: Opening) -> tuple[list[str], list[str]]:
        """Labels of the layers in front of an opening and behind it."""
        upwards = _nearest([opening.value.producer()], self.search.linears, _producers)
        start = [] if opening.node is None else _readers(opening.node)
        downwards = _nearest(start, self.search.linears, _readers)
        before = [layer.label for layer in upwards] or [table.label for table in self.tables]
        return before, [layer.label for layer in downwards]

    @property
    def leads_to(self) -> list[str]:
        """Labels of the layers that come next behind its readers."""
        known = self.search.linears
        behind = (_nearest(_readers(each.node), known, _readers) for each in self.readers)
        return list(dict.fromkeys(layer.label for layers in behind for layer in layers))

    @property
    def tables(self) -> list[ConstantWriter]:
        """The constants that have rows: embeddings, positions."""
        return [writer for writer in self.constants if writer.is_table]

    @property
    def written_by(self) -> list[str]:
        """Labels of its tables and writers."""
        return [*(t.label for t in self.tables), *(layer.label for layer in self.writers)]

    @property
    def read_by(self) -> list[str]:
        """Labels of its readers."""
        return [reader.label for reader in self.readers]

    @property
    def labels(self) -> list[str]:
        """Labels of its tables, writers and readers, each once."""
        return list(dict.fromkeys([*self.written_by, *self.read_by]))

    @property
    def dtype(self) -> ir.DataType:
        """Narrowest type that its weights are stored in or that its values pass through."""
        found = {layer.weight.dtype for layer in (*self.writers, *self.readers)}
        found |= {dtype for value in self.values if (dtype := self.shapes.dtype(value)) in FLOATS}
        return min(found, key=_precision)

    @property
    def members(self) -> list[End]:
        """Everything that holds a weight of the stream."""
        return [*self.writers, *self.readers, *self.constants, *self.carried]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that write or read it, whose weights a fold would change."""
        nodes = {member.node for member in self.members}
        return nodes | {member.edge[0] for member in self.members}  # a Gather may hold the weight


def _precision(dtype: ir.DataType) -> float:
    """Sorts the types with the largest unit of rounding to the front."""
    return -unit_roundoff(dtype)


def find_streams(
    model: ir.Model, activations: Activations | None = None, shapes: Shapes | None = None
) -> list[Stream]:
    """The streams of the main graph that at least one linear layer writes or reads.

    ``activations`` are what the layers were seen to read, for passes that ask for it; ``shapes``
    are inferred unless they are given.
    """
    search = Search(model.graph, shapes or Shapes(model), activations)
    streams = []
    for linear in search.linears.values():
        for value, axis, width in (
            (linear.x, linear.x_axis, linear.in_features),
            (linear.y, linear.y_axis, linear.out_features),
        ):
            if axis is not None and value not in search.seen:
                streams.append(search.stream(value, axis, width))
    return streams


class Search:
    """Follows channel axes through one graph."""

    def __init__(
        self, graph: ir.Graph, shapes: Shapes, activations: Activations | None = None
    ) -> None:
        self.graph = graph
        self.shapes = shapes
        self.activations = activations
        self.linears = {linear.node: linear for linear in find_linears(graph, shapes)}
        self.order = {node: position for position, node in enumerate(graph)}
        self.seen: set[ir.Value] = set()
        for linear in self.linears.values():
            if linear.x_axis is not None:
                shapes.know(linear.x, linear.x_axis, linear.in_features)
            if linear.y_axis is not None:
                shapes.know(linear.y, linear.y_axis, linear.out_features)

    def stream(self, value: ir.Value, axis: int, width: int, rule: Rule = ports) -> Stream:
        """Collect everything that shares the channel axis ``axis`` of ``value``.

        ``rule`` says which operators lie inside: by default those that commute with any change of
        basis.
        """
        stream = Stream(width, self, rule)
        queue = [(value, axis)]
        while queue:
            value, axis = queue.pop()
            if value in stream.values:
                if stream.values[value] != axis:
                    open_stream(stream, value, "carries two channel axes")
                continue
            stream.values[value] = axis
            self.seen.add(value)
            rank = self.shapes.rank(value)
            if -axis > (1 if rank is None else rank):
                open_stream(stream, value, "is not known to have the channel axis")
            if isinstance(size := self.shapes.dim(value, axis), int) and size != width:
                open_stream(stream, value, f"is {size} wide, not {width}")
            self.shapes.know(value, axis, width)
            queue.extend(self._upstream(stream, value, axis))
            queue.extend(self._downstream(stream, value, axis))
        for layers in (stream.writers, stream.readers):
            layers.sort(key=lambda layer: self.position(layer.node))
        stream.constants.sort(key=lambda writer: (self.position(writer.node), writer.index))
        stream.openings.sort(key=lambda opening: (not opening.is_norm, opening.text))
        both = {layer.node for layer in stream.writers} & {layer.node for layer in stream.readers}
        for layer in stream.writers:
            if layer.node in both:
                open_stream(stream, layer.y, "is both read and written", layer.node)
        return stream

    def position(self, node: ir.Node) -> int:
        """Place in the graph; nodes that a fold has added since come last."""
        return self.order.get(node, len(self.order))

    def _upstream(
        self, stream: Stream, value: ir.Value, axis: int
    ) -> Iterator[tuple[ir.Value, int]]:
        node = value.producer()
        if value.is_initializer():
            open_stream(stream, value, "is also a graph input, so a caller can override it")
        elif value.is_graph_input() or node is None:
            open_stream(stream, value, "is a graph input")
        elif (linear := self.linears.get(node)) is not None:
            if linear.y_axis is None:
                open_stream(stream, value, "is written by", node)
            elif linear.y_axis != axis:
                open_stream(stream, value, "is written along another axis by", node)
            else:
                stream.writers.append(Writer(**vars(linear)))
                yield from self._bias(stream, linear)
        else:
            yield from self._across(
                stream, value, node, Port(True, value.index() or 0, axis), "written"
            )

    def _downstream(
        self, stream: Stream, value: ir.Value, axis: int
    ) -> Iterator[tuple[ir.Value, int]]:
        if value.is_graph_output():
            open_stream(stream, value, "is a graph output")
        for node, index in value.uses():
            linear = self.linears.get(node)
            if node.graph is not self.graph:
                open_stream(
                    stream, value, "is used inside the body of a control-flow operator, by", node
                )
            elif linear is None:
                if operator(node) in ("Shape", "Size") or _is_unused(node):
                    stream.shape_readers.append(node)
                else:
                    yield from self._across(stream, value, node, Port(False, index, axis), "read")
            elif linear.x is value and linear.x_axis == axis and (node, index) != linear.bias:
                stream.readers.append(Reader(**vars(linear)))
            elif (node, index) == linear.bias and axis == linear.y_axis == -1:
                yield linear.y, -1  # a sum in this stream
            elif linear.x_axis is None:
                open_stream(stream, value, "is read by", node)
            else:
                open_stream(stream, value, "is read along another axis by", node)

    def _bias(self, stream: Stream, linear: Linear) -> Iterator[tuple[ir.Value, int]]:
        if linear.bias is None:
            return
        node, index = linear.bias
        bias = node.inputs[index]
        assert bias is not None
        if (found := constant(bias)) is not None:
            stream.constants.append(ConstantWriter(node, index, found, -1, stream.width))
        elif linear.y_axis == -1 and self.shapes.dim(bias, -1) == stream.width:
            yield bias, -1
        else:
            open_stream(stream, linear.y, "adds a value that has no channel axis", linear.node)

    def _across(
        self, stream: Stream, value: ir.Value, node: ir.Node, known: Port, verb: str
    ) -> Iterator[tuple[ir.Value, int]]:
        """Follow the stream through ``node``, or open it there."""
        if -known.axis > (self.shapes.rank(value) or 1):
            return  # it has no such axis, and is open
        try:
            found = stream.rule(node, known, stream.width, self.shapes)
        except OpensStreamError as reason:
            open_stream(stream, value, f"is {verb} by", node, f", which {reason}")
            return
        if found is None:
            open_stream(stream, value, f"is {verb} by", node, _obstacle(node))
            return
        for port in found:
            if port.is_output:
                yield node.outputs[port.index], port.axis
                continue
            other = node.inputs[port.index]
            if other is None:
                continue
            if (held := constant(other)) is None:
                yield other, port.axis
            elif not any(writer.edge == (node, port.index) for writer in stream.constants):
                writer = ConstantWriter(node, port.index, held, port.axis, stream.width)
                stream.constants.append(writer)


def _obstacle(node: ir.Node) -> str:
    """What keeps ``node`` from being a linear layer or an operator inside the stream, if known."""
    if is_quantised(node):
        return ", whose weight is quantised"
    if is_given(node):
        return ", whose weight is a graph input"
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.is_graph_input():
            return f", which reads '{value.name}', an initializer that a caller can override"
    return ""


def _is_unused(node: ir.Node) -> bool:
    return not any(output.uses() or output.is_graph_output() for output in node.outputs)


def _producers(node: ir.Node) -> list[ir.Node | None]:
    return [value.producer() for value in node.inputs if value is not None]


def _readers(node: ir.Node) -> list[ir.Node | None]:
    return [reader for value in node.outputs for reader, _ in value.uses()]


def _nearest(
    start: Sequence[ir.Node | None],
    linears: Mapping[ir.Node, Linear],
    onward: Callable[[ir.Node], Sequence[ir.Node | None]],
    hops: int = 16,
) -> list[Linear]:
    """The layers that are the fewest steps away; those of one distance, and what reads alike."""
    level, seen = list(dict.fromkeys(start)), set(start)
    for _ in range(hops):
        found = [linears[node] for node in level if node is not None and node in linears]
        if found:
            return found
        following = (other for node in level if node is not None for other in onward(node))
        level = [node for node in dict.fromkeys(following) if node not in seen]
        seen.update(level)
    return []


def open_stream(
    stream: Stream, value: ir.Value, text: str, node: ir.Node | None = None, detail: str = ""
) -> None:
    """Note that ``value`` keeps ``stream`` from another basis, and why."""
    if node is not None:
        text = f"{text} {described(node)}{detail}"
    opening = Opening(value, node, text)
    if opening not in stream.openings:
        stream.openings.append(opening)
