"""The free basis of a stream: ``T`` and ``T⁻¹`` in wide precision, conditioning, the error probe.

For every invertible ``T`` (``[d, d]``), writers ``W → W T`` with readers ``R → T⁻¹ R`` is the same
function. Nothing here inverts a matrix: ``T⁻¹ R`` is an LU solve with partial pivoting in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.expression import (
    HOST,
    Array,
    Expression,
    Factors,
    Held,
    Solve,
    cast,
    evaluate,
    product,
    reshape,
    take,
    transpose,
)

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


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis ``T`` given by the weight of a layer of the stream, ``matrix`` (``[d, d]``).

    A reader ``R`` gives ``T = R`` (R becomes the identity); a writer ``P`` gives ``T = P⁻¹``
    (``inverted``: P becomes the identity).
    """

    matrix: Expression
    inverted: bool = False

    def of_writer(self, w: Expression) -> Expression:
        """``w T``, for ``w`` of shape ``[..., d]``."""
        if not self.inverted:
            return product(w, self.matrix)
        rows = cast(reshape(w, (-1, w.shape[-1])), np.float64)
        solved = Solve(self._factors, transpose(rows), transposed=True)
        return reshape(transpose(solved), w.shape)

    def of_reader(self, r: Expression) -> Expression:
        """``T⁻¹ r``, for ``r`` of shape ``[d, n]``."""
        if self.inverted:
            return product(cast(self.matrix, r.dtype), r)
        return Solve(self._factors, cast(r, np.float64))

    @cached_property
    def _factors(self) -> Factors:
        return Factors(cast(self.matrix, np.float64))

    @cached_property
    def condition(self) -> float:
        """Condition number of ``T`` (2-norm), estimated from its LU; infinite if singular."""
        matrix = evaluate(self._factors.x)
        factors = HOST.lu_factor(matrix)
        if not factors[-1]:
            return float("inf")

        def solve(vector: Array, transposed: bool) -> Array:
            return HOST.lu_solve(factors, vector, transposed)

        largest = _largest_singular_value(len(matrix), lambda v: matrix.T @ (matrix @ v))
        inverse = _largest_singular_value(len(matrix), lambda v: solve(solve(v, True), False))
        return largest * inverse


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


@dataclass(frozen=True)
class Side:
    """One writer or reader for the probe: its matrix before and after; None is the identity.

    Attributes:
        before: ``[n, d]`` for a writer, ``[d, n]`` for a reader.
        after: What is stored in its place, rounded.
        rows: What a writer was seen to read, ``[m, n]``; random rows are taken if there is none.
    """

    before: Expression
    after: Expression | None
    rows: Array | None = None


@dataclass(frozen=True)
class TableSide:
    """A writer whose rows are taken one by one (an embedding, a bias), not multiplied.

    Attributes:
        before: ``[n, d]``.
        after: What is stored in its place, rounded.
    """

    before: Expression
    after: Expression


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
            picked = Held(generator.integers(0, side.before.shape[0], rows))
            before, after = (_wide(take(w, picked, 0)) for w in (side.before, side.after))
        else:
            h = generator.standard_normal((rows, side.before.shape[0]))
            if side.rows is not None:
                h = side.rows[generator.integers(0, len(side.rows), rows)]
            h = rounded(h)
            before, after = _product(h, side.before), _product(h, side.after)
        x, x_folded = x + before, x_folded + after
    x_original, x_folded = rounded(x), rounded(x_folded)
    worst, worst_original = 0.0, 0.0
    for side in readers:
        y = _product(x, side.before)
        with np.errstate(invalid="ignore"):  # an overflow: its error is infinite
            y_folded = rounded(_product(x_folded, side.after))
            y_original = rounded(_product(x_original, side.before))
        worst = max(worst, _relative(y_folded, y))
        worst_original = max(worst_original, _relative(y_original, y))
    return worst, worst_original


def _wide(x: Expression) -> Array:
    return evaluate(cast(x, np.float64))


def _product(x: Array, w: Expression | None) -> Array:
    """``x w`` in the type of ``w``, as float64; ``w`` is None for the identity."""
    if w is None:
        return x
    return _wide(product(Held(x.astype(w.dtype)), w))


def _relative(approximate: Array, exact: Array) -> float:
    if not np.isfinite(approximate).all():
        return float("inf")
    error, norm = np.linalg.norm(approximate - exact), np.linalg.norm(exact)
    if error == 0.0:
        return 0.0
    return float(error / norm) if norm > 0.0 else float("inf")
