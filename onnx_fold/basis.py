"""The free basis of a stream: ``T`` and ``T⁻¹`` in wide precision, conditioning, the error probe.

For every invertible ``T`` (``[d, d]``), writers ``W → W T`` with readers ``R → T⁻¹ R`` is the same
function. Nothing here inverts a matrix: ``T⁻¹ R`` is an LU solve with partial pivoting in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from onnx_fold.constants import Array

Expression = Callable[[], Array]
"""A matrix that is evaluated when it is needed, in float32 or float64."""

TOLERANCES: Mapping[ir.DataType, float] = {
    ir.DataType.DOUBLE: 1e-12,
    ir.DataType.FLOAT: 1e-5,
    ir.DataType.FLOAT16: 5e-3,
    ir.DataType.BFLOAT16: 4e-2,
}
"""Largest predicted relative error at which a fold is taken, by storage type."""

MAX_RATIO = 8.0
"""How many times the original's own error a folded model may have."""

MAX_STREAM_RATIO = 16.0
"""The same for one stream by itself; about half arrives at the outputs (docs/accuracy.md)."""


def product_dtype(dtype: ir.DataType) -> npt.DTypeLike:
    """Type in which products of stored weights accumulate: float32 for 16 bits, else float64."""
    return np.float32 if dtype.bitwidth <= 16 else np.float64


class FoldedTensor(ir.LazyTensor):
    """An initializer given by an expression: evaluated wide, rounded once to its storage type."""

    __slots__ = ("_expression",)

    def __init__(self, expression: Expression, dtype: ir.DataType, shape: Sequence[int]) -> None:
        """Store ``expression()``, of shape ``shape``, as ``dtype``."""
        super().__init__(self._round, dtype, ir.Shape(shape), cache=True)
        self._expression: Expression = expression

    def wide(self) -> Array:
        """The values before rounding, float32 or float64."""
        array: Array = self._expression()
        if array.shape != tuple(self.shape.numpy()):
            raise AssertionError(f"expected shape {self.shape}, evaluated to {array.shape}")
        return array

    def _round(self) -> ir.TensorProtocol:
        with np.errstate(over="ignore", invalid="ignore"):  # is found by `is_finite`
            rounded = np.ascontiguousarray(self.wide().astype(self.dtype.numpy()))
        return ir.Tensor(rounded, dtype=self.dtype)

    def is_finite(self) -> bool:
        """Whether no stored value is NaN or overflows the storage type."""
        return bool(np.isfinite(self.numpy()).all())


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis ``T`` given by the weight of a layer of the stream, ``matrix`` (``[d, d]``).

    A reader ``R`` gives ``T = R`` (R becomes the identity); a writer ``P`` gives ``T = P⁻¹``
    (``inverted``: P becomes the identity).
    """

    matrix: Expression
    inverted: bool = False

    def of_writer(self, w: Array) -> Array:
        """``w T``, for ``w`` of shape ``[..., d]``."""
        if not self.inverted:
            product: Array = w @ self.matrix().astype(w.dtype, copy=False)
            return product
        rows = w.reshape(-1, w.shape[-1])
        return self._solve(rows.T, transposed=True).T.reshape(w.shape)

    def of_reader(self, r: Array) -> Array:
        """``T⁻¹ r``, for ``r`` of shape ``[d, n]``."""
        if self.inverted:
            product: Array = self.matrix().astype(r.dtype, copy=False) @ r
            return product
        return self._solve(r, transposed=False)

    def _solve(self, rhs: Array, *, transposed: bool) -> Array:
        factors, wide = _factors(self)[0], rhs.astype(np.float64)
        return scipy.linalg.lu_solve(
            factors, wide, trans=1 if transposed else 0, check_finite=False
        )

    @property
    def condition(self) -> float:
        """Condition number of ``T`` (2-norm), estimated from its LU; infinite if singular."""
        return _factors(self)[1]


@lru_cache(maxsize=2)
def _factors(basis: Basis) -> tuple[tuple[Array, npt.NDArray[np.int32]], float]:
    """LU factors of a basis and its condition number; the last two are kept."""
    matrix = basis.matrix().astype(np.float64)
    lu, pivots, singular = scipy.linalg.lapack.dgetrf(matrix)
    if singular or not np.isfinite(lu).all():
        return (lu, pivots), float("inf")

    def solve(vector: Array, trans: Literal[0, 1]) -> Array:
        return scipy.linalg.lu_solve((lu, pivots), vector, trans=trans, check_finite=False)

    largest = _largest_singular_value(len(matrix), lambda v: matrix.T @ (matrix @ v))
    inverse = _largest_singular_value(len(matrix), lambda v: solve(solve(v, 1), 0))
    return (lu, pivots), largest * inverse


def _largest_singular_value(
    width: int, gram: Callable[[Array], Array], iterations: int = 24
) -> float:
    """Power iteration with ``gram = Aᵀ A`` (or ``A⁻¹ A⁻ᵀ``); from below, within some percent."""
    vector: Array = np.random.default_rng(0).standard_normal(width)
    size = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(iterations):
            vector = gram(vector / np.linalg.norm(vector))
            size = float(np.linalg.norm(vector))
            if not np.isfinite(size) or size == 0.0:
                return float("inf")
    return float(np.sqrt(size))


def select_rows(
    matrix: Array, bound: float = 1.1, max_rounds: int = 1000
) -> tuple[npt.NDArray[np.intp], Array]:
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


def _swaps(
    b: Array, bound: float, at_most: int = 64
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
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


def select_blocks(matrix: Array, size: int) -> npt.NDArray[np.intp]:
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


@dataclass(frozen=True)
class Side:
    """One writer or reader for the probe: its matrix before and after; None is the identity.

    Attributes:
        before: ``[n, d]`` for a writer, ``[d, n]`` for a reader.
        after: What is stored in its place.
        rows: What a writer was seen to read, ``[m, n]``; random rows are taken if there is none.
    """

    before: Expression
    after: Expression | None
    rows: Array | None = None


@dataclass(frozen=True)
class TableSide:
    """A writer whose rows are taken one by one (an embedding, a bias), not multiplied.

    Attributes:
        size: Number of rows.
        take: The rows at some indices before and after, ``[m, d]`` each.
    """

    size: int
    take: Callable[[npt.NDArray[np.intp]], tuple[Array, Array]]


def probe(
    writers: Sequence[Side | TableSide],
    readers: Sequence[Side],
    dtype: ir.DataType,
    rows: int = 32,
) -> tuple[float, float]:
    """Predict the relative error of a fold, for values and weights stored as ``dtype``.

    Random rows ``h ~ N(0, 1)``, or recorded ones, go through the writers and the readers. The
    reference is ``y = (Σ h W) R``, in float64, or in float32 for 16-bit weights. The folded side
    has its weights as they would be stored; on both sides the stream's value and the result are
    rounded to the storage type. A probe, not a bound.

    Returns:
        The largest ``‖y' - y‖ / ‖y‖`` (Frobenius) of all readers for the folded layers, and the
        same for the original ones.
    """
    generator = np.random.default_rng(0)
    narrow = dtype.numpy()

    def rounded(array: Array) -> Array:
        with np.errstate(over="ignore"):
            return array.astype(narrow).astype(np.float64)

    x: Array = np.zeros(())
    x_folded: Array = np.zeros(())
    for side in writers:
        if isinstance(side, TableSide):
            before, after = side.take(generator.integers(0, side.size, rows))
        else:
            w = side.before()
            h = generator.standard_normal((rows, len(w)))
            if side.rows is not None:
                h = side.rows[generator.integers(0, len(side.rows), rows)]
            h = rounded(h)
            before = _product(h, w)
            after = _product(h, None if side.after is None else side.after())
        x, x_folded = x + before, x_folded + after
    x_original, x_folded = rounded(x), rounded(x_folded)
    worst, worst_original = 0.0, 0.0
    for side in readers:
        r = side.before()
        y = _product(x, r)
        with np.errstate(invalid="ignore"):  # an overflow: its error is infinite
            y_folded = rounded(_product(x_folded, None if side.after is None else side.after()))
            y_original = rounded(_product(x_original, r))
        worst = max(worst, _relative(y_folded, y))
        worst_original = max(worst_original, _relative(y_original, y))
    return worst, worst_original


def _product(x: Array, w: Array | None) -> Array:
    """``x w`` in the type of ``w``, as float64; ``w`` is None for the identity."""
    if w is None:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        product: Array = x.astype(w.dtype) @ w
    return product.astype(np.float64)


def _relative(approximate: Array, exact: Array) -> float:
    if not np.isfinite(approximate).all():
        return float("inf")
    error, norm = np.linalg.norm(approximate - exact), np.linalg.norm(exact)
    if error == 0.0:
        return 0.0
    return float(error / norm) if norm > 0.0 else float("inf")
