"""Rotate: a layer beside a norm that stays becomes triangular, and its zeros are not stored.

An RMSNorm lets every orthogonal basis through, ``RMS(x T) = RMS(x)`` with ``Tᵀ T = I``
(:mod:`onnx_fold.streams.norms`). With the gain ``G`` in front of the readers, choose ``T`` by
``G Q = T R`` (QR): writers become ``W T``, readers ``Tᵀ G K``, the gain ones, and Q the upper
triangle ``R``. Its columns ``[c₁, c₂)`` have nothing below row ``c₂``: as ``b`` panels, each of
which reads only the first channels, ``n[:c₂] R[:c₂, c₁:c₂]``, it stores ``(1 - 1/b) / 2 · d²``
weights less. ``T`` has ``d (d - 1) / 2`` free numbers, so no choice can save more than half of d².
Panels cost operators: ``b`` is what saves most time, of 1, 2 and 4, or eight for size.

The ``d`` columns may be those of several readers side by side: where K and V are narrow (GQA), K
reads only its own number of channels, V as many more, and no output has to be put together. Or the
first ``d`` rows of a writer become a lower triangle, ``W T``, whose panels read ``h[c₁:]``. S.
Ashkboos et al., "SliceGPT", arXiv 2401.15024, rotate an RMSNorm's stream so too, to cut channels
off; nothing is cut off here.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_fold.algebra.expression import Expression
from onnx_fold.algebra.rotation import OrthogonalBasis, orthogonal_factor
from onnx_fold.algebra.storage import Spool
from onnx_fold.engine import (
    Candidate,
    CandidateReport,
    FoldPass,
    Group,
    Proposal,
    Stream,
    propose,
    rebase,
)
from onnx_fold.engine.cost import TARGETS, Target
from onnx_fold.rewriting.bias import take_gains
from onnx_fold.rewriting.panels import USUAL, Triangle, cut, triangles
from onnx_fold.streams.norms import is_residual, squares


class RotatePass(FoldPass):
    """Give a stream with norms the orthogonal basis in which one of its layers is triangular."""

    name = "rotate"
    operators = 2
    group = Group.ORTHOGONAL

    def begin(self) -> None:
        """Forget the triangles of another fold."""
        self._spool = Spool()
        self._factors: dict[tuple[object, ...], Expression] = {}

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield the triangle that saves most time; for size, or with ``force``, most weights."""
        found = [each for each in triangles(stream) if each.weights > 0]
        if not found:
            return
        few = [each for each in found if each.count <= USUAL]
        usual = max(few, key=Triangle.size)
        best, why = self._best(found if self.options.target is None else few), ""
        if is_residual(stream):
            why = "does not pay in a residual model"
        elif self.options.target and _saved(best, TARGETS[self.options.target]) <= 0:
            why = f"does not pay in time on {self.options.target}"
        if why and not self.options.force:
            text = f"{usual.weights / stream.width**2:.3g} d² by rotation"
            yield CandidateReport(self.name, text, usual.weights, usual.work.nodes, refused=why)
            return
        yield propose(self.name, best.text, lambda: _rotate(stream, best, self._factor(best)))

    def _best(self, found: list[Triangle]) -> Triangle:
        if self.options.target is None or self.options.force:
            return max(found, key=Triangle.size)
        target = TARGETS[self.options.target]
        return max(found, key=lambda each: (_saved(each, target), -each.work.copied))

    def _factor(self, triangle: Triangle) -> Expression:
        """``T``, found once for the same weights."""
        key: list[object] = [triangle.is_writer, triangle.stream.keeps_ones]
        for panels in triangle.panels:
            layer, gain = panels.layer, triangle.stream.gains.get(panels.layer.x)
            key += [layer.weight.tensor, layer.weight.permutation, layer.in_axes, layer.alpha]
            key += [None if gain is None else gain.weight.tensor]
        if tuple(key) not in self._factors:
            keeps = triangle.stream.keeps_ones
            made = orthogonal_factor(triangle.matrix, self._spool, keeps_ones=keeps)
            self._factors[tuple(key)] = made
        return self._factors[tuple(key)]


def _saved(triangle: Triangle, target: Target) -> float:
    """What it saves on ``target`` for one token, see :meth:`Target.saved`."""
    return target.saved(triangle.work, triangle.weights, triangle.stream.dtype.itemsize)


def _rotate(stream: Stream, triangle: Triangle, factor: Expression) -> Candidate:
    rewrite = rebase(stream, OrthogonalBasis(factor))
    rewrite.mixed += squares(stream)
    take_gains(stream, rewrite)
    for panels in triangle.panels:
        rewrite.stored.pop(panels.layer.edge, None)
        cut(panels, triangle.stored(panels, factor), rewrite)
    return Candidate(RotatePass.name, triangle.text, rewrite)
