"""The free basis of a stream: ``T`` and ``T⁻¹`` in wide precision, conditioning, the error probe.

For every invertible ``T`` (``[d, d]``), writers ``W → W T`` with readers ``R → T⁻¹ R`` is the same
function. Nothing here inverts a matrix: ``T⁻¹ R`` is an LU solve with partial pivoting in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.algebra.device import HOST, Array, Device, Indices
from onnx_fold.algebra.expression import (
    Expression,
    Factors,
    Solve,
    cast,
    evaluate,
    product,
    reshape,
    sample,
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
"""How many times its own error a folded stream, or model, may have. In float32, where it is not
seen, all rows of an interpolated stream go up to d = 1024 (6.4 times; 7.8 to 8.6 at d = 2048)."""

MAX_NARROW_RATIO = 3.0
"""The same in 16 bits, where it is seen: 88 (d = 1024, 4096) to 95 of 100 rows go."""

MAX_NARROW_RATIO_FOR_SIZE = 6.0
"""The same in 16 bits where only size counts: 98 of 100 rows go up to d = 2048, 95 at 4096."""


PIECE = 2.0
"""By so much more the worst row or channel of a stream run alone may exceed that: in a model there
is more error of the original's own (docs/accuracy.md)."""


def max_ratio(dtype: ir.DataType, *, for_size: bool = True) -> float:
    """How many times its own error a folded stream, or model, stored as ``dtype`` may have."""
    if dtype.bitwidth > 16:
        return MAX_RATIO
    return MAX_NARROW_RATIO_FOR_SIZE if for_size else MAX_NARROW_RATIO


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

    def factored(
        self, device: Device = HOST, dtype: npt.DTypeLike = np.float64
    ) -> tuple[dict[Expression, Any], float]:
        """The LU factors for :func:`evaluate`, and the condition number of ``T``.

        That is the one of the 2-norm, estimated from the factors; infinite if ``T`` is singular.
        To predict what 16-bit weights do, factors of ``dtype`` float32 are good enough.
        """
        lines = evaluate(cast(self.matrix, dtype))
        if not np.isfinite(lines).all():
            return {}, float("inf")
        matrix = device.load(lines)
        factors = device.lu_factor(matrix)
        width = len(lines)

        def gram(vector: Any) -> Any:
            return matrix.T @ (matrix @ vector)

        def inverse_gram(vector: Any) -> Any:
            return device.lu_solve(factors, device.lu_solve(factors, vector, True), False)

        start = device.load(
            np.random.default_rng(0).standard_normal((width, 1)).astype(lines.dtype)
        )
        sizes = (_largest_singular_value(start, each) for each in (inverse_gram, gram))
        return {self._factors: factors}, math.prod(sizes)

    @property
    def condition(self) -> float:
        """Condition number of ``T``, see :meth:`factored`."""
        return self.factored()[1]


def _largest_singular_value(vector: Any, gram: Callable[[Any], Any], iterations: int = 8) -> float:
    """Power iteration with ``gram = Aᵀ A`` (or ``A⁻¹ A⁻ᵀ``); from below, within some percent."""
    size = float((vector * vector).sum()) ** 0.5
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(iterations):
            vector = gram(vector * (1.0 / size))
            size = float((vector * vector).sum()) ** 0.5
            if not math.isfinite(size) or size == 0.0:
                return float("inf")
    return math.sqrt(size)


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
    device: Device = HOST,
    given: Mapping[Expression, Any] = MappingProxyType({}),
) -> tuple[float, float]:
    """Predict the relative error of a fold, for values and weights stored as ``dtype``.

    Random rows ``h ~ N(0, 1)``, or recorded ones, go through the writers and the readers. The
    reference is ``y = (Σ h W) R``, in float64, or in float32 for 16-bit weights. The folded side
    has its weights as they would be stored; on both sides the stream's value and the result are
    rounded to the storage type. Of wide layers only some channels of ``h`` are not zero, and only
    some columns of ``y`` are looked at. A probe, not a bound.

    Args:
        writers: The writers of the stream.
        readers: Its readers; without any, the value of the stream itself is compared.
        dtype: The storage type.
        rows: How many rows of ``h`` to draw.
        device: Where to evaluate.
        given: Values on the device that are known already.

    Returns:
        The largest ``‖y' - y‖ / ‖y‖`` (Frobenius) of all readers for the folded layers, and the
        same for the original ones. The first is infinite if a folded weight is not finite.
    """
    generator = np.random.default_rng(0)
    narrow = dtype.numpy()

    def rounded(array: Array) -> Array:
        with np.errstate(over="ignore"):
            return array.astype(narrow).astype(np.float64)

    def part(x: Expression, picked: Indices | None, axis: int) -> Array:
        return evaluate(x if picked is None else take(x, picked, axis), device, given)

    x: Array = np.zeros(())
    x_folded: Array = np.zeros(())
    is_finite = True
    picked: Indices | None
    for side in writers:
        if isinstance(side, TableSide):
            picked = generator.integers(0, side.before.shape[0], rows)
            before, after = part(side.before, picked, 0), part(side.after, picked, 0)
            is_finite &= bool(np.isfinite(after).all())
        else:
            picked = sample(side.before, 0, generator)
            h = rounded(_inputs(side, picked, rows, generator))
            before = _product(h, part(side.before, picked, 0))
            if side.after is None:
                after = _placed(h, picked, side.before.shape[0])
            else:
                stored = part(side.after, picked, 0)
                is_finite &= bool(np.isfinite(stored).all())
                after = _product(h, stored)
        x, x_folded = x + before, x_folded + after
    x_original, x_folded = rounded(x), rounded(x_folded)
    worst, worst_original = 0.0, 0.0
    if not readers:
        with np.errstate(invalid="ignore"):
            worst, worst_original = _relative(x_folded, x), _relative(x_original, x)
    for side in readers:
        picked = sample(side.before, 1, generator)
        r = part(side.before, picked, 1)
        y = _product(x, r)
        if side.after is None:
            y_folded = x_folded if picked is None else x_folded[:, picked]
        else:
            stored = part(side.after, picked, 1)
            is_finite &= bool(np.isfinite(stored).all())
            y_folded = _product(x_folded, stored)
        with np.errstate(invalid="ignore"):  # an overflow: its error is infinite
            worst = max(worst, _relative(rounded(y_folded), y))
            worst_original = max(worst_original, _relative(rounded(_product(x_original, r)), y))
    return worst if is_finite else float("inf"), worst_original


def _inputs(side: Side, picked: Indices | None, rows: int, generator: np.random.Generator) -> Array:
    """Rows for a writer; the fewer of its channels are picked, the larger they are."""
    size = side.before.shape[0]
    count = size if picked is None else len(picked)
    if side.rows is None:
        h: Array = generator.standard_normal((rows, count))
    else:
        h = side.rows[generator.integers(0, len(side.rows), rows)]
        h = h if picked is None else h[:, picked]
    return h * math.sqrt(size / count)


def _placed(h: Array, picked: Indices | None, width: int) -> Array:
    """``h`` with zeros in the place of the channels that were not picked."""
    if picked is None:
        return h
    placed = np.zeros((len(h), width))
    placed[:, picked] = h
    return placed


def _product(x: Array, w: Array) -> Array:
    """``x w`` in the type of ``w``, as float64."""
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
