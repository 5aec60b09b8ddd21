"""Absorb a square reader (or writer) into everything else that touches the stream.

With ``T = Q``: ``O* = O Q``, ``K* = Q⁻¹ K``, ``V* = Q⁻¹ V``, and Q is the identity (Graef,
arXiv 2404.12362, fig. 2(b); 2(c) and 2(d) for K and V of MHA). In the first block the embedding
table takes O's place. A square writer gives ``T = P⁻¹``, the choice for P in a parallel block. The
matrix has to be inverted, so the error grows with its condition number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_fold.algebra.expression import take
from onnx_fold.engine import (
    Basis,
    Candidate,
    FoldPass,
    Proposal,
    Stream,
    compact,
    propose,
    rebase,
    role,
)
from onnx_fold.rewriting.parts import take_out
from onnx_fold.streams.fused import Fused, Part, fused


class AbsorbPass(FoldPass):
    """Make a square layer of the stream the identity."""

    name = "absorb"

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield a candidate for each square layer that the pivot option admits."""
        for reader in stream.readers:
            if reader.is_square and self._admits(role(reader.y)):
                yield self.make_identity(stream, reader, Basis(reader.matrix))
            elif (parts := fused(reader, stream.shapes)) is not None:
                for part in parts.parts:
                    if len(part.columns) == stream.width and self._admits(part.role):
                        yield _absorb_part(stream, parts, part)
        for writer in stream.writers:
            if writer.is_square and self._admits("p"):
                yield self.make_identity(stream, writer, Basis(writer.matrix, inverted=True))

    def _admits(self, kind: str | None) -> bool:
        return self.options.pivot == "auto" or kind is None or kind == self.options.pivot


def _absorb_part(stream: Stream, fused: Fused, part: Part) -> Proposal:
    name = f"{fused.linear.label}{part.name}"
    text = f"{name} into {compact(stream.labels)}"
    return propose(AbsorbPass.name, text, lambda: _plan_part(stream, fused, part, text))


def _plan_part(stream: Stream, fused: Fused, part: Part, text: str) -> Candidate:
    """The columns of ``part`` are ``T``; the others become ``T⁻¹ R``."""
    reader = fused.linear
    kept = np.concatenate([other.columns for other in fused.parts if other is not part])
    chosen, others = (take(reader.matrix, columns, 1) for columns in (part.columns, kept))
    basis = Basis(chosen)
    rewrite = rebase(stream, basis, pivot=reader)
    rewrite.stored[reader.edge] = reader.store(basis.of_reader(others))
    take_out(stream, fused, part, rewrite)
    return Candidate(AbsorbPass.name, text, rewrite, basis)
