"""Matrices that are not evaluated yet: small trees of products, solves and slices over weights.

A folded weight is such a tree, ``T⁻¹ W T'`` say. It knows its shape and type without reading
anything, can be pickled and sent to another process, and is evaluated once, when it is written. A
leaf that lies in a file is a path and an offset: whoever evaluates it reads its own bytes.

:meth:`Expression.take` goes down the tree: some columns of a product are the product with some
columns, some rows of a stored matrix are read and no others. So a sample costs what is sampled.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.algebra.device import HOST, Array, Device, Indices, Shape
from onnx_fold.errors import NotFiniteError


class Expression(ABC):
    """A matrix that is evaluated when it is needed; two are the same only if they are one object.

    Attributes:
        shape: Its shape.
        dtype: The type that it evaluates to.
    """

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def operands(self) -> tuple[Expression, ...]:
        """What has to be evaluated first."""
        return ()

    @property
    def definition(self) -> Expression | None:
        """What it is equal to, where it was computed in another way, and rounded."""
        return None

    def stored(self) -> Array | None:
        """The numbers of a leaf, mapped into memory where they lie in a file; else None."""
        return None

    @abstractmethod
    def compute(self, device: Device, *operands: Any) -> Any:
        """Evaluate it on ``device``, given the values of its operands there."""

    def take(self, indices: Expression, axis: int) -> Expression:
        """Some slices along ``axis`` (not negative), in the order of ``indices`` (integers)."""
        return Take(self, indices, axis)


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
    uses = Counter(id(operand) for node in _nodes(expression) for operand in node.operands)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return device.fetch(_computed(expression, device, given, uses))


def _computed(
    root: Expression, device: Device, given: Mapping[Expression, Any], uses: Counter[int]
) -> Any:
    """The value of ``root``, operands first; each value is kept while it has more ``uses``."""
    values: dict[int, Any] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        key = id(node)
        if key not in values and node in given:
            values[key] = given[node]
        if key in values:
            stack.pop()
            continue
        missing = [operand for operand in node.operands if id(operand) not in values]
        if missing:
            stack.extend(reversed(missing))
            continue
        values[key] = node.compute(device, *(values[id(operand)] for operand in node.operands))
        for operand in node.operands:
            uses[id(operand)] -= 1
            if not uses[id(operand)]:
                del values[id(operand)]
    return values[id(root)]


def _nodes(root: Expression) -> Iterator[Expression]:
    """All objects of the tree, each once."""
    queue, seen = [root], {id(root)}
    while queue:
        node = queue.pop()
        yield node
        new = {id(operand): operand for operand in node.operands if id(operand) not in seen}
        seen |= new.keys()
        queue.extend(new.values())


# --- Leaves ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Literal(Expression):
    """An array in memory."""

    array: Array

    @property
    def shape(self) -> Shape:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def stored(self) -> Array:
        return self.array

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.load(self.array)


@dataclass(frozen=True, eq=False)
class Initializer(Expression):
    """A tensor of a model in memory; it is pickled by value."""

    tensor: ir.TensorProtocol

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape.numpy())

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tensor.dtype.numpy()

    def stored(self) -> Array:
        return self.tensor.numpy()

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.load(self.tensor.numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        return Literal, (self.tensor.numpy(),)


@dataclass(frozen=True, eq=False)
class _OnDisk(Expression):
    offset: int
    storage: np.dtype[Any]
    dims: Shape

    @property
    def shape(self) -> Shape:
        return self.dims

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.storage

    @abstractmethod
    def mapped(self) -> Array:
        """The file mapped into memory: only what is looked at is read."""

    def stored(self) -> Array:
        return self.mapped()

    def take(self, indices: Expression, axis: int) -> Expression:
        return Part(self, indices, axis)


@dataclass(frozen=True, eq=False)
class Stored(_OnDisk):
    """A tensor in a file: ``storage`` values from byte ``offset`` on."""

    path: Path

    def mapped(self) -> Array:
        return np.memmap(self.path, self.storage, "r", self.offset, self.dims)

    def compute(self, device: Device, *operands: Any) -> Any:
        count = math.prod(self.dims)
        array = np.fromfile(self.path, self.storage, count, offset=self.offset)
        return device.load(array.reshape(self.dims))


class Spool:
    """Arrays kept on disk, in a file without a name that goes with the last of them."""

    def __init__(self, in_memory: int = 2**20) -> None:
        """Keep arrays of up to ``in_memory`` bytes in memory."""
        self._in_memory = in_memory

    @cached_property
    def file(self) -> IO[bytes]:
        """Where the arrays lie."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object is
        weakref.finalize(self, file.close)
        return file

    def add(self, array: Array) -> Expression:
        """``array`` as an expression that does not hold it in memory if it is large."""
        if array.nbytes <= self._in_memory:
            return Literal(array)
        offset = self.file.seek(0, os.SEEK_END)
        np.ascontiguousarray(array).tofile(self.file)
        return Spooled(offset, array.dtype, array.shape, self)


@dataclass(frozen=True, eq=False)
class Spooled(_OnDisk):
    """An array in a :class:`Spool`; it is pickled by value."""

    spool: Spool

    def mapped(self) -> Array:
        return np.memmap(self.spool.file, self.storage, "r", self.offset, self.dims)

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.load(np.array(self.mapped()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Literal, (np.array(self.mapped()),)


@dataclass(frozen=True, eq=False)
class Part(Expression):
    """Slices of an array on disk; no others are read."""

    source: _OnDisk
    indices: Expression
    axis: int

    @property
    def shape(self) -> Shape:
        return _taken(self.source.shape, self.indices, self.axis)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.indices,)

    def compute(self, device: Device, *operands: Any) -> Any:
        (indices,) = operands
        taken = np.take(self.source.mapped(), device.fetch(indices), self.axis)
        return device.load(taken.view(np.ndarray))


def _taken(shape: Shape, indices: Expression, axis: int) -> Shape:
    return (*shape[:axis], *indices.shape, *shape[axis + 1 :])


def of_tensor(tensor: ir.TensorProtocol) -> Expression:
    """The values of an initializer; a folded weight is not rounded to its own type first."""
    if isinstance(tensor, FoldedTensor):
        return tensor.expression
    if isinstance(tensor, ir.ExternalTensor):
        shape = tuple(tensor.shape.numpy())
        return Stored(tensor.offset or 0, tensor.dtype.numpy(), shape, Path(tensor.path))
    return Initializer(tensor)


# --- Operations -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Unary(Expression):
    x: Expression

    @property
    def shape(self) -> Shape:
        return self.x.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.x.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Cast(_Unary):
    """``x``, rounded or widened to another type. Made by :func:`cast`."""

    to: np.dtype[Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.to

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.cast(operands[0], self.to)

    def take(self, indices: Expression, axis: int) -> Expression:
        return Cast(self.x.take(indices, axis), self.to)


@dataclass(frozen=True, eq=False)
class Scale(_Unary):
    """``x`` times a number. Made by :func:`scale`."""

    factor: float

    def compute(self, device: Device, *operands: Any) -> Any:
        return operands[0] * self.factor

    def take(self, indices: Expression, axis: int) -> Expression:
        return Scale(self.x.take(indices, axis), self.factor)


@dataclass(frozen=True, eq=False)
class Transpose(_Unary):
    """``x`` with its axes in another order. Made by :func:`transpose`."""

    permutation: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.x.shape[axis] for axis in self.permutation)

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.transpose(operands[0], self.permutation)

    def take(self, indices: Expression, axis: int) -> Expression:
        return Transpose(self.x.take(indices, self.permutation[axis]), self.permutation)


@dataclass(frozen=True, eq=False)
class Reshape(_Unary):
    """``x`` in another shape of as many elements. Made by :func:`reshape`."""

    dims: Shape

    @property
    def shape(self) -> Shape:
        return self.dims

    def compute(self, device: Device, *operands: Any) -> Any:
        return operands[0].reshape(self.dims)


@dataclass(frozen=True, eq=False)
class Computed(_Unary):
    """``x``, which was computed ahead of time and rounded, and the ``formula`` that defines it."""

    formula: Expression

    @property
    def definition(self) -> Expression:
        return self.formula

    def compute(self, device: Device, *operands: Any) -> Any:
        return operands[0]

    def take(self, indices: Expression, axis: int) -> Expression:
        return Computed(self.x.take(indices, axis), self.formula.take(indices, axis))

    def __reduce__(self) -> tuple[Any, ...]:
        return cast, (self.x, self.x.dtype)  # the formula is for the proof, which nobody sends


@dataclass(frozen=True, eq=False)
class Diagonal(_Unary):
    """The matrix ``[n, n]`` with ``x``, ``[n]``, on its diagonal."""

    @property
    def shape(self) -> Shape:
        return (*self.x.shape, *self.x.shape)

    def compute(self, device: Device, *operands: Any) -> Any:
        matrix = device.zeros(self.shape, self.dtype)
        matrix.reshape(-1)[:: self.shape[0] + 1] = operands[0]
        return matrix


@dataclass(frozen=True, eq=False)
class ScaledRows(_Unary):
    """``diag(factors) x``: row ``i`` of ``x``, ``[n, m]``, times ``factors[i]``."""

    factors: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.x, self.factors

    def compute(self, device: Device, *operands: Any) -> Any:
        x, factors = operands
        return x * factors[:, None]

    def take(self, indices: Expression, axis: int) -> Expression:
        factors = self.factors if axis == 1 else self.factors.take(indices, 0)
        return ScaledRows(self.x.take(indices, axis), factors)


@dataclass(frozen=True, eq=False)
class Broadcast(_Unary):
    """``x`` repeated along axes of size one. Made by :func:`broadcast`."""

    dims: Shape

    @property
    def shape(self) -> Shape:
        return self.dims

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.broadcast(operands[0], self.dims)


@dataclass(frozen=True, eq=False)
class Take(_Unary):
    """Slices of ``x`` along an axis, ``indices`` (integers) of them. Made by :func:`take`."""

    indices: Expression
    axis: int

    @property
    def shape(self) -> Shape:
        return _taken(self.x.shape, self.indices, self.axis)

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.x, self.indices

    def compute(self, device: Device, *operands: Any) -> Any:
        x, indices = operands
        return device.take(x, indices, self.axis)

    def take(self, indices: Expression, axis: int) -> Expression:
        if axis == self.axis:
            return self.x.take(self.indices.take(indices, 0), axis)
        return Take(self.x.take(indices, axis), self.indices, self.axis)


@dataclass(frozen=True, eq=False)
class Concatenate(Expression):
    """Expressions side by side along ``axis``."""

    parts: tuple[Expression, ...]
    axis: int

    @property
    def shape(self) -> Shape:
        size = sum(part.shape[self.axis] for part in self.parts)
        first = self.parts[0].shape
        return (*first[: self.axis], size, *first[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.concatenate(operands, self.axis)

    def take(self, indices: Expression, axis: int) -> Expression:
        if axis == self.axis:
            return super().take(indices, axis)
        return Concatenate(tuple(part.take(indices, axis) for part in self.parts), self.axis)


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """The sum of expressions of one type, which broadcast."""

    terms: tuple[Expression, ...]

    @property
    def shape(self) -> Shape:
        return np.broadcast_shapes(*(term.shape for term in self.terms))

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.terms[0].dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.terms

    def compute(self, device: Device, *operands: Any) -> Any:
        total = operands[0]
        for term in operands[1:]:
            total = total + term
        return total

    def take(self, indices: Expression, axis: int) -> Expression:
        """A term that is broadcast along ``axis`` stays as it is."""
        rank, size = len(self.shape), self.shape[axis]
        if size == 1 or any(len(term.shape) != rank for term in self.terms):
            return super().take(indices, axis)
        parts = (t if t.shape[axis] == 1 else t.take(indices, axis) for t in self.terms)
        return Sum(tuple(parts))


@dataclass(frozen=True, eq=False)
class _Binary(Expression):
    left: Expression
    right: Expression

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.left.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.left, self.right


@dataclass(frozen=True, eq=False)
class Times(_Binary):
    """``left · right``, element by element, of one type; they broadcast and have one rank."""

    @property
    def shape(self) -> Shape:
        return np.broadcast_shapes(self.left.shape, self.right.shape)

    def compute(self, device: Device, *operands: Any) -> Any:
        left, right = operands
        return left * right

    def take(self, indices: Expression, axis: int) -> Expression:
        parts = (self.left, self.right)
        return Times(*(x if x.shape[axis] == 1 else x.take(indices, axis) for x in parts))


@dataclass(frozen=True, eq=False)
class Placed(_Unary):
    """The elements of ``x`` at ``positions`` of an array of zeros, counted in row-major order."""

    positions: Expression
    dims: Shape

    @property
    def shape(self) -> Shape:
        return self.dims

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.x, self.positions

    def compute(self, device: Device, *operands: Any) -> Any:
        x, positions = operands
        array = device.zeros(self.dims, self.dtype)
        array.reshape(-1)[positions.reshape(-1)] = x.reshape(-1)
        return array


@dataclass(frozen=True, eq=False)
class Product(_Binary):
    """``left @ right``, ``[..., n] @ [n, m]``, both of one type. Made by :func:`product`."""

    @property
    def shape(self) -> Shape:
        return (*self.left.shape[:-1], *self.right.shape[1:])

    def compute(self, device: Device, *operands: Any) -> Any:
        left, right = operands
        return left @ right

    def take(self, indices: Expression, axis: int) -> Expression:
        if axis == len(self.shape) - 1:
            return Product(self.left, self.right.take(indices, 1))
        return Product(self.left.take(indices, axis), self.right)


@dataclass(frozen=True, eq=False)
class Factors(_Unary):
    """LU factors of ``x``, ``[d, d]`` float64; its value is what the device makes of them."""

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.lu_factor(operands[0])


@dataclass(frozen=True, eq=False)
class Solve(Expression):
    """``A⁻¹ rhs``, or ``A⁻ᵀ rhs`` (``transposed``), by the LU factors of ``A``.

    ``rhs`` is ``[d, n]`` float64.
    """

    factors: Factors
    rhs: Expression
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        return self.rhs.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.rhs.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.factors, self.rhs

    def compute(self, device: Device, *operands: Any) -> Any:
        factors, rhs = operands
        return device.lu_solve(factors, rhs, self.transposed)

    def take(self, indices: Expression, axis: int) -> Expression:
        if axis == 0:
            return super().take(indices, axis)
        return Solve(self.factors, self.rhs.take(indices, 1), self.transposed)


@dataclass(frozen=True, eq=False)
class Spread(Expression):
    """Rows of the identity and rows of ``rest``, in any order: ``[n, d]``.

    Row ``order[i]`` is the unit vector ``units[i]`` while there are units, and then the next row of
    ``rest``.
    """

    units: Expression
    rest: Expression
    order: Expression

    @property
    def shape(self) -> Shape:
        return len(self), self.rest.shape[1]

    def __len__(self) -> int:
        return self.order.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.rest.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.units, self.rest, self.order

    def compute(self, device: Device, *operands: Any) -> Any:
        units, rest, order = operands
        matrix = device.zeros(self.shape, self.dtype)
        matrix[order[: len(units)], units] = 1.0
        matrix[order[len(units) :]] = rest
        return matrix

    def take(self, indices: Expression, axis: int) -> Expression:
        """Rows are looked up now: it is for samples, of which not all of ``rest`` is read."""
        if axis == 1:
            return super().take(indices, axis)
        units = evaluate(self.units)
        place = np.argsort(evaluate(self.order))[evaluate(indices)]
        is_unit = place < len(units)
        return Spread(
            Literal(units[place[is_unit]]),
            self.rest.take(Literal(place[~is_unit] - len(units)), 0),
            Literal(np.argsort(~is_unit, kind="stable")),
        )


# --- Making them ----------------------------------------------------------------------------------


def cast(x: Expression, dtype: npt.DTypeLike) -> Expression:
    """``x`` as ``dtype``; where ``x`` was widened before it is cast in one step."""
    to = np.dtype(dtype)
    if isinstance(x, Cast) and x.x.dtype.itemsize < x.to.itemsize:
        x = x.x
    return x if x.dtype == to else Cast(x, to)


def scale(x: Expression, factor: float) -> Expression:
    """``x`` times a number."""
    return x if factor == 1.0 else Scale(x, factor)


def transpose(x: Expression, permutation: Sequence[int] = (1, 0)) -> Expression:
    """``x`` with its axes in another order, by default those of a matrix exchanged."""
    order = tuple(permutation)
    if isinstance(x, Transpose):
        order = tuple(x.permutation[axis] for axis in order)
        x = x.x
    return x if order == tuple(range(len(order))) else Transpose(x, order)


def reshape(x: Expression, shape: Sequence[int]) -> Expression:
    """``x`` in another shape of as many elements; one size may be -1."""
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = math.prod(x.shape) // known
    if tuple(sizes) == x.shape:
        return x
    if isinstance(x, _OnDisk):
        return replace(x, dims=tuple(sizes))
    if isinstance(x, Cast):
        return Cast(reshape(x.x, sizes), x.to)
    return Reshape(x, tuple(sizes))


def broadcast(x: Expression, shape: Sequence[int]) -> Expression:
    """``x`` repeated along axes of size one, or axes in front of those that it has."""
    return x if tuple(shape) == x.shape else Broadcast(x, tuple(shape))


def take(x: Expression, indices: Expression | Indices | slice, axis: int) -> Expression:
    """Slices of ``x`` along ``axis``."""
    axis %= len(x.shape)
    if isinstance(indices, slice):
        indices = np.arange(*indices.indices(x.shape[axis]))
    return x.take(indices if isinstance(indices, Expression) else Literal(indices), axis)


def product(left: Expression, right: Expression) -> Expression:
    """``left @ right``, in the type of ``left``."""
    return Product(left, cast(right, left.dtype))


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
        return any(
            isinstance(node, Product | ScaledRows | Solve | Sum) for node in _nodes(self.expression)
        )

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
    if isinstance(tensor, ImpliedTensor) and isinstance(tensor.expression, Diagonal):
        return tensor.expression.x
    return None
