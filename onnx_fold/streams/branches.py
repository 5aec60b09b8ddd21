"""Branches: linear paths from one value to one sum, which are one linear layer.

``x W + s (x A) B = x (W + s A B)`` (LoRA, E. Hu et al., arXiv 2106.09685), and the blocks of
RepVGG, MobileOne, FastViT and RepViT in the form in which they are trained: convolutions of several
sizes, an identity, each with a BatchNorm. A BatchNorm beside a layer is a single path of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_fold.graph.constants import FLOATS, Constant, constant
from onnx_fold.graph.linear import Edge, label
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.maps import LinearMap, add, as_map, identity

__all__ = ["Branches", "Weight", "find_branches"]

_SUMS = ("Add", "Sub", "Sum")
_LAYERS = ("Conv", "Gemm", "MatMul", "Einsum", "com.microsoft::FusedMatMul")


@dataclass(frozen=True)
class Weight:
    """A constant on a path."""

    node: ir.Node
    index: int
    weight: Constant

    @property
    def edge(self) -> Edge:
        """The input that holds it."""
        return self.node, self.index

    @property
    def label(self) -> str:
        """The name a person knows it by."""
        return label(self.node, self.weight)


@dataclass(frozen=True, eq=False)
class _Path:
    """A way from ``source`` to an operand of a sum, nearest nodes last."""

    source: ir.Value
    map: LinearMap
    nodes: tuple[ir.Node, ...] = ()

    @property
    def has_layer(self) -> bool:
        return any(operator(node) in _LAYERS for node in self.nodes)


@dataclass(eq=False)
class Branches:
    """All paths from ``source`` to ``result``, and what they are together.

    Attributes:
        source: The value that the paths begin at.
        result: The value that they end in.
        map: What they compute.
        rest: Other operands of the sum, with the sign that each has.
        inside: The nodes that become one, that of ``result`` last.
        num_paths: How many paths there are.
        shapes: Shapes of all values of the graph.
    """

    source: ir.Value
    result: ir.Value
    map: LinearMap
    rest: list[tuple[float, ir.Value]]
    inside: list[ir.Node]
    num_paths: int
    shapes: Shapes
    members: list[Weight] = field(init=False)

    def __post_init__(self) -> None:
        self.members = [
            Weight(node, index, held)
            for node in self.inside
            for index, value in enumerate(node.inputs)
            if (held := constant(value)) is not None and held.dtype in FLOATS
        ]

    @property
    def is_closed(self) -> bool:
        """Whether it can be changed."""
        return True

    @property
    def width(self) -> int:
        """Channels of the result."""
        return self.map.out_features

    @property
    def dtype(self) -> ir.DataType:
        """The type that it is computed and stored in."""
        return self.shapes.dtype(self.result) or self.members[0].weight.dtype

    @property
    def layers(self) -> list[Weight]:
        """The weights of its layers, one each."""
        return [each for each in self.members if operator(each.node) in _LAYERS and each.index < 2]

    @property
    def labels(self) -> list[str]:
        """Labels of its layers and BatchNorms, each once."""
        named = [*_LAYERS, "BatchNormalization"]
        found = (each.label for each in self.members if operator(each.node) in named)
        return list(dict.fromkeys(found)) or [label(self.inside[-1])]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that a fold changes."""
        return set(self.inside)

    @property
    def values(self) -> list[ir.Value]:
        """The values that go."""
        return [value for node in self.inside for value in node.outputs]


def find_branches(graph: ir.Graph, shapes: Shapes) -> Iterator[Branches]:
    """The sums of linear paths of the main graph, and then the BatchNorms beside a layer."""
    nodes = [node for node in graph if len(node.outputs) == 1 and _begins(node)]
    for node in sorted(nodes, key=lambda node: operator(node) not in _SUMS):
        rank = shapes.rank(node.outputs[0])
        if not rank or shapes.dtype(node.outputs[0]) not in FLOATS:
            continue
        for axis in dict.fromkeys((1 - rank, -1) if rank > 1 else (-1,)):
            if (found := _branches(node, axis, graph, shapes)) is not None:
                yield found
                break


def _begins(node: ir.Node) -> bool:
    """Whether ``node`` is a sum that is no operand of another, or may meet a BatchNorm."""
    if operator(node) in _SUMS:
        user = _only_user(node.outputs[0])
        return user is None or operator(user) not in _SUMS
    return operator(node) in ("BatchNormalization", *_LAYERS)


def _only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads ``value``, if nothing else does."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return value.uses()[0].node


def _branches(node: ir.Node, axis: int, graph: ir.Graph, shapes: Shapes) -> Branches | None:
    if operator(node) not in _SUMS:
        return _single(node, axis, graph, shapes)
    operands, sums = _operands(node)
    paths = [_paths(value, axis, graph, shapes) for _, value in operands]
    chosen = _common(paths)
    if len(chosen) < 2 or not any(path.has_layer or _has_norm(path) for path in chosen.values()):
        return None
    maps = [path.map.scaled(operands[place][0]) for place, path in chosen.items()]
    total = add(maps)
    if total is None:
        return None
    rest = [operand for place, operand in enumerate(operands) if place not in chosen]
    inside = [each for path in chosen.values() for each in path.nodes]
    (source,) = {path.source for path in chosen.values()}
    found = Branches(source, node.outputs[0], total, rest, [*inside, *sums], len(chosen), shapes)
    return found if rest else _extended(found, axis, graph)


def _single(node: ir.Node, axis: int, graph: ir.Graph, shapes: Shapes) -> Branches | None:
    """A layer and the BatchNorm in front of it or behind it."""
    for path in _paths(node.outputs[0], axis, graph, shapes):
        if path.has_layer and _has_norm(path):
            return Branches(
                path.source, node.outputs[0], path.map, [], [*path.nodes], 1, shapes
            )
    return None


def _has_norm(path: _Path) -> bool:
    return any(operator(node) == "BatchNormalization" for node in path.nodes)


def _operands(root: ir.Node) -> tuple[list[tuple[float, ir.Value]], list[ir.Node]]:
    """The operands of a sum of sums, with their signs, and its nodes, ``root`` last."""
    operands: list[tuple[float, ir.Value]] = []
    sums: list[ir.Node] = []
    stack = [(1.0, root)]
    while stack:
        sign, node = stack.pop()
        sums.append(node)
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            own = -sign if operator(node) == "Sub" and index == 1 else sign
            producer = value.producer()
            inner = producer is not None and operator(producer) in _SUMS
            if inner and producer is not None and _only_user(value) is node:
                stack.append((own, producer))
            else:
                operands.append((own, value))
    return operands, sums[::-1]


def _paths(value: ir.Value, axis: int, graph: ir.Graph, shapes: Shapes) -> list[_Path]:
    """The paths that end in ``value``, the shortest first: what each inner value goes into goes."""
    width = shapes.dim(value, axis)
    if not isinstance(width, int) or constant(value) is not None:
        return []
    found = [_Path(value, identity(axis, width))]
    while True:
        last = found[-1]
        node = last.source.producer()
        if node is None or node.graph is not graph or _only_user(last.source) is None:
            return found
        step = as_map(node, axis, shapes)
        joined = None if step is None else step[1].then(last.map)
        if step is None or joined is None:
            return found
        found.append(_Path(step[0], joined, (node, *last.nodes)))


def _common(paths: Sequence[Sequence[_Path]]) -> dict[int, _Path]:
    """The paths from the value that most operands come from, the nearest of those, by operand."""
    ends: dict[ir.Value, dict[int, _Path]] = {}
    for place, ways in enumerate(paths):
        for path in ways:
            ends.setdefault(path.source, {})[place] = path

    def most(ways: dict[int, _Path]) -> tuple[int, int]:
        return len(ways), -sum(len(path.nodes) for path in ways.values())

    return max(ends.values(), key=most, default={})


def _extended(found: Branches, axis: int, graph: ir.Graph) -> Branches:
    """``found`` and the gains, numbers, biases and BatchNorms right behind its sum."""
    while (node := _only_user(found.result)) is not None and node.graph is graph:
        step = as_map(node, axis, found.shapes)
        if step is None or not step[1].is_gain or step[0] is not found.result:
            break
        joined = found.map.then(step[1])
        if joined is None:
            break
        inside = [*found.inside, node]
        found = Branches(
            found.source, node.outputs[0], joined, [], inside, found.num_paths, found.shapes
        )
    return found
