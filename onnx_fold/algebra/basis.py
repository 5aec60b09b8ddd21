"""The free basis of a stream: ``T`` and ``T⁻¹`` in wide precision, and how well it is conditioned.

For every invertible ``T`` (``[d, d]``), writers ``W → W T`` with readers ``R → T⁻¹ R`` is the same
function. Nothing here inverts a matrix: ``T⁻¹ R`` is an LU solve with partial pivoting in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.algebra.device import HOST, Device, Indices
from onnx_fold.algebra.expression import (
    Concatenate,
    Diagonal,
    Expression,
    Factors,
    Solve,
    Times,
    cast,
    evaluate,
    literal,
    product,
    reshape,
    scaled_rows,
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
seen, all rows of an interpolated stream go up to d = 1024 (6.5 times; 6.6 to 8.6 at d = 2048)."""

MAX_NARROW_RATIO = 3.0
"""The same in 16 bits, where it is seen: 88 (d = 4096) to 98 of 100 rows go."""

MAX_NARROW_RATIO_FOR_SIZE = 6.0
"""The same in 16 bits where only size counts: 98 of 100 rows go up to d = 4096."""


PIECE = 2.0
"""By so much more the worst row or channel of a stream run alone may exceed that: in a model there
is more error of the original's own (docs/accuracy.md)."""


def max_ratio(dtype: ir.DataType, *, for_size: bool = True) -> float:
    """How many times its own error a folded stream, or model, stored as ``dtype`` may have."""
    if dtype.bitwidth > 16:
        return MAX_RATIO
    return MAX_NARROW_RATIO_FOR_SIZE if for_size else MAX_NARROW_RATIO


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
    def _factors(self) -> Expression:
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


@dataclass(frozen=True, eq=False)
class DiagonalBasis(Basis):
    """A basis ``T = diag(factors)`` that gives each channel another scale; ``factors`` are ``[d]``.

    Nothing is rounded but each weight, once: no digits are lost, whatever the condition of ``T``.
    """

    factors: Expression = field(kw_only=True)

    @classmethod
    def of(cls, factors: Expression) -> DiagonalBasis:
        """The basis with ``factors``, none of which is zero."""
        return cls(Diagonal(factors), factors=factors)

    def of_writer(self, w: Expression) -> Expression:
        """``w T``, for ``w`` of shape ``[..., d]``."""
        row = reshape(cast(self.factors, w.dtype), (*[1] * (len(w.shape) - 1), -1))
        return Times(w, row)

    def of_reader(self, r: Expression) -> Expression:
        """``T⁻¹ r``, for ``r`` of shape ``[d, n]``."""
        return scaled_rows(r, cast(literal(1.0 / evaluate(self.factors)), r.dtype))


@dataclass(frozen=True, eq=False)
class PieceBasis(Basis):
    """``w → [w₁, w₂ T, w₃]``: pieces of the channels, of which ``matrix`` mixes one.

    It has no inverse: it is for streams without readers.

    Attributes:
        pieces: The channels of each.
        place: Which of them is mixed.
    """

    pieces: Sequence[Indices] = field(kw_only=True)
    place: int = field(kw_only=True)

    def of_writer(self, w: Expression) -> Expression:
        """The pieces of ``w``, ``[..., d]``, side by side."""
        last = len(w.shape) - 1
        parts = [take(w, columns, last) for columns in self.pieces]
        parts[self.place] = product(parts[self.place], self.matrix)
        return Concatenate(*parts, axis=last) if len(parts) > 1 else parts[0]


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
