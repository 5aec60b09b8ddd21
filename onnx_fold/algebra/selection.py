"""Rows, or blocks of columns, of a matrix that are a good basis of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import HOST, Array, Device, Indices, subtract
from onnx_fold.algebra.expression import (
    Expression,
    Factors,
    Leaf,
    Solve,
    Spread,
    cast,
    defined,
    evaluate,
    literal,
    take,
    transpose,
)
from onnx_fold.algebra.storage import Later, OnDemand, Source, Spool
from onnx_fold.base.threads import once


class Selection(ABC):
    """Rows of a matrix ``[f, d]`` that stand for themselves, and the others in terms of a basis.

    Attributes:
        matrix: The matrix.
        free: The rows that were selected among.
        kept: How many rows stand for themselves, ``k``; they are the first of the basis.
        order: All rows, those that are kept first, ``[f]``.
        final_order: All rows as they are to stand, those that are kept first or last, ``[f]``.
        final_order_of_free: Those of ``final_order`` that are free, counted from the first such.
        places: Where each row stands in ``final_order``, ``[f]``.
        basis: The basis, ``[d, d]``.
        rest: ``B``, ``[f - k, d]``: the other rows in terms of the basis, as it is stored.
    """

    basis: Expression
    rest: Expression

    def __init__(self, matrix: Expression, free: slice, kept: int, *, is_last: bool) -> None:
        self.matrix = matrix
        self.free = free
        self.kept = kept
        self.is_last = is_last
        rows, places = matrix.shape[0], free.stop - free.start
        self.order = self._later("order", rows)
        self.final_order = self._later("final_order", rows)
        self.final_order_of_free = self._later("final_order_of_free", places)
        self.places = self._later("places", rows)

    def _later(self, name: str, size: int) -> Expression:
        return Leaf(source=OnDemand((size,), np.dtype(np.intp), lambda: self.orders[name]))

    @abstractmethod
    def found(self) -> Indices:
        """The order of all rows, those that are kept first."""

    @once
    def orders(self) -> dict[str, Indices]:
        """``order``, ``final_order``, ``final_order_of_free`` and ``places`` by their names."""
        order = self.found()
        final_order = np.roll(order, -self.kept) if self.is_last else order
        free = final_order[self.free] - self.free.start
        places = np.argsort(final_order)
        return {
            "order": order,
            "final_order": final_order,
            "final_order_of_free": free,
            "places": places,
        }

    @cached_property
    def formula(self) -> Expression:
        """What ``rest`` is by definition, not rounded: the other rows times the basis' inverse."""
        others = take(self.matrix, take(self.order, slice(self.kept, None), 0), 0)
        return transpose(Solve(Factors(self.basis), transpose(others), transposed=True))

    def rebuilt(self, rest: Expression) -> Expression:
        """``[I; B]`` with its rows where they were, ``[f, d]``."""
        return Spread(literal(np.arange(self.kept)), rest, self.order)


class RowSelection(Selection):
    """The rows of a matrix ``[f, d]`` that are its basis, selected when they are first needed."""

    def __init__(
        self,
        matrix: Expression,
        dtype: ir.DataType,
        seen: Array | None = None,
        spool: Spool | None = None,
        device: Device = HOST,
        *,
        free: slice | None = None,
        is_last: bool = False,
    ) -> None:
        """Select among the rows of ``matrix``.

        Args:
            matrix: The matrix, in the type in which to select.
            dtype: The type in which ``B`` is to be stored.
            seen: Activations ``[n, f]``: rows count as much as they are used by these.
            spool: Where to keep ``B`` until it is written, in the type of ``matrix``.
            device: Where to select.
            free: The rows to select among, more than ``d``, all if None: the last ones if the basis
                is to stand last, else the first ones. The others stay where they are.
            is_last: Whether the basis is to stand last.
        """
        free = slice(0, matrix.shape[0]) if free is None else free
        super().__init__(matrix, free, matrix.shape[1], is_last=is_last)
        self.dtype = dtype
        self.spool = spool or Spool()
        self.device = device
        self._seen = seen
        rows, width = matrix.shape
        self.basis = take(matrix, take(self.order, slice(width), 0), 0)
        found = Leaf(source=Later((rows - width, width), matrix.dtype, self.found_rest))
        self.coefficients = defined(found, self.formula)
        self.rest = cast(self.coefficients, dtype.numpy())

    def found(self) -> Indices:
        """The order of all rows, the basis first."""
        return self.selected[0]

    def found_rest(self) -> Source:
        """``B`` before it is rounded."""
        return self.selected[1]

    @once
    def selected(self) -> tuple[Indices, Source, Array]:
        """The order of the rows, ``B`` before it is rounded, and the lengths of the rows."""
        matrix = evaluate(self.matrix, self.device)
        if self._seen is not None:
            matrix = (matrix * self.weights).astype(matrix.dtype)
        order, rest = self._select_free(matrix)
        if self._seen is not None:
            ordered, width = self.weights[order], matrix.shape[1]
            rest = rest / ordered[width:] * ordered[:width].T
        return order, self.spool.add(rest), lengths(matrix)

    @property
    def sizes(self) -> Array:
        """The lengths of the rows, ``[f]``; a row that is used more is longer by as much."""
        return self.selected[2]

    @once
    def weights(self) -> Array:
        """How much each row counts, ``[f, 1]``: as much as it is used."""
        if self._seen is None:
            return np.ones((self.matrix.shape[0], 1), self.matrix.dtype)
        sizes = np.sqrt(np.mean(self._seen**2, axis=0))
        weights: Array = np.maximum(sizes, 1e-3 * sizes.max(initial=1e-30))[:, None]
        return weights

    def _select_free(self, matrix: Array) -> tuple[Indices, Array]:
        """Select among the free rows, and express the others by these."""
        order, rest = select_rows(matrix[self.free], device=self.device)
        if len(order) == len(matrix):
            return order, rest
        width = matrix.shape[1]
        order += self.free.start
        kept = np.delete(np.arange(len(matrix)), self.free)
        factors = self.device.lu_factor(self.device.load(matrix[order[:width]]))
        others = self.device.load(np.ascontiguousarray(matrix[kept].T))
        ours = self.device.fetch(self.device.lu_solve(factors, others, transposed=True)).T
        parts = [(kept, ours), (order[width:], rest)]
        if not self.is_last:
            parts.reverse()  # those that stay come behind
        places, coefficients = zip(*parts, strict=True)
        return np.concatenate((order[:width], *places)), np.concatenate(coefficients)


def lengths(rows: Array) -> Array:
    """The length of each of ``rows``, ``[n, d]``, without a copy of them."""
    found: Array = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return found


def select_rows(
    matrix: Array, bound: float = 1.01, max_rounds: int = 100, device: Device = HOST
) -> tuple[Indices, Array]:
    """Find rows of ``matrix`` that are a good basis of all its rows.

    LU with partial pivoting picks ``d`` of the ``f`` rows, and swaps make their volume larger until
    the others depend on them with coefficients of at most ``bound`` (Goreinov et al. 2010, "How to
    find a good submatrix").

    Args:
        matrix: ``[f, d]``, with ``f > d``, float32 or float64.
        bound: Largest coefficient to accept.
        max_rounds: Give up after so many rounds of swaps.
        device: Where to eliminate.

    Returns:
        The order of the rows, ``[f]``, the basis first; and ``B``, ``[f - d, d]`` in the type of
        ``matrix``, with ``matrix[order[d:]] = B @ matrix[order[:d]]``. It needs no inverse of the
        basis, so it exists and is bounded even where ``matrix`` has a rank below ``d``.
    """
    order, b = device.eliminate(matrix)
    for _ in range(max_rounds):
        if not _swap(b, order, bound):
            break
    return order, b


def _swap(b: Array, order: Indices, bound: float, watched: int = 256) -> bool:
    """One round of swaps between the rows of ``b`` with the largest entries and the basis.

    Swapping row ``i`` with the basis row ``j`` is ``B - (B[:, j] + e_i) (B[i] - e_j) / B[i, j]``.
    It is done at once in the rows that are watched; the rest follows in one product.

    Returns:
        Whether there was anything to swap.
    """
    width = b.shape[1]
    largest = np.maximum(b.max(axis=1), -b.min(axis=1))
    rows = np.argsort(-largest)[:watched]
    part = b[rows]
    left: list[Array] = []
    right: list[Array] = []
    for _ in range(watched):
        i, j = np.unravel_index(np.argmax(np.abs(part)), part.shape)
        pivot = part[i, j]
        if not abs(pivot) > bound:
            break
        column, row = b[:, j].copy(), part[i] / pivot
        for u, v in zip(left, right, strict=True):
            column -= u * v[j]
        column[rows[i]] += 1.0
        row[j] -= 1.0 / pivot
        part -= np.outer(column[rows], row)
        left.append(column)
        right.append(row)
        outside = width + rows[i]
        order[j], order[outside] = order[outside], order[j]
    if left:
        subtract(b, np.stack(left, axis=1), np.stack(right))
    return bool(left)


def select_blocks(matrix: Array, size: int) -> Indices:
    """Find blocks of ``size`` columns that together are a good basis of the rows' space.

    QR with block pivoting: each step takes the block whose part outside the span of those taken
    before has the largest smallest singular value.

    Args:
        matrix: ``[d, n · size]`` with ``n · size >= d``, float32 or float64; ``d`` is a multiple
            of ``size``.
        size: Columns of a block.

    Returns:
        The ``d / size`` blocks taken, in ascending order.
    """
    width, columns = matrix.shape
    rows = np.array(matrix.T, order="C")
    blocks = np.arange(columns // size)
    gram = _gram(rows.reshape(-1, size, width))
    q, inside = np.empty((width, width), rows.dtype), np.empty((columns, width), rows.dtype)
    for step, first in enumerate(range(0, width, size)):
        best = step + int(np.argmax(np.linalg.eigvalsh(gram[step:])[:, 0]))
        for each in (rows, inside, gram, blocks):
            _swap_blocks(each, step, best, len(each) // len(blocks))
        taken, others = slice(first, first + size), slice(first + size, None)
        outside = rows[taken] - inside[taken, :first] @ q[:first]
        q[taken] = np.linalg.qr(outside.T)[0].T
        inside[others, taken] = rows[others] @ q[taken].T
        gram[step + 1 :] -= _gram(inside[others, taken].reshape(-1, size, size))
    return np.sort(blocks[: width // size])


def _swap_blocks(array: Array, i: int, j: int, size: int) -> None:
    """Swap the ``i``-th and the ``j``-th ``size`` rows."""
    first, second = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
    array[first], array[second] = array[second].copy(), array[first].copy()


def _gram(blocks: Array) -> Array:
    """The products of each block's rows with each other, float64 ``[n, size, size]``."""
    return (blocks @ blocks.transpose(0, 2, 1)).astype(np.float64)
