"""A basis of which only some rows are those of a matrix: what fills it up conditions it better.

A basis of all ``d`` rows of a matrix is as good as its worst rows. With these gone, ``k`` rows are
left; an orthonormal complement of their span, scaled to the size of the rows, completes them. That
gives up ``(d - k) d`` of the ``d²`` weights that a basis saves. Two thirds more rows than have to
go are given up at first, a quarter of them at a time: of all that are not in the basis then, the
best take their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_fold.algebra.device import HOST, Array, Device, Indices, divide
from onnx_fold.algebra.expression import (
    Concatenate,
    Expression,
    Leaf,
    Product,
    Spread,
    Sum,
    Take,
    broadcast,
    cast,
    defined,
    evaluate,
    literal,
    take,
)
from onnx_fold.algebra.selection import RowSelection, Selection, lengths
from onnx_fold.algebra.storage import Later, OnDemand, Source, Spool
from onnx_fold.base.threads import once


@dataclass(frozen=True)
class Gap:
    """What a basis ``O₁`` (``[d, d]``) loses without the ``m`` rows that condition it worst.

    The columns of ``O₁⁻¹`` that belong to these rows, ``O_D``, are orthogonal to the others,
    ``O_S``. With ``Q`` an orthonormal basis of what they span ``C = Qᵀ`` is the complement of
    ``O_S``, and ``O_D = A O_S + E C`` with ``E = O_D Q`` and ``A = -E (C O₁⁻¹)_S``.

    Attributes:
        dropped: The places of the rows in the basis, ``[m]``.
        left: The places of the others, ``[d - m]``.
        complement: ``C``, ``[m, d]`` float64.
        along: ``A``, ``[m, d - m]`` float64.
        outside: ``E``, ``[m, m]`` float64.
    """

    dropped: Indices
    left: Indices
    complement: Array
    along: Array
    outside: Array


STEPS = 4
"""In how many steps rows are given up: whoever conditions a basis badly depends on the others."""


def find_gap(basis: Array, count: int, device: Device = HOST, samples: int = 64) -> Gap:
    """Find the ``count`` rows of a ``basis`` that condition it worst.

    Rounding a coordinate of a vector adds an error in proportion to the length of its row, and to
    that of its column of the inverse, by which the coordinate is large. As many random products as
    there are ``samples`` tell how long the columns are; what those of the rows that were given up
    before span does not count.
    """
    wide = basis.astype(np.float64)
    factors = device.lu_factor(device.load(wide))

    def solve(rhs: Array, *, transposed: bool) -> Array:
        return device.fetch(device.lu_solve(factors, device.load(rhs), transposed))

    random = np.random.default_rng(0).standard_normal((len(wide), samples))
    sizes, left, dropped = lengths(wide), np.arange(len(wide)), np.empty(0, np.intp)
    q = np.empty((len(wide), 0))
    with np.errstate(all="ignore"):  # a singular basis: nothing of it is finite
        for step in np.array_split(np.arange(count), min(count, STEPS)):
            columns = lengths(solve(random - q @ (q.T @ random), transposed=True))
            worst = left[np.argsort(-(columns * sizes)[left], kind="stable")[: len(step)]]
            units = np.zeros((len(wide), len(worst)))
            units[worst, np.arange(len(worst))] = 1.0
            inverse = solve(units, transposed=False)
            q = np.concatenate((q, np.linalg.qr(inverse - q @ (q.T @ inverse))[0]), axis=1)
            dropped, left = np.append(dropped, worst), np.setdiff1d(left, worst)
        outside = wide[dropped] @ q
        along = -outside @ solve(q, transposed=True)[left].T
        return Gap(dropped, left, q.T, along, outside)


def given_up_first(missing: int, width: int) -> int:
    """How many of ``width`` rows are given up at first where ``missing`` have to go."""
    return min(5 * missing // 3, width)


def size_of(rows: Array) -> float:
    """The root mean square of the lengths of ``rows``, ``[n, d]``."""
    return float(np.sqrt(np.mean(lengths(rows) ** 2)))


def farthest(rows: Array, count: int) -> Indices:
    """``count`` of ``rows`` (``[n, m]``), each the farthest from what those before it span.

    QR with column pivoting (P. Businger and G. Golub, "Linear least squares solutions by
    Householder transformations", 1965).
    """
    _, order = scipy.linalg.qr(rows.T, mode="r", pivoting=True, check_finite=False)
    return order[:count].astype(np.intp)


@dataclass(frozen=True)
class Exchange:
    """Rows ``O_P`` that take the place of the worst of a basis, ``O_D``, the best of them first.

    ``O_D = A O_S + E C`` and ``O_P = A_P O_S + F C`` with ``F`` lower triangular: where the first
    ``p`` of ``O_P`` are in the basis, the last ``m - p`` rows of ``C`` complete it.

    Attributes:
        dropped: The places in the basis of the rows that are given up, ``[m]``.
        left: The places of the others, ``[d - m]``.
        taken: Which rows take their place, counted in ``[O_D; O₂]``, ``[m]``.
        complement: ``C`` times the scale, ``[m, d]`` float64.
        along: ``[A; A_P]``, ``[2 m, d - m]`` float64.
        outside: ``[E; F]``, ``[2 m, m]`` float64.
        scale: The root mean square of the lengths of the rows of the basis.
    """

    dropped: Indices
    left: Indices
    taken: Indices
    complement: Source
    along: Source
    outside: Array
    scale: float

    def given_up(self, count: int) -> Array:
        """``O_D`` by ``O_S``, the first ``count`` of ``O_P``, and what completes them, ``[m, d]``.

        With ``G = E₁ F₁⁻¹``: ``O_D = (A - G A_P) O_S + G O_P + E₂ C₂``.
        """
        (a, a_taken), (e, f) = np.split(self.along.mapped(), 2), np.split(self.outside, 2)
        e, e_2 = np.split(e, [count], axis=1)
        with np.errstate(all="ignore"):  # rows that span less than the whole: not finite
            g = e.copy()
            divide(g, f[:count, :count])
            return np.concatenate((a - g @ a_taken[:count], g, e_2 / self.scale), axis=1)


def exchange(whole: RowSelection, count: int) -> Exchange:
    """Give up the ``count`` worst rows of a basis, and find the best rows for their places.

    Those are far from the span of the others, and not long themselves: what rounds the coordinate
    of a row is multiplied by the row.
    """
    basis = evaluate(whole.basis, whole.device)
    rest = evaluate(whole.coefficients)
    gap = find_gap(basis, count, whole.device)
    order = whole.found()
    rows = np.concatenate((order[gap.dropped], order[len(basis) :]))
    free = np.flatnonzero((rows >= whole.free.start) & (rows < whole.free.stop))
    sizes = np.maximum(whole.sizes[rows], np.finfo(rest.dtype).tiny)
    worth = whole.weights[rows, 0] / np.sqrt(sizes)
    with np.errstate(all="ignore"):
        outside = gap.outside.astype(rest.dtype)
        outside = np.concatenate((outside, rest[:, gap.dropped] @ outside))
        taken = free[farthest((outside * worth[:, None])[free], count)]
        own = np.zeros((count, len(basis)))
        is_other = taken >= count
        own[is_other] = rest[taken[is_other] - count]
        own[~is_other, gap.dropped[taken[~is_other]]] = 1.0
        along = own[:, gap.left] + own[:, gap.dropped] @ gap.along
        outside = own[:, gap.dropped] @ gap.outside
        q, r = np.linalg.qr(outside.T)
        scale = size_of(basis)
        return Exchange(
            *(gap.dropped, gap.left, taken),
            whole.spool.add(scale * (q.T @ gap.complement)),
            whole.spool.add(np.concatenate((gap.along, along))),
            np.concatenate((gap.outside @ q, r.T)),
            scale,
        )


class Completion:
    """What takes the place of the worst rows of a selection, shared by all that keep the others."""

    def __init__(self, whole: RowSelection, most: int) -> None:
        """Complete ``whole`` without up to ``most`` of the rows of its basis."""
        self.whole = whole
        self.count = given_up_first(most, whole.kept)
        self._parts: dict[int, PartialSelection] = {}

    def keeping(self, kept: int) -> PartialSelection:
        """The selection of which ``kept`` rows are left."""
        if kept not in self._parts:
            self._parts[kept] = PartialSelection(self, kept)
        return self._parts[kept]

    @once
    def exchange(self) -> Exchange:
        """Which rows are given up, and which take their place."""
        return exchange(self.whole, self.count)


class PartialSelection(Selection):
    """``k`` rows of a matrix ``[f, d]``, completed to a basis by what they do not span.

    With ``O₁`` the basis of the whole selection and ``O_D = M [O_S; O_P; C]`` those of its rows
    that are given up, its others are ``B O₁ = ([B_S, 0] + B_D M) [O_S; O_P; C]``.

    Attributes:
        completion: What it shares with those that keep more rows, or fewer.
    """

    def __init__(self, completion: Completion, kept: int) -> None:
        """Keep ``kept`` rows."""
        whole = completion.whole
        super().__init__(whole.matrix, whole.free, kept, is_last=whole.is_last)
        self._whole = whole
        self.completion = completion
        self._left = whole.kept - completion.count
        self._taken = kept - self._left
        width, kind = whole.kept, whole.matrix.dtype
        first = take(self.matrix, take(self.order, slice(kept), 0), 0)
        complement = Leaf(
            source=OnDemand((width - kept, width), np.dtype(np.float64), self._complement)
        )
        self.basis = Concatenate(first, cast(complement, kind), axis=0)
        self.rest = defined(cast(self._rest(), whole.dtype.numpy()), self.formula)

    @property
    def _exchange(self) -> Exchange:
        return self.completion.exchange

    def _complement(self) -> Array:
        return self._exchange.complement.mapped()[self._taken :]

    def _given_up(self) -> Source:
        given_up = self._exchange.given_up(self._taken)
        return self._whole.spool.add(given_up.astype(self.matrix.dtype))

    def _rest(self) -> Expression:
        whole, count, kind = self._whole, self.completion.count, self.matrix.dtype
        dropped, left, places = (
            Leaf(source=OnDemand((size,), np.dtype(np.intp), find))
            for size, find in (
                (count, lambda: self._exchange.dropped),
                (self._left, lambda: self._exchange.left),
                (self.matrix.shape[0] - self.kept, lambda: self._places),
            )
        )
        both = literal(np.arange(count + whole.coefficients.shape[0]))
        rows = Take(Spread(dropped, whole.coefficients, both), places, axis=0)
        given_up = Leaf(source=Later((count, whole.kept), kind, self._given_up))
        zeros = broadcast(literal(np.zeros((1, 1), kind)), (places.shape[0], count))
        direct = Concatenate(take(rows, left, 1), zeros, axis=1)
        return Sum(direct, Product(take(rows, dropped, 1), given_up))

    @property
    def _places(self) -> Indices:
        """The rows that are not kept, counted in ``[O_D; O₂]``; what stays in front is first."""
        count, fixed = self.completion.count, self.free.start if self.is_last else 0
        others = np.arange(count + len(self._whole.found()) - self._whole.kept)
        first, last = others[count : count + fixed], others[count + fixed :]
        behind = np.concatenate((others[:count], last))
        taken = self._exchange.taken[: self._taken]
        return np.concatenate((first, np.setdiff1d(behind, taken, assume_unique=True)))

    def found(self) -> Indices:
        """The order of all rows: those of the basis that are left, those taken, and the others."""
        order, found = self._whole.found(), self._exchange
        rows = np.concatenate((order[found.dropped], order[self._whole.kept :]))
        taken = rows[found.taken[: self._taken]]
        return np.concatenate((order[found.left], taken, rows[self._places]))


class FirstColumns:
    """The first columns of a matrix ``[d, n]``, and what completes so many of them to a basis.

    With ``Q R`` its QR decomposition, the first ``k`` columns of ``Q`` span those of the matrix,
    and the last ``d - k`` nothing of them.
    """

    def __init__(self, matrix: Expression, spool: Spool) -> None:
        self._matrix = matrix
        self._spool = spool
        self._q = Leaf(source=Later(2 * matrix.shape[:1], matrix.dtype, self._find))

    def _find(self) -> Source:
        matrix = evaluate(self._matrix)
        q = scipy.linalg.qr(matrix, check_finite=False)[0]
        return self._spool.add(q * size_of(matrix.T))

    def complement(self, count: int) -> Expression:
        """Orthonormal columns, times the size of those of the matrix, ``[d, d - count]``."""
        return take(self._q, slice(count, None), 1)
