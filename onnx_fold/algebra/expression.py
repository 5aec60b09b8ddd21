"""Matrices that are not evaluated yet: small trees of products, solves and slices over weights.

A folded weight is such a tree, ``T⁻¹ W T'`` say. It knows its shape and type without reading
anything, can be pickled and sent to another process, and is evaluated once, when it is written.

:meth:`Expression.take` goes down the tree: some columns of a product are the product with some
columns, some rows of a stored matrix are read and no others. So a sample costs what is sampled.

All nodes are of one type. What an :class:`Operation` does is a row of rules: the shape of its
result, how it is computed, and which slices of its operands make slices of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.algebra.device import HOST, Array, Device, Indices, Shape
from onnx_fold.algebra.operators import on_rows
from onnx_fold.algebra.storage import InFile, InMemory, OnDemand, OnDisk
from onnx_fold.errors import NotFiniteError


@dataclass(frozen=True, eq=False)
class Expression:
    """A matrix that is evaluated when it is needed; two are the same only if they are one object.

    It is made by its operation: ``Take(x, indices, axis=1)``.

    Attributes:
        operation: What makes it of its operands.
        operands: What has to be evaluated first.
        arguments: What else the operation needs to know, by name.
        shape: Its shape.
        dtype: The type that it evaluates to.
        definition: What it is equal to, where it was computed in another way, and rounded. It is
            for the proof, and not pickled.
    """

    operation: Operation
    operands: tuple[Expression, ...]
    arguments: Mapping[str, Any]
    shape: Shape
    dtype: np.dtype[Any]
    definition: Expression | None = None

    @property
    def stored(self) -> Array | None:
        """The numbers of a leaf, mapped into memory where they lie in a file; else None."""
        return self.arguments["source"].mapped() if self.operation is Leaf else None

    def take(self, indices: Expression, axis: int) -> Expression:
        """Some slices along ``axis`` (not negative), in the order of ``indices`` (integers)."""
        taken = self.operation.take(self, indices, axis) or Take(self, indices, axis=axis)
        if self.definition is None:
            return taken
        return defined(taken, self.definition.take(indices, axis))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(self.operation, **self.arguments), self.operands


def evaluate(
    expression: Expression,
    device: Device = HOST,
    given: Mapping[Expression, Any] = MappingProxyType({}),
) -> Array:
    """The values of ``expression``.

    Each object in the tree is evaluated once, and dropped after its last use. What overflows
    becomes infinite without a warning.

    Args:
        expression: What to evaluate.
        device: Where.
        given: Values on the device that are known already.
    """
    values = dict(given)
    nodes = _operands_first(expression, given)
    uses = Counter(operand for node in nodes for operand in node.operands)
    uses[expression] += 1
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for node in nodes:
            operands = (values[operand] for operand in node.operands)
            values[node] = node.operation.compute(node, device, *operands, **node.arguments)
            for operand in node.operands:
                uses[operand] -= 1
                if not uses[operand]:
                    del values[operand]
    return device.fetch(values[expression])


def _operands_first(root: Expression, given: Container[Expression] = ()) -> Iterable[Expression]:
    """All objects of the tree that are not ``given``, each once, behind its operands."""
    found: dict[Expression, None] = {}
    stack = [root] if root not in given else []
    while stack:
        missing = [x for x in stack[-1].operands if x not in found and x not in given]
        if missing:
            stack.extend(reversed(missing))
        else:
            found[stack.pop()] = None
    return found


# --- Rules ----------------------------------------------------------------------------------------

TakeRule = Callable[[Expression, Expression, int], Expression | None]


@dataclass(frozen=True, eq=False)
class Operation:
    """What makes an expression of others, as a row of rules.

    Attributes:
        name: What it is called in this module.
        compute: ``(node, device, *values, **arguments)``: its value on a device, by those of its
            operands there.
        shape: ``(*operands, **arguments)``: the shape of its result, by default the first one's.
        dtype: The same for the type.
        take: Slices of a node along an axis, by slices of its operands; None if there are no such.
    """

    name: str
    compute: Callable[..., Any]
    shape: Callable[..., Shape] = lambda x, *_, **__: x.shape
    dtype: Callable[..., np.dtype[Any]] = lambda x, *_, **__: x.dtype
    take: TakeRule = lambda node, indices, axis: None

    def __call__(self, *operands: Expression, **arguments: Any) -> Expression:
        """The result of these operands."""
        shape, dtype = self.shape(*operands, **arguments), self.dtype(*operands, **arguments)
        return Expression(self, operands, arguments, shape, dtype)

    def __reduce__(self) -> str:
        return self.name


def _by_slices(axes: Callable[..., Sequence[int | None] | None]) -> TakeRule:
    """Slices of a result are the result of slices.

    Args:
        axes: ``(axis, *operands, **arguments)``: the axis of each operand that stands for ``axis``
            of the result, None if it is used as it is; None if the operands have no such slices.
    """

    def take(node: Expression, indices: Expression, axis: int) -> Expression | None:
        found = axes(axis, *node.operands, **node.arguments)
        if found is None:
            return None
        pairs = zip(node.operands, found, strict=True)
        parts = (x if own is None else x.take(indices, own) for x, own in pairs)
        return node.operation(*parts, **node.arguments)

    return take


def _broadcasting(axis: int, *terms: Expression) -> Sequence[int | None] | None:
    """Of terms that broadcast, one that is repeated along ``axis`` stays as it is."""
    shape = np.broadcast_shapes(*(term.shape for term in terms))
    if shape[axis] == 1 or any(len(term.shape) != len(shape) for term in terms):
        return None
    return [None if term.shape[axis] == 1 else axis for term in terms]


def _resized(shape: Shape, axis: int, *sizes: int) -> Shape:
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


def _take_again(node: Expression, indices: Expression, along: int) -> Expression:
    (x, own), axis = node.operands, node.arguments["axis"]
    if along == axis:
        return x.take(own.take(indices, 0), axis)
    return Take(x.take(indices, along), own, axis=axis)


def _placed(node: Expression, device: Device, x: Any, positions: Any, **_: Any) -> Any:
    array = device.zeros(node.shape, node.dtype)
    array.reshape(-1)[positions] = x.reshape(-1)
    return array


def _spread(node: Expression, device: Device, units: Any, rest: Any, order: Any) -> Any:
    matrix = device.zeros(node.shape, node.dtype)
    matrix[order[: len(units)], units] = 1.0
    matrix[order[len(units) :]] = rest
    return matrix


def _take_spread(node: Expression, indices: Expression, axis: int) -> Expression | None:
    """Rows are looked up now: it is for samples, of which not all of ``rest`` is read."""
    if axis == 1:
        return None
    numbers, order = evaluate(node.operands[0]), evaluate(node.operands[2])
    place = np.argsort(order)[evaluate(indices)]
    is_unit = place < len(numbers)
    return Spread(
        literal(numbers[place[is_unit]]),
        node.operands[1].take(literal(place[~is_unit] - len(numbers)), 0),
        literal(np.argsort(~is_unit, kind="stable")),
    )


def _place(operand: int, inputs: Sequence[int | None], ranks: Sequence[int | None]) -> int | None:
    """The axis of the rows of an operand; None if it is a constant."""
    is_rows = any(index == operand and rank for index, rank in zip(inputs, ranks, strict=True))
    return 0 if is_rows else None


def _on_rows(
    _: Expression, device: Device, *operands: Any, inputs: Sequence[int | None], **how: Any
) -> Any:
    arrays = [None if index is None else device.fetch(operands[index]) for index in inputs]
    return device.load(on_rows(operands=arrays, **how))


_elementwise = _by_slices(lambda axis, *operands, **_: [axis] * len(operands))

# --- Operations -----------------------------------------------------------------------------------

Part = Operation(  # slices of the array of a source, of which no others are read
    "Part",
    lambda _, device, picked, source, axis: device.load(source.part(device.fetch(picked), axis)),
    shape=lambda picked, source, axis: _resized(source.shape, axis, *picked.shape),
    dtype=lambda picked, source, axis: source.dtype,
    take=_by_slices(lambda along, picked, source, axis: (0,) if along == axis else None),
)
Leaf = Operation(  # the array of a source
    "Leaf",
    lambda _, device, source: device.load(source.read()),
    shape=lambda source: source.shape,
    dtype=lambda source: source.dtype,
    take=lambda leaf, indices, axis: Part(indices, axis=axis, **leaf.arguments),
)
Cast = Operation(  # x, rounded or widened to another type
    "Cast",
    lambda _, device, x, to: device.cast(x, to),
    dtype=lambda x, to: to,
    take=_elementwise,
)
Scale = Operation(  # x times a number
    "Scale",
    lambda _, device, x, factor: x * factor,
    take=_elementwise,
)
Transpose = Operation(  # x with its axes in another order
    "Transpose",
    lambda _, device, x, permutation: device.transpose(x, permutation),
    shape=lambda x, permutation: tuple(x.shape[axis] for axis in permutation),
    take=_by_slices(lambda axis, x, permutation: (permutation[axis],)),
)
Reshape = Operation(  # x in another shape of as many elements
    "Reshape",
    lambda _, device, x, shape: x.reshape(shape),
    shape=lambda x, shape: shape,
)
Broadcast = Operation(  # x repeated along axes of size one
    "Broadcast",
    lambda _, device, x, shape: device.broadcast(x, shape),
    shape=lambda x, shape: shape,
)
Diagonal = Operation(  # [n, n] with x, [n], on its diagonal
    "Diagonal",
    lambda node, device, x: _placed(node, device, x, slice(None, None, len(x) + 1)),
    shape=lambda x: (*x.shape, *x.shape),
)
Placed = Operation(  # the elements of x at positions of an array of zeros, in row-major order
    "Placed",
    _placed,
    shape=lambda x, positions, shape: shape,
)
Take = Operation(  # slices of x along an axis, by their indices (integers)
    "Take",
    lambda _, device, x, indices, axis: device.take(x, indices, axis),
    shape=lambda x, indices, axis: _resized(x.shape, axis, *indices.shape),
    take=_take_again,
)
Concatenate = Operation(  # expressions side by side along an axis
    "Concatenate",
    lambda _, device, *parts, axis: device.concatenate(parts, axis),
    shape=lambda *parts, axis: _resized(parts[0].shape, axis, sum(x.shape[axis] for x in parts)),
    take=_by_slices(lambda along, *parts, axis: None if along == axis else [along] * len(parts)),
)
Sum = Operation(  # x + y + ..., of one type; they broadcast
    "Sum",
    lambda _, device, *terms: reduce(add, terms),
    shape=lambda *terms: np.broadcast_shapes(*(term.shape for term in terms)),
    take=_by_slices(_broadcasting),
)
Times = Operation(  # x · y, element by element, of one type; they broadcast
    "Times",
    lambda _, device, x, y: x * y,
    shape=lambda x, y: np.broadcast_shapes(x.shape, y.shape),
    take=_by_slices(_broadcasting),
)
Product = Operation(  # x @ y, [..., n] @ [n, m], of one type
    "Product",
    lambda _, device, x, y: x @ y,
    shape=lambda x, y: (*x.shape[:-1], *y.shape[1:]),
    take=_by_slices(lambda axis, x, y: (None, 1) if axis == len(x.shape) - 1 else (axis, None)),
)
Factors = Operation(  # LU factors of x, [d, d] float64, as the device makes them
    "Factors",
    lambda _, device, x: device.lu_factor(x),
)
Solve = Operation(  # A⁻¹ y, or A⁻ᵀ y (transposed), by the LU factors of A; y is [d, n] float64
    "Solve",
    lambda _, device, lu, y, transposed=False: device.lu_solve(lu, y, transposed),
    shape=lambda lu, y, transposed=False: y.shape,
    dtype=lambda lu, y, transposed=False: y.dtype,
    take=_by_slices(lambda axis, *_, **__: None if axis == 0 else (None, 1)),
)
OnRows = Operation(  # [n, width]: what an ONNX operator makes of each row of operands, by itself
    "OnRows",
    lambda node, device, *operands, width, **how: _on_rows(node, device, *operands, **how),
    shape=lambda x, *_, width, **__: (x.shape[0], width),
    take=_by_slices(
        lambda axis, *operands, inputs, ranks, **_: (
            None if axis else [_place(index, inputs, ranks) for index in range(len(operands))]
        )
    ),
)
Spread = Operation(  # row order[i] is the unit vector units[i], then the next row of rest: [n, d]
    "Spread",
    _spread,
    shape=lambda units, rest, order: (*order.shape, rest.shape[1]),
    dtype=lambda units, rest, order: rest.dtype,
    take=_take_spread,
)


# --- Making them ----------------------------------------------------------------------------------


def literal(array: Array) -> Expression:
    """An array in memory."""
    return Leaf(source=InMemory(array))


def defined(x: Expression, formula: Expression) -> Expression:
    """``x``, which was computed ahead of time and rounded, and the formula that defines it."""
    return replace(x, definition=formula)


def of_tensor(tensor: ir.TensorProtocol) -> Expression:
    """The values of an initializer; a folded weight is not rounded to its own type first."""
    if isinstance(tensor, FoldedTensor):
        return tensor.expression
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
    if isinstance(tensor, ir.ExternalTensor):
        return Leaf(source=InFile(shape, dtype, tensor.offset or 0, Path(tensor.path)))
    return Leaf(source=OnDemand(shape, dtype, tensor.numpy))


def cast(x: Expression, dtype: npt.DTypeLike) -> Expression:
    """``x`` as ``dtype``; where ``x`` was widened before it is cast in one step."""
    to = np.dtype(dtype)
    if _is_plain(x, Cast) and x.operands[0].dtype.itemsize < x.dtype.itemsize:
        (x,) = x.operands
    return x if x.dtype == to else Cast(x, to=to)


def _is_plain(x: Expression, operation: Operation) -> bool:
    """Whether an operation can be looked through: what is defined in another way stays as it is."""
    return x.operation is operation and x.definition is None


def scale(x: Expression, factor: float) -> Expression:
    """``x`` times a number."""
    return x if factor == 1.0 else Scale(x, factor=factor)


def transpose(x: Expression, permutation: Sequence[int] = (1, 0)) -> Expression:
    """``x`` with its axes in another order, by default those of a matrix exchanged."""
    order = tuple(permutation)
    if _is_plain(x, Transpose):
        order = tuple(x.arguments["permutation"][axis] for axis in order)
        (x,) = x.operands
    return x if order == tuple(range(len(order))) else Transpose(x, permutation=order)


def reshape(x: Expression, shape: Sequence[int]) -> Expression:
    """``x`` in another shape of as many elements; one size may be -1."""
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = math.prod(x.shape) // known
    if tuple(sizes) == x.shape:
        return x
    if _is_plain(x, Leaf) and isinstance(source := x.arguments["source"], OnDisk):
        return Leaf(source=replace(source, shape=tuple(sizes)))
    if _is_plain(x, Cast):
        return Cast(reshape(x.operands[0], sizes), **x.arguments)
    return Reshape(x, shape=tuple(sizes))


def broadcast(x: Expression, shape: Sequence[int]) -> Expression:
    """``x`` repeated along axes of size one, or axes in front of those that it has."""
    return x if tuple(shape) == x.shape else Broadcast(x, shape=tuple(shape))


def take(x: Expression, indices: Expression | Indices | slice, axis: int) -> Expression:
    """Slices of ``x`` along ``axis``."""
    axis %= len(x.shape)
    if isinstance(indices, slice):
        indices = np.arange(*indices.indices(x.shape[axis]))
    return x.take(indices if isinstance(indices, Expression) else literal(indices), axis)


def product(left: Expression, right: Expression) -> Expression:
    """``left @ right``, in the type of ``left``."""
    return Product(left, cast(right, left.dtype))


def scaled_rows(x: Expression, factors: Expression) -> Expression:
    """``diag(factors) x``: row ``i`` of ``x``, ``[n, m]``, times ``factors[i]``."""
    return Times(x, reshape(factors, (-1, 1)))


SAMPLE = 256
"""Rows, or columns, that stand for all of a matrix that has more."""


def sample(x: Expression, axis: int, generator: np.random.Generator) -> Indices | None:
    """The indices of random slices of ``x`` along ``axis``; None for all if there are few."""
    size = x.shape[axis]
    return None if size <= SAMPLE else np.sort(generator.choice(size, SAMPLE, replace=False))


def sampled(x: Expression, generator: np.random.Generator) -> Expression:
    """Some rows and some columns of ``x``."""
    for axis in reversed(range(len(x.shape))):
        picked = sample(x, axis, generator)
        x = x if picked is None else take(x, picked, axis)
    return x


# --- Stored in a model ----------------------------------------------------------------------------


class FoldedTensor(ir.LazyTensor):
    """An initializer given by an expression: evaluated wide, rounded once to its storage type.

    It is evaluated each time it is asked for; nothing is kept. It can be pickled.

    Attributes:
        expression: The values before they are rounded.
        device: Where it is evaluated.
    """

    __slots__ = ("device", "expression")

    def __init__(
        self,
        expression: Expression,
        dtype: ir.DataType,
        name: str | None = None,
        device: Device = HOST,
    ) -> None:
        """Store ``expression`` as ``dtype``."""
        shape = ir.Shape(expression.shape)
        super().__init__(self._evaluated, dtype, shape, cache=False, name=name)
        self.expression: Expression = expression
        self.device: Device = device

    def __repr__(self) -> str:
        return f"{self._repr_base()}(name={self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldedTensor, (self.expression, self.dtype, self.name, self.device)

    @property
    def rounded(self) -> Expression:
        """The values as they are stored."""
        return cast(self.expression, self.dtype.numpy())

    def evaluated(self) -> Array:
        """The values as they are stored, in memory and in order.

        Raises:
            NotFiniteError: One of them is NaN or overflows the storage type.
            AssertionError: Its shape is not what it is declared to be.
        """
        array = np.asarray(evaluate(self.rounded, self.device), order="C")
        if array.shape != tuple(self.shape.numpy()):
            raise AssertionError(f"expected shape {self.shape}, evaluated to {array.shape}")
        if not np.isfinite(array).all() and self._is_computed():
            raise NotFiniteError(
                f"folded weight '{self.name}' is not finite in {self.dtype.name.lower()};"
                " protect it (--protect)"
            )
        return array

    def _is_computed(self) -> bool:
        """Whether its values are results; else they only come in another order."""
        nodes = _operands_first(self.expression)
        return any(node.operation in (Product, Solve, Sum, Times) for node in nodes)

    def _evaluated(self) -> ir.TensorProtocol:
        return ir.Tensor(self.evaluated(), dtype=self.dtype)


class ImpliedTensor(FoldedTensor):
    """A matrix that an operator implies: it counts for the ``size`` numbers that are stored.

    Attributes:
        stored_size: Elements of the initializers that it stands for.
    """

    __slots__ = ("stored_size",)

    def __init__(self, expression: Expression, dtype: ir.DataType, stored_size: int) -> None:
        """Stand for ``expression``, ``[d, d]``, made of ``stored_size`` numbers of ``dtype``."""
        super().__init__(expression, dtype)
        self.stored_size = stored_size


def implied_gain(tensor: ir.TensorProtocol) -> Expression | None:
    """The factors of the channels, ``[d]``, if ``tensor`` is the matrix that a gain implies."""
    if isinstance(tensor, ImpliedTensor) and tensor.expression.operation is Diagonal:
        return tensor.expression.operands[0]
    return None
