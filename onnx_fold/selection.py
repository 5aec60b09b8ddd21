"""Rows, or blocks of columns, of a matrix that are a good basis of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import scipy.linalg

from onnx_fold.expression import (
    Array,
    Device,
    Expression,
    FoldedTensor,
    Held,
    Indices,
    Shape,
    Spread,
    cast,
    evaluate,
    take,
)


class RowSelection:
    """The rows of a matrix ``[f, d]`` that are its basis, selected when they are first needed.

    Attributes:
        matrix: The matrix.
        order: All rows, the basis first, ``[f]``.
        basis: The rows of the basis, ``[d, d]``.
        rest: ``B``, ``[f - d, d]``: the other rows in terms of the basis.
    """

    def __init__(self, matrix: Expression, dtype: ir.DataType, seen: Array | None = None) -> None:
        """Select among the rows of ``matrix``; ``B`` is to be stored as ``dtype``.

        Rows count as much as they are used by the activations ``seen``, ``[n, f]``.
        """
        self.matrix = matrix
        self.order: Expression = _Order(self)
        self.rest = FoldedTensor(_Rest(self, dtype.numpy()), dtype)
        self.basis = take(matrix, take(self.order, slice(matrix.shape[1]), 0), 0)
        self._seen = seen

    @cached_property
    def selected(self) -> tuple[Indices, Array]:
        """The order of the rows and ``B``, float64."""
        matrix = evaluate(cast(self.matrix, np.float64))
        if self._seen is None:
            return select_rows(matrix)
        scale = np.sqrt(np.mean(self._seen**2, axis=0))
        scale = np.maximum(scale, 1e-3 * scale.max(initial=1e-30))[:, None]
        order, rest = select_rows(matrix * scale)
        ordered = scale[order]
        width = matrix.shape[1]
        return order, rest / ordered[width:] * ordered[:width].T

    def rebuilt(self, rest: Expression) -> Expression:
        """``[I; B]`` with its rows where they were, ``[f, d]``."""
        return Spread(Held(np.arange(self.matrix.shape[1])), rest, self.order)


@dataclass(frozen=True, eq=False)
class _Order(Expression):
    selection: RowSelection

    @property
    def shape(self) -> Shape:
        return self.selection.matrix.shape[:1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.intp)

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.load(self.selection.selected[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (self.selection.selected[0],)


@dataclass(frozen=True, eq=False)
class _Rest(Expression):
    selection: RowSelection
    storage: np.dtype[Any]

    @property
    def shape(self) -> Shape:
        rows, width = self.selection.matrix.shape
        return rows - width, width

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    def compute(self, device: Device, *operands: Any) -> Any:
        return device.load(self.selection.selected[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (self.selection.selected[1],)


def select_rows(matrix: Array, bound: float = 1.1, max_rounds: int = 1000) -> tuple[Indices, Array]:
    """Find rows of ``matrix`` that are a good basis of all its rows.

    LU with partial pivoting picks ``d`` of the ``f`` rows, and swaps make their volume larger until
    the others depend on them with coefficients of at most ``bound`` (Goreinov et al. 2010, "How to
    find a good submatrix"). Swaps are found on a small part of the coefficients and done together.

    Args:
        matrix: ``[f, d]``, with ``f > d``, float64.
        bound: Largest coefficient to accept.
        max_rounds: Give up after so many rounds of swaps.

    Returns:
        The order of the rows, ``[f]``, the basis first; and ``B``, ``[f - d, d]`` float64, with
        ``matrix[order[d:]] = B @ matrix[order[:d]]``. It needs no inverse of the basis, so it
        exists and is bounded even where ``matrix`` has a rank below ``d``.
    """
    rows, width = matrix.shape
    lu, pivots, _ = scipy.linalg.lapack.dgetrf(matrix)
    order = np.arange(rows)
    for position, pivot in enumerate(pivots):
        order[[position, pivot]] = order[[pivot, position]]
    b: Array = scipy.linalg.solve_triangular(  # L₂ L₁⁻¹
        lu[:width].T, lu[width:].T, lower=False, unit_diagonal=True, check_finite=False
    ).T
    for _ in range(max_rounds):
        i, j = _swaps(b, bound)
        if not len(i):
            break
        left, right = b[:, j], b[i]
        left[i, np.arange(len(i))] += 1.0
        right[np.arange(len(j)), j] -= 1.0
        b = b - left @ np.linalg.solve(b[np.ix_(i, j)], right)
        order[j], order[width + i] = order[width + i], order[j]
    return order, b


def _swaps(b: Array, bound: float, at_most: int = 64) -> tuple[Indices, Indices]:
    """Rows and columns of ``b`` to exchange, one by one as each makes the volume larger."""
    largest = np.abs(b).max(axis=1)
    rows = np.argsort(-largest)[:at_most]
    rows = rows[largest[rows] > bound]
    columns = np.unique(np.abs(b[rows]).argmax(axis=1)) if len(rows) else rows
    part = b[np.ix_(rows, columns)]
    found: list[tuple[int, int]] = []
    taken_rows, taken_columns = np.zeros(len(rows), bool), np.zeros(len(columns), bool)
    while not (taken_rows.all() or taken_columns.all()):
        free = np.where(taken_rows[:, None] | taken_columns, 0.0, np.abs(part))
        i, j = np.unravel_index(np.argmax(free), part.shape)
        if not free[i, j] > bound:
            break
        found.append((int(i), int(j)))
        taken_rows[i], taken_columns[j] = True, True
        row, column = part[i].copy(), part[:, j].copy()
        row[j] -= 1.0
        column[i] += 1.0
        part = part - np.outer(column, row) / free[i, j] * np.sign(part[i, j])
    picked = np.array(found, dtype=np.intp).reshape(-1, 2)
    return rows[picked[:, 0]], columns[picked[:, 1]]


def select_blocks(matrix: Array, size: int) -> Indices:
    """Find blocks of ``size`` columns that together are a good basis of the rows' space.

    QR with block pivoting: each step takes the block whose part outside the span of those taken
    before has the largest smallest singular value.

    Args:
        matrix: ``[d, n · size]`` with ``n · size >= d``, float64; ``d`` is a multiple of ``size``.
        size: Columns of a block.

    Returns:
        The ``d / size`` blocks taken, in ascending order.
    """
    width, columns = matrix.shape
    left = np.array(matrix.T, order="C").reshape(columns // size, size, width)
    taken: list[int] = []
    for _ in range(width // size):
        gram = left @ left.transpose(0, 2, 1)
        smallest = np.linalg.eigvalsh(gram)[:, 0]
        smallest[taken] = -np.inf
        best = int(np.argmax(smallest))
        taken.append(best)
        q = np.linalg.qr(left[best].T)[0]
        left -= (left @ q) @ q.T
    return np.array(sorted(taken), dtype=np.intp)
