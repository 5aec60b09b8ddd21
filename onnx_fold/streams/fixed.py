"""What constants alone decide: values that are the same in every run, and layers that read rows.

``m / ‖W + s (A B)ᵀ‖`` (S. Liu et al., "DoRA", arXiv 2402.09353) is one number a channel once the
adapter is trained, but exporters leave its formula in the graph.

A learned query that is repeated for each input, or the row of an embedding that a token picks, goes
through norms, gains, activations and layers by itself: each row of the constant becomes one other
row, whoever reads it (N. Graef, "Transformer tricks: Precomputing the first layer", arXiv
2402.13388).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.exact import exact, values
from onnx_fold.algebra.expression import (
    Expression,
    FoldedTensor,
    ImpliedTensor,
    OnRows,
    Sum,
    broadcast,
    cast,
    product,
    reshape,
    scale,
)
from onnx_fold.algebra.precision import product_dtype
from onnx_fold.graph import commute
from onnx_fold.graph.channels import Group, channels, ports
from onnx_fold.graph.commute import OpensStreamError, Port
from onnx_fold.graph.constants import FLOATS, Constant, axes_of, constant, integers
from onnx_fold.graph.linear import Linear, as_product, label
from onnx_fold.graph.operators import STANDARD, only_user, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.graph.widen import widen
from onnx_fold.streams.ends import Weight
from onnx_fold.streams.stream import Search

__all__ = ["RowLayer", "Rows", "find_row_layers", "fixed"]

MAX_NODES = 32
"""Operators by which such a value is computed."""

MAX_SIZE = 2**16
"""Elements that it has."""

_RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform")
) | {"RandomUniformLike", "Dropout"}


def fixed(value: ir.Value, shapes: Shapes) -> Array | None:
    """What ``value`` is in every run, float64, if it is computed from constants; else None."""
    if constant(value) is not None or value.producer() is None:
        return None
    if value not in shapes.fixed:
        shapes.fixed[value] = _computed(value, shapes)
    return shapes.fixed[value]


def _computed(value: ir.Value, shapes: Shapes) -> Array | None:
    dims = shapes(value)
    sizes = [size for size in dims or () if isinstance(size, int)]
    is_small = dims is not None and len(sizes) == len(dims) and np.prod(sizes) <= MAX_SIZE
    if not is_small or shapes.dtype(value) not in FLOATS or not _is_fixed(value):
        return None
    node = value.producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    graph = ir.convenience.extract(node.graph, [], [value.name or ""])
    for each in graph.initializers.values():
        if isinstance(each.const_value, FoldedTensor):
            numbers = values(exact(each.const_value.expression))
            each.const_value = ir.tensor(np.ascontiguousarray(numbers))
            each.type = ir.TensorType(ir.DataType.DOUBLE)  # the old one is the model's own
    model = ir.Model(graph, ir_version=10)
    try:
        wide = ir.to_proto(ir.external_data.load_to_model(widen(model, ir.DataType.DOUBLE)))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = ReferenceEvaluator(wide).run(None, {})
    except Exception:  # whatever the NumPy code of an operator raises
        return None
    return np.asarray(found, np.float64) if np.isfinite(found).all() else None


def _is_fixed(value: ir.Value) -> bool:
    """Whether everything that ``value`` is computed from is constant."""
    queue, seen = [value], set[ir.Node]()
    while queue:
        current = queue.pop()
        if constant(current) is not None:
            continue
        node = current.producer()
        if node is None:
            return False
        if node in seen:
            continue
        seen.add(node)
        kinds = {attribute.type for attribute in node.attributes.values()}
        bodies = kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
        if node.domain not in STANDARD or operator(node) in _RANDOM or bodies:
            return False
        if len(seen) > MAX_NODES or not node.inputs:
            return False
        queue.extend(each for each in node.inputs if each is not None)
    return True


# --- Rows of a constant --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """A value that holds rows of a constant, or what these have become, each by itself.

    Attributes:
        value: The value.
        source: What holds the rows in the beginning.
        numbers: What each of them has become: ``[n, d]``.
        moves: The operators that copy them and put them in their places, in order, and the channels
            that each puts out.
        steps: The operators that change them, in order.
        layers: Those of them that are linear layers.
        obstacle: Why there is no such constant, though all is decided by which rows are picked.
    """

    value: ir.Value
    source: Weight
    numbers: Expression
    moves: tuple[tuple[ir.Node, int], ...] = ()
    steps: tuple[ir.Node, ...] = ()
    layers: tuple[Linear, ...] = ()
    obstacle: str = ""

    @property
    def is_one(self) -> bool:
        """Whether all rows are the same."""
        return self.numbers.shape[0] == 1

    @property
    def is_picked(self) -> bool:
        """Whether rows are picked at run time, as those of an embedding are."""
        picks = (node for node, _ in self.moves if operator(node) == "Gather")
        return any(constant(node.inputs[1]) is None for node in picks)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in which the source holds as many rows, of the channels of ``numbers``."""
        return (*self.source.weight.shape[:-1], self.numbers.shape[1])

    def behind(self, node: ir.Node, numbers: Expression, *others: Rows) -> Rows:
        """What ``node`` makes of them."""
        steps = dict.fromkeys(step for each in (self, *others) for step in each.steps)
        layers = dict.fromkeys(layer for each in (self, *others) for layer in each.layers)
        value = node.outputs[0]
        return replace(self, value=value, numbers=numbers, steps=(*steps, node), layers=(*layers,))


@dataclass(frozen=True, eq=False)
class RowLayer:
    """A linear layer that reads rows of a constant, with what changes its result row by row.

    Attributes:
        layer: The layer.
        rows: What its result is, or what is made of that.
        inside: The nodes from the layer to there.
        search: What found it.
        is_closed: Whether it can be changed.
        group: The changes of basis that pass through it.
    """

    is_closed: ClassVar[bool] = True
    group: ClassVar[Group] = Group.GENERAL

    layer: Linear
    rows: Rows
    inside: list[ir.Node]
    search: Search

    @property
    def width(self) -> int:
        """Channels of the result."""
        return self.rows.numbers.shape[1]

    @property
    def dtype(self) -> ir.DataType:
        """The type of the result."""
        return self.search.shapes.dtype(self.rows.value) or self.layer.weight.dtype

    @property
    def members(self) -> list[Weight]:
        """Everything that holds a weight on the way from the constant to the result."""
        edges = [(node, i) for node in self.rows.steps for i in range(len(node.inputs))]
        held = [(node, i, constant(node.inputs[i])) for node, i in edges]
        found = [Weight(node, i, each) for node, i, each in held if each and each.dtype in FLOATS]
        return [self.rows.source, *(each for each in found if each.edge != self.rows.source.edge)]

    @property
    def labels(self) -> list[str]:
        """Labels of the layers that go, each once."""
        return list(dict.fromkeys(layer.label for layer in self.rows.layers))

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that a fold changes."""
        return set(self.inside)

    @property
    def values(self) -> list[ir.Value]:
        """The values that go."""
        return [node.outputs[0] for node in self.inside]


def find_row_layers(graph: ir.Graph, shapes: Shapes, *, is_picked: bool) -> Iterator[RowLayer]:
    """The layers of the main graph that read rows of a constant, the deepest first.

    Args:
        graph: The graph.
        shapes: Shapes of its values.
        is_picked: Whether the rows may be picked at run time.
    """
    search = Search(graph, shapes)  # layers say how many channels there are
    known: dict[ir.Value, Rows] = {}
    for node in graph:
        rows = _behind(node, known, shapes)
        if rows is not None and (is_picked or not rows.is_picked):
            known[node.outputs[0]] = rows
    found = [rows for rows in known.values() if rows.layers and _is_layer(rows)]
    for rows in sorted(found, key=lambda rows: -len(rows.layers)):
        inside = [rows.steps[-1]]
        while (user := only_user(rows.value)) is not None and user.outputs[0] in known:
            following = known[user.outputs[0]]
            if len(following.layers) > len(rows.layers) or following.moves != rows.moves:
                break
            rows = following
            inside.append(user)
        yield RowLayer(rows.layers[-1], rows, inside, search)


def _is_layer(rows: Rows) -> bool:
    """Whether they are what a layer writes; a gain that is a product for the time is none."""
    layer = rows.layers[-1]
    return layer.y is rows.value and not isinstance(layer.weight.tensor, ImpliedTensor)


_COPIES = frozenset(
    (
        *("Expand", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Tile", "Transpose"),
        "Unsqueeze",
    )
)
"""Operators that copy whole rows, or move them."""

_SAME = frozenset(("Cast", "Dropout", "Identity"))

_NORMS = frozenset(("LayerNormalization", "LpNormalization", "RMSNormalization"))
"""Operators that look at each row by itself if their axis is the last."""

_REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "Max", "Mean", "Min", "Sum", "SumSquare")
)


def _behind(node: ir.Node, known: dict[ir.Value, Rows], shapes: Shapes) -> Rows | None:
    """The rows that ``node`` makes, if it makes some; a constant is rows where it is read."""
    if len(node.outputs) != 1 or node.domain not in STANDARD or not node.inputs:
        return None
    if constant(node.outputs[0]) is not None:
        return None
    if operator(node) == "ConstantOfShape":
        return _repeated(node, shapes)
    if operator(node) in _COPIES:
        return _moved(node, known, shapes)
    layer = as_product(node, shapes)
    if layer is not None:
        return _multiplied(layer, known, shapes)
    if operator(node) in _SAME:
        return _unchanged(node, known, shapes)
    return _changed(node, known, shapes)


def _rows(node: ir.Node, index: int, known: dict[ir.Value, Rows], shapes: Shapes) -> Rows | None:
    """What an input of ``node`` is, if that is rows: a constant with a channel axis is too."""
    value = node.inputs[index]
    if value is None or value in known:
        return None if value is None else known[value]
    held = constant(value)
    if held is None or held.dtype not in FLOATS or not held.size:
        return None
    width = held.shape[-1] if held.shape else 1
    numbers = reshape(held.wide(product_dtype(held.dtype)), (-1, width))
    return Rows(value, Weight(node, index, held), numbers)


def _repeated(node: ir.Node, shapes: Shapes) -> Rows | None:
    """One number, in every channel of every position."""
    result, attribute = node.outputs[0], node.attributes.get("value")
    tensor = ir.tensor(np.zeros(1, np.float32)) if attribute is None else attribute.as_tensor()
    width, dtype = shapes.dim(result, -1), tensor.dtype
    if not isinstance(width, int) or not shapes.rank(result) or dtype not in FLOATS:
        return None
    held = Constant(result, result, tensor, dtype, (0,))
    numbers = broadcast(held.wide(product_dtype(dtype)), (1, width))
    return Rows(result, Weight(node, 0, held), numbers, ((node, width),))


def _moved(node: ir.Node, known: dict[ir.Value, Rows], shapes: Shapes) -> Rows | None:
    rows, result = _rows(node, 0, known, shapes), node.outputs[0]
    if rows is None or not shapes.rank(result):
        return None
    name, numbers = operator(node), rows.numbers
    width = numbers.shape[1]
    shapes.know(rows.value, -1, width)
    if (name == "Expand" and width > 1) or (name == "Tile" and _last(node.inputs[1]) == 1):
        shapes.know(result, -1, width)
    behind = shapes.dim(result, -1)
    if not isinstance(behind, int):
        return None
    if name == "Expand" and width == 1 < behind and rows.is_one and not rows.steps:
        numbers = broadcast(numbers, (1, behind))
    elif not _keeps_rows(node, width, shapes):
        return None
    return replace(rows, value=result, numbers=numbers, moves=(*rows.moves, (node, behind)))


def _keeps_rows(node: ir.Node, width: int, shapes: Shapes) -> bool:
    """Whether the last axis, ``width`` long, is the last one behind ``node`` too."""
    try:
        found = ports(node, Port(False, 0, -1), width, shapes)
    except OpensStreamError:
        return False
    return found is not None and Port(True, 0, -1) in found


def _last(value: ir.Value | None) -> int | None:
    """The last of the integers that ``value`` holds, if it is known."""
    node = None if value is None else value.producer()
    if node is not None and operator(node) == "Concat":
        value = node.inputs[-1]
    found = integers(value)
    return found[-1] if found else None


def _unchanged(node: ir.Node, known: dict[ir.Value, Rows], shapes: Shapes) -> Rows | None:
    x = node.inputs[0]
    rows = None if x is None else known.get(x)
    if rows is None or shapes.dtype(node.outputs[0]) not in FLOATS:
        return None
    return rows.behind(node, rows.numbers)


def _multiplied(layer: Linear, known: dict[ir.Value, Rows], shapes: Shapes) -> Rows | None:
    node = layer.node
    if not layer.is_plain or layer.edge[0] is not node or layer.identity_shape is not None:
        return None
    if operator(node) == "Conv":
        return None
    rows = _rows(node, list(node.inputs).index(layer.x), known, shapes)
    if rows is None or rows.numbers.shape[1] != layer.in_features:
        return None
    numbers = product(rows.numbers, layer.unpack(layer.weight.wide(rows.numbers.dtype)))
    if layer.bias is not None:
        held = constant(node.inputs[layer.bias[1]])
        if held is None or held.size != layer.out_features:
            return None
        bias = scale(reshape(held.wide(numbers.dtype), (1, -1)), layer.beta)
        numbers = Sum(numbers, bias)
    found = rows.behind(node, numbers)
    return replace(found, layers=(*found.layers, layer))


def _changed(node: ir.Node, known: dict[ir.Value, Rows], shapes: Shapes) -> Rows | None:
    """What an operator makes of rows that looks at each of them by itself."""
    result = node.outputs[0]
    rank = shapes.rank(result)
    if not any(value in known for value in node.inputs if value is not None):
        return None
    if rank is None or rank < 2 or not _is_by_row(node, rank, shapes):
        return None
    rows: dict[int, Rows] = {}
    held: dict[int, Constant] = {}
    for index, value in enumerate(node.inputs):
        each = constant(value)
        if each is not None and (each.dtype not in FLOATS or _is_vector(each, rank)):
            held[index] = each
        elif value is not None and (found := _rows(node, index, known, shapes)) is not None:
            rows[index] = found
        elif value is not None:
            return None
    width = 1
    if operator(node) not in _REDUCTIONS:
        width = max(each.numbers.shape[1] for each in rows.values())
        sizes = (each.shape[-1] for each in held.values() if each.shape and each.dtype in FLOATS)
        width = max(width, *sizes, 1)
    shapes.know(result, -1, width)
    several = [each for each in rows.values() if not each.is_one] or [*rows.values()]
    several.sort(key=lambda each: not each.is_picked)
    for first in several:
        if shapes.rank(first.value) == rank and not first.obstacle:
            together = {i for i, each in rows.items() if _is_together(each, first)}
            if all(i in together or _repeats(rows[i], first, shapes) for i in rows):
                numbers = _numbers(node, first, rows, held, together, rank, width)
                return first.behind(node, numbers, *rows.values())
    first = several[0]
    obstacle = next((each.obstacle for each in several if each.obstacle), "")
    if not obstacle:
        names = " and ".join(f"'{name}'" for name in dict.fromkeys(e.source.label for e in several))
        obstacle = f"{label(node)} mixes rows of {names}, which are picked each for itself"
    return replace(first.behind(node, first.numbers, *rows.values()), obstacle=obstacle)


def _is_by_row(node: ir.Node, rank: int, shapes: Shapes) -> bool:
    """Whether ``node`` makes each row of its result of the same rows of what it reads."""
    own, last = channels(node), (-1, rank - 1)
    if commute.elementwise in (own.ports, own.reordered):
        return True
    if operator(node) in _NORMS:
        return node.attributes.get_int("axis", -1) in last
    axes = axes_of(node, shapes.integers) or ()
    keeps = node.attributes.get_int("keepdims", 1) == 1
    return operator(node) in _REDUCTIONS and keeps and len(axes) == 1 and axes[0] in last


def _is_vector(held: Constant, rank: int) -> bool:
    """Whether a constant is the same at every position."""
    return len(held.shape) <= rank and all(size == 1 for size in held.shape[:-1])


def _is_together(each: Rows, first: Rows) -> bool:
    """Whether the same row of a constant is behind each row of both."""
    leaves = each.source.weight.leaf, first.source.weight.leaf
    return leaves[0] is leaves[1] and each.moves == first.moves


def _repeats(each: Rows, first: Rows, shapes: Shapes) -> bool:
    """Whether one row is repeated for each row of ``first``."""
    return each.is_one and shapes.broadcasts_to(each.value, first.value)


def _numbers(
    node: ir.Node,
    first: Rows,
    rows: Mapping[int, Rows],
    held: Mapping[int, Constant],
    together: Collection[int],
    rank: int,
    width: int,
) -> Expression:
    """The rows that ``node`` makes; ``first`` are the operands that are ``together``."""
    dtype = first.numbers.dtype
    operands = {index: cast(each.numbers, dtype) for index, each in rows.items()}
    for index, each in held.items():
        operands[index] = each.wide(dtype) if each.dtype in FLOATS else each.values
    order = sorted(operands, key=lambda index: index not in together)
    proto = ir.to_proto(node)
    bare = onnx.NodeProto(op_type=proto.op_type, input=proto.input, attribute=proto.attribute)
    opsets = {} if node.graph is None else node.graph.opset_imports
    indices = range(len(node.inputs))
    return OnRows(
        *(operands[index] for index in order),
        inputs=tuple(order.index(index) if index in operands else None for index in indices),
        ranks=tuple(rank if index in together else None for index in indices),
        proto=bare.SerializeToString(deterministic=True),
        opset=opsets.get("", 1),
        width=width,
    )
