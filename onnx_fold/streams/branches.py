"""Branches: linear paths from one value to one sum, which are one linear layer.

``x W + s (x A) B = x (W + s A B)`` (LoRA, E. Hu et al., arXiv 2106.09685), and the blocks of
RepVGG, MobileOne, FastViT and RepViT in the form in which they are trained: convolutions of several
sizes, an identity, each with a BatchNorm. A BatchNorm beside a layer is a single path of two, and
so is a layer between operators that move its channels and put them back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from onnx_fold.algebra.expression import scale
from onnx_fold.graph.channels import CUTS, Group, channels, ports
from onnx_fold.graph.commute import OpensStreamError, Port
from onnx_fold.graph.constants import FLOATS, constant, scalar
from onnx_fold.graph.linear import label
from onnx_fold.graph.operators import only_user, operator
from onnx_fold.graph.shapes import Dims, Shapes
from onnx_fold.streams.ends import Weight
from onnx_fold.streams.maps import LinearMap, add, as_map, as_selection, as_vector, identity

__all__ = ["Branches", "find_branches"]

_SUMS = ("Add", "Sub", "Sum")
_BESIDE = ("BatchNormalization", "Transpose")
_GAINS = ("Div", "Mul")
"""Beside a convolution: ONNX Runtime leaves gains that are one number, or come first. Behind a
product: one number for each channel, as LayerScale; in front of it they may be a norm's."""
_LAYOUTS = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_MAX_SIZES = 32
"""Operators that compute a size from a shape, at most."""
_BLOCK = 16
"""Channels that ONNX Runtime's convolutions of images take at a time."""
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "com.microsoft::FusedMatMul")


@dataclass(frozen=True, eq=False)
class _Path:
    """A way from ``source`` to an operand of a sum, nearest nodes last, and what these are."""

    source: ir.Value
    map: LinearMap
    nodes: tuple[ir.Node, ...] = ()
    operators: frozenset[str] = frozenset()

    @classmethod
    def through(cls, source: ir.Value, map: LinearMap, *nodes: ir.Node) -> _Path:  # noqa: A002
        """The way through ``nodes``."""
        return cls(source, map, nodes, frozenset(operator(node) for node in nodes))

    @property
    def has_layer(self) -> bool:
        return not self.operators.isdisjoint(_LAYERS)

    def then(self, other: _Path) -> _Path | None:
        """This way, and ``other`` behind it."""
        joined = self.map.then(other.map)
        if joined is None:
            return None
        nodes, operators = (*self.nodes, *other.nodes), self.operators | other.operators
        return _Path(self.source, joined, nodes, operators)


@dataclass(eq=False)
class Branches:
    """All paths from ``source`` to ``result``, and what they are together.

    Attributes:
        source: The value that the paths begin at.
        result: The value that they end in.
        map: What they compute.
        rest: Other operands of the sum, with the sign that each has.
        inside: The nodes that become one.
        shapes: Shapes of all values of the graph.
        later: Values that are computed in ``result`` already, where only the layout changes between
            that and them, and what their readers read instead.
        between: The values between ``result`` and them.
        is_closed: Whether it can be changed.
        group: The changes of basis that pass through it.
    """

    is_closed: ClassVar[bool] = True
    group: ClassVar[Group] = Group.GENERAL

    source: ir.Value
    result: ir.Value
    map: LinearMap
    rest: list[tuple[float, ir.Value]]
    inside: list[ir.Node]
    shapes: Shapes
    later: dict[ir.Value, ir.Value] = field(default_factory=dict)
    between: list[ir.Value] = field(default_factory=list)
    members: list[Weight] = field(init=False)

    def __post_init__(self) -> None:
        self.members = [
            Weight(node, index, held)
            for node in self.inside
            for index, value in enumerate(node.inputs)
            if (held := constant(value)) is not None and held.dtype in FLOATS
        ]

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
        """The weights of its layers and the gains of its BatchNorms, one each."""
        named = [*_LAYERS, "BatchNormalization"]
        weights = (each for each in self.members if operator(each.node) in named)
        return [each for each in weights if each.index < 2]

    @property
    def labels(self) -> list[str]:
        """Labels of its layers and BatchNorms, each once."""
        found = [each.label for each in self.layers]
        return list(dict.fromkeys(found)) or [label(self.inside[-1])]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that a fold changes."""
        return set(self.inside)

    @property
    def values(self) -> list[ir.Value]:
        """The values that go, or come to mean something else."""
        return [*(value for node in self.inside for value in node.outputs), *self.between]


def find_branches(graph: ir.Graph, shapes: Shapes) -> Iterator[Branches]:
    """The sums of linear paths of the main graph, and then what lies beside a layer.

    Of operators that move channels the last come first: their paths are the longest.
    """
    nodes = [node for node in graph if len(node.outputs) == 1 and _begins(node)]
    sums = [node for node in nodes if operator(node) in _SUMS]
    layouts = [node for node in nodes if operator(node) in _LAYOUTS]
    layers = [node for node in nodes if operator(node) not in (*_SUMS, *_LAYOUTS)]
    for node in (*sums, *layers, *reversed(layouts)):
        rank = shapes.rank(node.outputs[0])
        if not rank or shapes.dtype(node.outputs[0]) not in FLOATS:
            continue
        for axis in dict.fromkeys((1 - rank, -1) if rank > 1 else (-1,)):
            if (found := _branches(node, axis, graph, shapes)) is not None:
                yield found
                break


def _begins(node: ir.Node) -> bool:
    """Whether ``node`` is a sum that is no operand of another, or may end a path with a layer."""
    if operator(node) in _SUMS:
        user = only_user(node.outputs[0])
        return user is None or operator(user) not in _SUMS
    return operator(node) in ("BatchNormalization", *_GAINS, *_LAYERS, *_LAYOUTS)


def _branches(node: ir.Node, axis: int, graph: ir.Graph, shapes: Shapes) -> Branches | None:
    if operator(node) not in _SUMS:
        return _single(node, axis, graph, shapes)
    operands, sums = _operands(node)
    inside = _inside(sums, [value for _, value in operands], axis, graph, shapes)
    paths = [_paths(value, axis, shapes, inside) for _, value in operands]
    chosen = _in_largest(_common(paths))
    if len(chosen) < 2:
        chosen = _convolution(paths)
    if not any(path.nodes for path in chosen.values()):
        return None
    maps = [path.map.scaled(operands[place][0]) for place, path in chosen.items()]
    total = add(maps)
    if total is None:
        return None
    rest = [operand for place, operand in enumerate(operands) if place not in chosen]
    first = operands[next(iter(chosen))][1]
    others = len(rest)
    total, rest = _shifted(total, rest, shapes.rank(first) or 0)
    has_gain = any(not path.operators.isdisjoint(_GAINS) for path in chosen.values())
    if len(chosen) == 1 and not (0 < len(rest) < others or (has_gain and not rest)):
        return None
    nodes = dict.fromkeys(each for path in chosen.values() for each in path.nodes)
    (source,) = {path.source for path in chosen.values()}
    found = Branches(source, node.outputs[0], total, rest, [*nodes, *sums], shapes)
    if not found.members:
        return None
    return found if rest else _extended(found, axis, graph)


def _convolution(paths: Sequence[Sequence[_Path]]) -> dict[int, _Path]:
    """The nearest convolution among the operands: it may take a bias that is added later."""
    for place, ways in enumerate(paths):
        for path in ways:
            if path.has_layer and path.map.axis < -1:
                return {place: path}
    return {}


def _shifted(
    total: LinearMap, rest: Sequence[tuple[float, ir.Value]], rank: int
) -> tuple[LinearMap, list[tuple[float, ir.Value]]]:
    """``total`` with those operands in its bias that are one number a channel; and the others."""
    left = []
    for sign, value in rest:
        held = constant(value)
        numbers = None if held is None or held.dtype not in FLOATS else held.wide()
        place = total.axis, total.out_features, rank
        vector = None if numbers is None else as_vector(numbers, *place)
        if vector is None:
            left.append((sign, value))
        else:
            total = total.shifted(scale(vector, sign))
    return total, left


def _single(node: ir.Node, axis: int, graph: ir.Graph, shapes: Shapes) -> Branches | None:
    """A layer and what is beside it: a BatchNorm, moves of channels, or gains of a convolution."""
    x = as_map(node, axis, shapes)
    inside = {node} if x is None else _inside([node], [x[0]], axis, graph, shapes)
    for path in _paths(node.outputs[0], axis, shapes, inside):
        beside = (*_BESIDE, *_GAINS) if path.map.axis < -1 else _BESIDE
        is_beside = not path.operators.isdisjoint(beside)
        if path.has_layer and (is_beside or _is_layer_scale(node)):
            return Branches(path.source, node.outputs[0], path.map, [], [*path.nodes], shapes)
    return _behind_layout(node, axis, graph, shapes)


def _is_layer_scale(node: ir.Node) -> bool:
    """Whether ``node`` multiplies by more than one number: ONNX Runtime fuses one by itself."""
    return operator(node) in _GAINS and all(scalar(value) is None for value in node.inputs)


def _behind_layout(node: ir.Node, axis: int, graph: ir.Graph, shapes: Shapes) -> Branches | None:
    """A layer, operators that only move its channels, and a BatchNorm behind them."""
    norm = as_map(node, axis, shapes) if operator(node) == "BatchNormalization" else None
    if norm is None:
        return None
    x, gain = norm
    value, between = x, [node.outputs[0]]
    while (producer := value.producer()) is not None and producer.graph is graph:
        users = {user for user, _ in value.uses() if operator(user) not in ("Shape", "Size")}
        if value.is_graph_output() or len(users) != 1:
            return None
        layer = as_map(producer, axis, shapes) if operator(producer) in _LAYERS else None
        if layer is not None:
            total = layer[1].then(gain)
            if total is None:
                return None
            found = Branches(layer[0], value, total, [], [producer, node], shapes)
            found.later, found.between = {node.outputs[0]: x}, between
            return _put_back(found, node)
        if not channels(producer).is_uniform or len(producer.outputs) > 1:
            return None
        front = _in_front(producer, axis, gain.in_features, shapes)
        if front is None:
            return None
        between.append(value)
        value, axis = front
    return None


def _put_back(found: Branches, norm: ir.Node) -> Branches:
    """``found``, without a Reshape behind ``norm`` that only undoes the one in front of it."""
    user, behind = only_user(norm.outputs[0]), found.between[1:]
    if user is None or operator(user) != "Reshape" or not behind:
        return found
    shape = user.inputs[1].producer() if user.inputs[1] is not None else None
    same = shape is not None and operator(shape) == "Shape" and not shape.attributes
    same = same and shape is not None and shape.inputs[0] is found.result
    named = found.shapes.named()
    dims = named(user.outputs[0])
    if not same and (dims is None or None in dims or dims != named(found.result)):
        return found
    gone = [node for value in behind if (node := value.producer()) is not None]
    if same and shape is not None and only_user(shape.outputs[0]) is user:
        gone.append(shape)
    found.inside += [*gone, user]
    found.later = {user.outputs[0]: found.result}
    return found


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
            if inner and producer is not None and only_user(value) is node:
                stack.append((own, producer))
            else:
                operands.append((own, value))
    return operands, sums[::-1]


def _inside(
    ends: Sequence[ir.Node],
    values: Sequence[ir.Value],
    axis: int,
    graph: ir.Graph,
    shapes: Shapes,
) -> set[ir.Node]:
    """The ``ends`` and the linear nodes in front of them whose results nothing else reads."""
    inside, queue = set(ends), list(values)
    while queue:
        value = queue.pop()
        node = value.producer()
        if node is None or node.graph is not graph or node in inside:
            continue
        if any(output.is_graph_output() for output in node.outputs):
            continue
        own = {user for output in node.outputs for user, _ in output.uses()} - inside
        if all(operator(user) in ("Shape", "Size") and _serves(user, inside) for user in own):
            way = _way(value, node, axis, shapes)
            if way is not None:
                inside.update(way.nodes)
                queue.append(way.source)
    return inside


def _serves(node: ir.Node, inside: Collection[ir.Node]) -> bool:
    """Whether what ``node`` makes is needed by those ``inside`` alone, whatever is made of it."""
    queue, seen = [node], {node}
    while queue:
        for value in queue.pop().outputs:
            if value.is_graph_output():
                return False
            users = {user for user, _ in value.uses()} - seen.union(inside)
            seen |= users
            queue.extend(users)
        if len(seen) > _MAX_SIZES:
            return False
    return True


def _ends_gelu(node: ir.Node, hops: int = 3) -> bool:
    """Whether ``node`` is the last factor of a Gelu, which ONNX Runtime knows by all of them."""
    makers = [maker for value in node.inputs if value and (maker := value.producer())]
    if any(operator(maker) in ("Erf", "Tanh") for maker in makers):
        return True
    between = [maker for maker in makers if operator(maker) in ("Add", "Mul")]
    return hops > 1 and any(_ends_gelu(maker, hops - 1) for maker in between)


def _way(value: ir.Value, node: ir.Node, axis: int, shapes: Shapes) -> _Path | None:
    """What ``node`` makes ``value`` by, if it is linear; or by the nodes in front of it too."""
    if operator(node) in _GAINS and _ends_gelu(node):
        return None
    step = as_selection(value, axis, shapes) or as_map(node, axis, shapes)
    return _laid_out(node, axis, shapes) if step is None else _Path.through(*step, node)


def _paths(value: ir.Value, axis: int, shapes: Shapes, inside: Collection[ir.Node]) -> list[_Path]:
    """The paths that end in ``value`` and whose nodes are ``inside``, the shortest first.

    Channels are taken out in front of a layer only: alone they would be a matrix more.
    """
    width = shapes.dim(value, axis)
    if not isinstance(width, int) or constant(value) is not None:
        return []
    found = [_Path(value, identity(axis, width))]
    while (node := found[-1].source.producer()) is not None and node in inside:
        if operator(node) in CUTS and not found[-1].has_layer:
            break
        way = _way(found[-1].source, node, axis, shapes)
        longer = None if way is None else way.then(found[-1])
        if longer is None:
            break
        found.append(longer)
    return found


def _laid_out(node: ir.Node, axis: int, shapes: Shapes) -> _Path | None:
    """A layer between operators that only move channels; ``node`` puts them back.

    So exporters write a Gemm of more than two axes, and models a layer that reads the pixels of an
    image one by one. It is the same at every position, wherever the channels are.
    """
    value, at, nodes = node.outputs[0], axis, list[ir.Node]()
    width, rank = shapes.dim(value, axis), shapes.rank(value)
    if operator(node) not in _LAYOUTS or not isinstance(width, int) or not rank or -axis > rank:
        return None
    total, has_layer = identity(axis, width), False
    while (front := value.producer()) is not None and (not nodes or only_user(value) is not None):
        nodes.insert(0, front)
        if operator(front) not in _LAYOUTS:
            step = as_map(front, at, shapes)
            if step is None or not step[1].is_pointwise:
                return None
            value, joined = step[0], step[1].moved(axis).then(total)
            if joined is None:
                return None
            total = joined
            if operator(front) in _LAYERS and not has_layer:
                has_layer, shapes = True, shapes.named()
        elif (moved := _moved(front, at, total.in_features, shapes)) is None:
            return None
        else:
            value, at = moved
            positions = _positions(value, axis, shapes) if has_layer and at == axis else None
            if positions is not None and positions == _positions(node.outputs[0], axis, shapes):
                pays = axis == -1 or _pays_as_convolution(value, total, nodes, shapes)
                return _Path.through(value, total, *nodes) if pays else None
    return None


def _pays_as_convolution(
    value: ir.Value, total: LinearMap, path: Sequence[ir.Node], shapes: Shapes
) -> bool:
    """Whether a runtime of the model has a kernel for it in the type of ``value``, and a fast one.

    Convolutions of images take channels in blocks; with less than one they are no faster.
    """
    dtype, graph = shapes.dtype(value), path[-1].graph
    alike = (each for each in graph or () if shapes.dtype(each.outputs[0]) == dtype)
    can_run = dtype == ir.DataType.FLOAT or any(operator(each) == "Conv" for each in alike)
    is_narrow = min(total.in_features, total.out_features) < _BLOCK
    return can_run and not (is_narrow and total.axis < -2)


def _moved(node: ir.Node, axis: int, width: int, shapes: Shapes) -> tuple[ir.Value, int] | None:
    """What a layout reads, and where the channels are there, if positions stay in order."""
    front = _in_front(node, axis, width, shapes)
    if front is not None and operator(node) == "Transpose":
        x, at = front
        rank = shapes.rank(x) or 0
        others = [each for each in node.attributes.get_ints("perm", ()) if each - rank != at]
        if others != sorted(others) or not others:
            return None
    return front


def _in_front(node: ir.Node, axis: int, width: int, shapes: Shapes) -> tuple[ir.Value, int] | None:
    """What ``node`` reads, and where the channels are there; they may come from there alone."""
    x = node.inputs[0]
    try:
        crossed = ports(node, Port(True, 0, axis), width, shapes) or []
    except OpensStreamError:
        return None
    front = [port for port in crossed if not port.is_output]
    if x is None or len(front) != 1 or front[0].index != 0:
        return None
    return x, front[0].axis


def _positions(value: ir.Value, axis: int, shapes: Shapes) -> Dims | None:
    """The sizes of ``value`` but for its channels; None if one is not known."""
    dims = shapes(value)
    if dims is None or None in dims or -axis > len(dims):
        return None
    at = axis + len(dims)
    return (*dims[:at], *dims[at + 1 :])


def _common(paths: Sequence[Sequence[_Path]]) -> dict[int, _Path]:
    """The paths from the value that most operands come from, the nearest of those, by operand."""
    ends: dict[ir.Value, dict[int, _Path]] = {}
    for place, ways in enumerate(paths):
        for path in ways:
            ends.setdefault(path.source, {})[place] = path

    def most(ways: dict[int, _Path]) -> tuple[int, int]:
        return len(ways), -sum(len(path.nodes) for path in ways.values())

    return max(ends.values(), key=most, default={})


def _in_largest(ways: dict[int, _Path]) -> dict[int, _Path]:
    """Of several paths those whose windows lie in the largest; all, if it would be alone.

    What holds windows that cross, such as 1x3 and 3x1, has more positions than both.
    """
    order = sorted(ways, key=lambda place: -math.prod(ways[place].map.kernel.shape))
    kept: dict[int, _Path] = {}
    size = 0
    for place in order:
        total = add([path.map for path in (*kept.values(), ways[place])])
        own = math.prod(ways[place].map.kernel.shape)
        if total is not None and math.prod(total.kernel.shape) <= size + own:
            kept[place] = ways[place]
            size = math.prod(total.kernel.shape)
    return {place: ways[place] for place in ways if place in kept} if len(kept) > 1 else ways


def _extended(found: Branches, axis: int, graph: ir.Graph) -> Branches:
    """``found`` and the gains, numbers, biases and BatchNorms right behind its sum."""
    while (node := only_user(found.result)) is not None and node.graph is graph:
        step = as_map(node, axis, found.shapes)
        if step is None or not step[1].is_gain or step[0] is not found.result:
            break
        joined = found.map.then(step[1])
        if joined is None:
            break
        inside = [*found.inside, node]
        found = Branches(found.source, node.outputs[0], joined, [], inside, found.shapes)
    return found
