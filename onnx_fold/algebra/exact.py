"""Folded weights as they are before they are rounded, in float64: what the proof multiplies by.

:func:`exact` widens an expression: every leaf is read as it is stored and everything else is
computed in float64. :func:`times` multiplies by such a matrix without evaluating it: ``x (P R)`` is
``(x P) R``, and ``x (T⁻¹ R)`` is a triangular solve for the rows of ``x``. So a few rows go
through a folded weight of any size for the price of its leaves, and every element of it takes part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from onnx_fold.algebra import expression as op
from onnx_fold.algebra.device import Array, Host, Indices
from onnx_fold.algebra.expression import Expression, FoldedTensor, cast, evaluate, take
from onnx_fold.algebra.precision import smallest_number, unit_roundoff
from onnx_fold.errors import WrongWeightError

__all__ = ["LIMIT", "Multiplier", "checked", "exact", "values"]

_BLOCK = 2**22
"""Elements of a leaf that are widened at a time."""

_KEPT = 2
"""LU factors that are kept."""

LIMIT = 1e-8
"""Relative difference up to which two results of float64 count as equal: they may have lost digits
to the condition of their matrices."""

_ROWS, _SUMS = 4, 2
"""Rows of a stored weight that are compared, and sums of all rows."""


@dataclass(frozen=True)
class _Exactly(Host):
    """The processor, with a least-squares solution where a matrix is singular."""

    def lu_factor(self, matrix: Array) -> Any:
        with np.errstate(all="ignore"):
            return matrix, super().lu_factor(matrix)

    def lu_solve(self, factors: Any, rhs: Array, transposed: bool) -> Array:
        matrix, known = factors
        with np.errstate(all="ignore"):
            solved = super().lu_solve(known, rhs, transposed)
        if np.isfinite(solved).all():
            return solved
        found: Array = scipy.linalg.lstsq(matrix.T if transposed else matrix, rhs)[0]
        return found


EXACTLY = _Exactly()


def exact(expression: Expression, *, defined: bool = True) -> Expression:
    """``expression`` in float64 throughout: stored numbers as they are, nothing rounded since.

    Args:
        expression: What a folded weight is given by.
        defined: Replace a matrix that was computed ahead of time, as the coefficients of an
            interpolation are, by what defines it.
    """
    known: dict[Expression, Expression] = {}
    todo = [expression]
    while todo:  # a chain of folds may be deeper than Python's stack
        node = todo[-1]
        missing = [part for part in _parts(node, defined) if part not in known]
        if missing:
            todo.extend(missing)
        else:
            known[todo.pop()] = _widened(node, known, defined)
    return known[expression]


def _parts(node: Expression, defined: bool) -> Sequence[Expression]:
    """What has to be widened before ``node``."""
    if defined and node.definition is not None:
        return (node.definition,)
    return node.operands


def _widened(node: Expression, known: Mapping[Expression, Expression], defined: bool) -> Expression:
    parts = [known[part] for part in _parts(node, defined)]
    if (defined and node.definition is not None) or node.operation is op.Cast:
        return parts[0]
    if node.operation is op.Leaf:
        return node if node.dtype.kind in "iub" else cast(op.Leaf(**node.arguments), np.float64)
    if node.operation is op.Part:
        source, axis = node.arguments["source"], node.arguments["axis"]
        return op.Take(exact(op.Leaf(source=source)), *parts, axis=axis)
    return node.operation(*parts, **node.arguments)


def values(expression: Expression) -> Array:
    """The elements of an expression made by :func:`exact`."""
    return evaluate(expression, EXACTLY)


class Multiplier:
    """Multiplies rows by exact matrices; the last LU factors are kept, for the next product."""

    def __init__(self) -> None:
        self._factors: dict[Expression, Any] = {}

    def times(self, x: Array, matrix: Expression, *, transposed: bool = False) -> Array:
        """``x @ matrix``, or ``x @ matrixᵀ``, float64 ``[n, r] @ [r, c]``.

        Args:
            x: The rows.
            matrix: An expression made by :func:`exact`, of rank 2.
            transposed: Multiply by its transpose.
        """
        operands, arguments = matrix.operands, matrix.arguments
        match matrix.operation:
            case op.Transpose:
                return self.times(x, *operands, transposed=not transposed)
            case op.Scale:
                factor: float = arguments["factor"]
                return self.times(x, *operands, transposed=transposed) * factor
            case op.Times if operands[1].shape == (matrix.shape[0], 1):
                return self._scaled_rows(x, *operands, transposed=transposed)
            case op.Sum if all(term.shape == matrix.shape for term in operands):
                terms = (self.times(x, term, transposed=transposed) for term in operands)
                return sum(terms, np.zeros(()))
            case op.Product:
                for part in reversed(operands) if transposed else operands:
                    x = self.times(x, part, transposed=transposed)
                return x
            case op.Solve:
                is_of_t = bool(arguments.get("transposed"))  # A⁻ᵀ
                return self._solved(x, *operands, transposed=transposed, inverse_of_t=is_of_t)
            case op.Take:
                return self._taken(x, *operands, **arguments, transposed=transposed)
            case op.Concatenate:
                return self._joined(x, operands, **arguments, transposed=transposed)
            case op.Spread:
                return self._spread(x, *operands, transposed=transposed)
            case op.Diagonal:
                return x * values(*operands)
        leaf = (operands[0] if matrix.operation is op.Cast else matrix).stored
        return _by_blocks(x, values(matrix) if leaf is None else leaf, transposed)

    def _scaled_rows(
        self, x: Array, w: Expression, column: Expression, *, transposed: bool
    ) -> Array:
        factors = values(column)[:, 0]
        if transposed:
            return self.times(x, w, transposed=True) * factors
        return self.times(x * factors, w)

    def _solved(
        self, x: Array, lu: Expression, y: Expression, *, transposed: bool, inverse_of_t: bool
    ) -> Array:
        if transposed:
            return self._solve(lu, self.times(x, y, transposed=True), transposed=inverse_of_t)
        return self.times(self._solve(lu, x, transposed=not inverse_of_t), y)

    def _solve(self, lu: Expression, rows: Array, *, transposed: bool) -> Array:
        if lu not in self._factors:
            while len(self._factors) >= _KEPT:
                del self._factors[next(iter(self._factors))]
            self._factors[lu] = EXACTLY.lu_factor(values(*lu.operands))
        return EXACTLY.lu_solve(self._factors[lu], rows.T, transposed).T

    def _taken(
        self, x: Array, w: Expression, picked: Expression, *, axis: int, transposed: bool
    ) -> Array:
        indices: Indices = evaluate(picked)
        if (axis == 1) != transposed:  # columns of the result
            return self.times(x, w, transposed=transposed)[:, indices]
        placed = np.zeros((w.shape[axis], len(x)))
        np.add.at(placed, indices, x.T)
        return self.times(placed.T, w, transposed=transposed)

    def _spread(
        self,
        x: Array,
        numbers: Expression,
        rest: Expression,
        order: Expression,
        *,
        transposed: bool,
    ) -> Array:
        units: Indices = evaluate(numbers)
        own, others = np.split(evaluate(order), [len(units)])
        if not transposed:
            result = self.times(x[:, others], rest)
            result[:, units] += x[:, own]
            return result
        result = np.empty((len(x), *order.shape))
        result[:, own] = x[:, units]
        result[:, others] = self.times(x, rest, transposed=True)
        return result

    def _joined(
        self, x: Array, parts: Sequence[Expression], *, axis: int, transposed: bool
    ) -> Array:
        if (axis == 1) != transposed:
            found = [self.times(x, part, transposed=transposed) for part in parts]
            return np.concatenate(found, axis=1)
        ends = np.cumsum([part.shape[axis] for part in parts])
        pieces = zip(np.split(x, ends[:-1], axis=1), parts, strict=True)
        products = (self.times(piece, part, transposed=transposed) for piece, part in pieces)
        return sum(products, np.zeros(()))


def _by_blocks(x: Array, matrix: Array, transposed: bool) -> Array:
    """``x @ matrix`` (or its transpose) in float64; some of its rows are widened at a time."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    blocks = range(0, len(matrix), step)
    if transposed:
        parts = [x @ matrix[at : at + step].astype(np.float64, copy=False).T for at in blocks]
        return np.concatenate(parts, axis=1)
    total: Array = np.zeros((len(x), matrix.shape[1]))
    for at in blocks:
        total += x[:, at : at + step] @ matrix[at : at + step].astype(np.float64, copy=False)
    return total


# --- What is stored ------------------------------------------------------------------------------


def checked(tensor: FoldedTensor) -> Array:
    """The values of a folded weight as they are stored, compared with those that were proved.

    A few rows are compared element by element: each must be the proved number rounded to nearest.
    All others take part in sums of rows with random signs, which may differ by what rounding makes
    of a sum.

    Raises:
        NotFiniteError: One of them is NaN or overflows the storage type.
        WrongWeightError: They are not what was proved.
    """
    array = tensor.evaluated()
    whole = exact(tensor.expression, defined=False)
    unit = max(unit_roundoff(tensor.dtype), LIMIT)  # what float64 stores was computed in it too
    if array.size and not _is_rounded(array, whole, unit):
        raise WrongWeightError(f"folded weight '{tensor.name}' is not stored as it was proved")
    return array


def _is_rounded(array: Array, whole: Expression, unit: float) -> bool:
    generator = np.random.default_rng(0)
    squares = _mean_squares(array.reshape(-1, array.shape[-1] if array.ndim else 1))
    noise = unit * math.sqrt(float(np.mean(squares)))
    noise += smallest_number(array.dtype)
    if array.ndim < 2:
        expected = values(whole)
        return _is_near(array, expected, unit * np.abs(expected) + noise)
    picked = generator.integers(0, len(array), _ROWS)
    if array.ndim > 2:
        expected = values(take(whole, picked, 0))
        return _is_near(array[picked], expected, unit * np.abs(expected) + noise)
    mixed = np.zeros((_ROWS + _SUMS, len(array)))
    mixed[np.arange(_ROWS), picked] = 1.0
    mixed[_ROWS:] = generator.choice([-1.0, 1.0], (_SUMS, len(array)))
    rows, sums = np.split(Multiplier().times(mixed, whole), [_ROWS])
    size = math.sqrt(len(array)) * (unit * np.sqrt(squares) + noise)
    return _is_near(array[picked], rows, unit * np.abs(rows) + noise) and _is_near(
        _by_blocks(mixed[_ROWS:], array, transposed=False), sums, 8.0 * size
    )


def _is_near(actual: Array, expected: Array, limit: Array) -> bool:
    return bool((np.abs(actual.astype(np.float64) - expected) <= limit).all())


def _mean_squares(array: Array) -> Array:
    """The mean square of each column."""
    total: Array = np.zeros(array.shape[1])
    step = max(1, _BLOCK // array.shape[1])
    for at in range(0, len(array), step):
        total += np.square(array[at : at + step], dtype=np.float64).sum(axis=0)
    return total / len(array)
