"""Orthogonal bases: ``T`` with ``A = T R``, which makes a layer upper triangular.

An orthogonal ``T`` (``[d, d]``, ``Tᵀ T = I``) leaves the length of every row as it is, ``|x T| =
|x|``, so it passes through whatever looks at the length alone, as an RMSNorm does. Nothing is
inverted, ``T⁻¹`` is ``Tᵀ``, and no rounding error grows. ``T`` comes from Householder's QR
decomposition in float64 (Golub and Van Loan, "Matrix Computations", section 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.device import Array
from onnx_fold.algebra.expression import (
    Expression,
    Leaf,
    cast,
    evaluate,
    product,
    reshape,
    transpose,
)
from onnx_fold.algebra.storage import InMemory, Later, Source, Spool

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


def orthogonal_factor(matrix: Expression, spool: Spool, *, keeps_ones: bool = False) -> Expression:
    """``T`` of ``A = T R``: orthogonal, float64 ``[d, d]``.

    With ``keeps_ones`` ``T 1 = 1``, and ``R`` is a triangle but for a multiple of the vector of
    ones in each column: all numbers below the diagonal are the same. With ``C = I - 11ᵀ/d`` and the
    QR decompositions ``C A = U R₁`` and ``C = F R₂`` it is ``U Fᵀ + 11ᵀ/d``, as ``Tᵀ C A = F R₁ = C
    R₂⁻¹ R₁``.

    It is computed when it is first needed, and kept on disk until it is written: the proof and the
    weights use the same numbers, whose rounding is no error as long as they are orthogonal.

    Args:
        matrix: ``A``, ``[d, n]``; its first ``d`` columns decide.
        spool: Where to keep ``T``.
        keeps_ones: Whether ``T`` is to leave the vector of ones as it is.
    """
    width = matrix.shape[0]
    find = partial(_factor, matrix, spool, keeps_ones=keeps_ones)
    return Leaf(source=Later((width, width), np.dtype(np.float64), find))


def _factor(source: Expression, spool: Spool, *, keeps_ones: bool) -> Source:
    """``T``; NaN where ``A`` is not finite, so that no such fold is taken."""
    matrix = evaluate(cast(source, np.float64))
    width = len(matrix)
    if not np.isfinite(matrix).all():
        return InMemory(np.full((width, width), np.nan))
    if not keeps_ones:
        return spool.add(_orthogonal(matrix[:, :width]))
    ones = np.full((width, 1), 1.0)
    across = _orthogonal(np.hstack((ones, matrix[:, : width - 1])))[:, 1:]
    factor: Array = across @ _centred_units(width).T
    factor += 1.0 / width
    return spool.add(factor)


def _orthogonal(matrix: Array) -> Array:
    factor: Array = scipy.linalg.qr(matrix, mode="full", overwrite_a=True, check_finite=False)[0]
    return factor


def _centred_units(width: int) -> Array:
    """The unit vectors but the last, less their mean, made orthonormal in their order.

    ``[d, d - 1]``; those that Helmert's matrix has in its rows, from the other end.
    """
    behind = np.arange(width - 1, 0, -1)
    units = np.tril(np.broadcast_to(-1.0 / behind, (width, width - 1)), -1)
    np.fill_diagonal(units, 1.0)
    found: Array = units / np.sqrt(1.0 + 1.0 / behind)
    return found
