"""Orthogonal bases: ``T`` with ``A = T R``, which makes a layer upper triangular.

An orthogonal ``T`` (``[d, d]``, ``Tᵀ T = I``) leaves the length of every row as it is, ``|x T| =
|x|``, so it passes through whatever looks at the length alone, as an RMSNorm does. Nothing is
inverted, ``T⁻¹`` is ``Tᵀ``, and no rounding error grows. ``T`` comes from Householder's QR
decomposition in float64 (Golub and Van Loan, "Matrix Computations", section 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.device import Array, Device, Shape
from onnx_fold.algebra.expression import (
    Expression,
    Literal,
    Spool,
    cast,
    evaluate,
    product,
    reshape,
    transpose,
)

__all__ = ["OrthogonalBasis", "orthogonal_factor"]


@dataclass(frozen=True, eq=False)
class OrthogonalBasis(Basis):
    """A basis ``T`` that is orthogonal, ``matrix`` (``[d, d]``)."""

    def of_writer(self, w: Expression) -> Expression:
        """``w T``, for ``w`` of shape ``[..., d]``."""
        rows = reshape(w, (-1, w.shape[-1]))
        return reshape(product(rows, self.matrix), w.shape)

    def of_reader(self, r: Expression) -> Expression:
        """``Tᵀ r``, for ``r`` of shape ``[d, n]``."""
        return product(cast(transpose(self.matrix), r.dtype), r)


def orthogonal_factor(matrix: Expression, spool: Spool) -> Expression:
    """``T`` of ``A = T R``: orthogonal, float64 ``[d, d]``.

    It is computed when it is first needed, and kept on disk until it is written: the proof and the
    weights use the same numbers, whose rounding is no error as long as they are orthogonal.

    Args:
        matrix: ``A``, ``[d, n]``; its first ``d`` columns decide.
        spool: Where to keep ``T``.
    """
    return _Factor(matrix, spool)


@dataclass(frozen=True, eq=False)
class _Factor(Expression):
    source: Expression
    spool: Spool

    @property
    def shape(self) -> Shape:
        return self.source.shape[0], self.source.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    @cached_property
    def found(self) -> Expression:
        """``T``, once it is known; NaN where ``A`` is not finite, so that no such fold is taken."""
        matrix = evaluate(cast(self.source, np.float64))
        width = len(matrix)
        if not np.isfinite(matrix).all():
            return Literal(np.full((width, width), np.nan))
        factor: Array = scipy.linalg.qr(
            matrix[:, :width], mode="full", overwrite_a=True, check_finite=False
        )[0]
        return self.spool.add(factor)

    def stored(self) -> Array | None:
        return self.found.stored()

    def compute(self, device: Device, *operands: Any) -> Any:
        return self.found.compute(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return Literal, (evaluate(self.found),)
