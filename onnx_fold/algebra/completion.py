"""A basis of which only some rows are those of a matrix: what fills it up conditions it better.

A basis of all ``d`` rows of a matrix is as good as its worst rows. With its longest columns of the
inverse gone, ``k`` rows are left; an orthonormal complement of their span, scaled to the size of
the rows, completes them. That gives up ``(d - k) d`` of the ``d²`` weights that a basis saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_fold.algebra.device import HOST, Array, Device, Indices
from onnx_fold.algebra.expression import (
    Concatenate,
    Expression,
    Leaf,
    Product,
    Spread,
    Sum,
    broadcast,
    cast,
    defined,
    evaluate,
    literal,
    take,
)
from onnx_fold.algebra.selection import RowSelection, Selection
from onnx_fold.algebra.storage import Later, OnDemand, Source


@dataclass(frozen=True)
class Worst:
    """The rows of a basis ``O₁`` (``[d, d]``) that condition it worst, and their complement.

    The columns of ``O₁⁻¹`` that belong to ``m`` rows are orthogonal to all others. With ``Q R``
    their QR decomposition, the complement is ``Qᵀ``, and the rows ``O_D`` are ``A O_S + E Qᵀ`` with
    ``E = O_D Q = R⁻¹`` and ``A = -E (Qᵀ O₁⁻¹)_S``. It is nested: the first rows and columns
    of ``Q`` and ``E`` do the same for fewer rows.

    Attributes:
        rows: Their places in the basis, the worst first, ``[m]``.
        complement: ``Qᵀ`` times the scale, ``[m, d]`` float64.
        solved: ``Qᵀ O₁⁻¹``, ``[m, d]`` float64.
        inside: ``E``, ``[m, m]`` float64.
        scale: The root mean square of the lengths of all rows.
    """

    rows: Indices
    complement: Array
    solved: Array
    inside: Array
    scale: float


def worst_rows(basis: Array, count: int, device: Device = HOST) -> Worst:
    """Find the rows of a basis that condition it worst.

    Rounding a coordinate of a vector adds an error in proportion to the length of its row, and to
    that of its column of the inverse, by which the coordinate is large. Without a row
    the columns of the others lose what is parallel to its own, so the longest is taken of what is
    left: QR with pivoting of the inverse, of which a few more random products than there are rows
    to find tell as much (P. Martinsson et al., "Randomized QR with column pivoting", 2017).

    Args:
        basis: ``[d, d]``.
        count: How many rows.
        device: Where to eliminate, in float64.
    """
    wide = basis.astype(np.float64)
    random = np.random.default_rng(0).standard_normal((len(wide), min(len(wide), count + 64)))
    with np.errstate(all="ignore"):  # a singular basis: nothing of it is finite
        factors = device.lu_factor(device.load(wide))

        def solve(rhs: Array, *, transposed: bool) -> Array:
            return device.fetch(device.lu_solve(factors, device.load(rhs), transposed))

        sizes = np.linalg.norm(wide, axis=1)
        rows = _longest(solve(random, transposed=True) * sizes[:, None], count)
        units = np.zeros((len(wide), count))
        units[rows, np.arange(count)] = 1.0
        q = np.linalg.qr(solve(units, transposed=False))[0]
        scale = float(np.sqrt(np.mean(sizes**2)))
        solved = np.ascontiguousarray(solve(q, transposed=True).T)
        return Worst(rows, scale * q.T, solved, wide[rows] @ q, scale)


def _longest(sketch: Array, count: int, rounds: int = 8) -> Indices:
    """The rows of ``sketch`` that are longest in what those taken before do not span."""
    found = np.zeros(0, np.intp)
    for most in np.linspace(0, count, rounds + 1).astype(int)[1:]:
        lengths = np.linalg.norm(sketch, axis=1)
        lengths[found] = -1.0
        new = np.argsort(-lengths, kind="stable")[: most - len(found)]
        found = np.concatenate((found, new))
        q = np.linalg.qr(sketch[new].T)[0]
        sketch = sketch - (sketch @ q) @ q.T
    return found


class Completion:
    """What takes the place of the worst rows of a selection, shared by all that keep the others."""

    def __init__(self, whole: RowSelection, most: int) -> None:
        """Complete ``whole`` without up to ``most`` of the rows of its basis."""
        self.whole = whole
        self.most = most
        self._parts: dict[int, PartialSelection] = {}

    def keeping(self, kept: int) -> PartialSelection:
        """The selection of which ``kept`` rows are left."""
        if kept not in self._parts:
            self._parts[kept] = PartialSelection(self, kept)
        return self._parts[kept]

    @cached_property
    def _worst(self) -> tuple[Worst, Source, Source]:
        """The worst rows, with their large matrices kept on disk."""
        whole = self.whole
        worst = worst_rows(evaluate(whole.basis, whole.device), self.most, whole.device)
        complement, solved = (whole.spool.add(each) for each in (worst.complement, worst.solved))
        nothing = np.zeros((0, 0))
        return Worst(worst.rows, nothing, nothing, worst.inside, worst.scale), complement, solved

    def rows(self, count: int) -> Indices:
        """The places of the ``count`` worst rows in the basis."""
        return self._worst[0].rows[:count]

    def complement(self, count: int) -> Array:
        """What completes all rows but those, ``[count, d]`` float64."""
        return self._worst[1].mapped()[:count]

    def dropped(self, count: int) -> Source:
        """Those rows by the ones that are left and the complement: ``[A, E]``, ``[count, d]``."""
        worst, _, solved = self._worst
        left = np.delete(np.arange(self.whole.kept), worst.rows[:count])
        inside = worst.inside[:count, :count]
        a = -inside @ np.take(solved.mapped()[:count], left, 1)
        both = np.concatenate((a, inside / worst.scale), axis=1)
        return self.whole.spool.add(both.astype(self.whole.matrix.dtype))


class PartialSelection(Selection):
    """``k`` rows of a matrix ``[f, d]``, completed to a basis by what they do not span.

    With ``O₁ = [O_S; O_D]`` the basis of the whole selection, ``O₂ = B O₁`` and
    ``O_D = [A, E] [O_S; C]``, the others are ``O₂ = ([B_S, 0] + B_D [A, E]) [O_S; C]``.
    """

    def __init__(self, completion: Completion, kept: int) -> None:
        """Keep the ``kept`` rows of a basis that condition it best."""
        whole = completion.whole
        super().__init__(whole.matrix, whole.free, kept, is_last=whole.is_last)
        self._whole = whole
        self._completion = completion
        width = whole.kept
        self._count = count = width - kept
        kind = whole.matrix.dtype
        first = take(self.matrix, take(self.order, slice(kept), 0), 0)
        complement = OnDemand(
            (count, width), np.dtype(np.float64), lambda: completion.complement(count)
        )
        self.basis = Concatenate(first, cast(Leaf(source=complement), kind), axis=0)
        self.rest = defined(cast(self._rest(), whole.dtype.numpy()), self.formula)

    def _rest(self) -> Expression:
        whole, width, count, kept = self._whole, self._whole.kept, self._count, self.kept
        rows = whole.matrix.shape[0] - kept
        dropped, left, order = (
            Leaf(source=OnDemand((size,), np.dtype(np.intp), found))
            for size, found in (
                (count, lambda: self._completion.rows(count)),
                (kept, lambda: self._left),
                (rows, lambda: self._places),
            )
        )
        spread = Spread(dropped, whole.coefficients, order)
        kind = whole.matrix.dtype
        a_and_e = Later((count, width), kind, lambda: self._completion.dropped(count))
        zeros = broadcast(literal(np.zeros((1, 1), kind)), (rows, count))
        direct = Concatenate(take(spread, left, 1), zeros, axis=1)
        return Sum(direct, Product(take(spread, dropped, 1), Leaf(source=a_and_e)))

    @property
    def _left(self) -> Indices:
        """The places in the basis of the rows that are left."""
        return np.delete(np.arange(self._whole.kept), self._completion.rows(self._count))

    @property
    def _fixed(self) -> int:
        """How many rows stand in front of those that are free."""
        return self.free.start if self.is_last else 0

    @property
    def _places(self) -> Indices:
        """Where the dropped rows stand among the others, and then these."""
        rows = np.arange(self.matrix.shape[0] - self.kept)
        dropped = slice(self._fixed, self._fixed + self._count)
        return np.concatenate((rows[dropped], np.delete(rows, dropped)))

    def found(self) -> Indices:
        """The order of all rows, those that are left first; behind what is not free the dropped."""
        order = self._whole.found()
        width = self._whole.kept
        basis, others = order[:width], order[width:]
        dropped = basis[self._completion.rows(self._count)]
        before, behind = others[: self._fixed], others[self._fixed :]
        return np.concatenate((basis[self._left], before, dropped, behind))
