"""A pass of one's own: absorb the square reader that is best conditioned, and no other.

With ``T = R`` the reader ``R`` becomes the identity, writers become ``W T`` and the other readers
``T⁻¹ R'``. The error of ``T⁻¹`` grows with ``cond(T)``, so of all square readers the one with the
smallest condition number is taken (Graef, arXiv 2404.12362, fig. 2(b) to 2(d), names Q, K and V)::

    onnx-fold fold model.onnx -o folded.onnx --pass examples.best_conditioned:BestConditionedPass
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_fold.engine import Basis, FoldPass, Proposal, Stream


class BestConditionedPass(FoldPass):
    """Make the best conditioned square reader of a stream the identity."""

    name = "best-conditioned"

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield one proposal, if any reader is square."""
        bases = {reader: Basis(reader.matrix) for reader in stream.readers if reader.is_square}
        if bases:
            best = min(bases, key=lambda reader: bases[reader].condition)
            yield self.make_identity(stream, best, bases[best])
