"""Split: a layer behind some of the channels of a stream goes into the layers that write them.

``x [W₁, W₂] + [b₁, b₂]``, taken apart, and a layer U that reads the first part: ``(x W₁ + b₁) U``
is ``x (W₁ U) + b₁ U``, so the columns of U take the place of those of W₁, and the rest stays beside
them. Several layers that read one part are one layer with the columns of all. Nothing is inverted,
and the error is that of rounding one weight in the place of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import PieceBasis
from onnx_fold.algebra.expression import Concatenate, Expression, cast
from onnx_fold.engine import (
    Basis,
    Candidate,
    CannotRewriteError,
    Divided,
    FoldPass,
    Operand,
    Proposal,
    Reader,
    Recorder,
    Rewrite,
    Stream,
    compact,
    propose,
    rebase,
    resize_stream,
    with_bias,
)


class SplitPass(FoldPass):
    """Let a layer that reads a part of a stream's channels be columns of the layers in front."""

    name = "split"
    is_basis_change = False

    def of_divided(self, divided: Divided) -> Iterator[Proposal]:
        """Yield the merge of all layers that read the piece."""
        writers, readers = divided.stream.written_by, divided.behind.read_by
        text = f"{compact(readers)} into {compact(writers)}"
        yield propose(self.name, text, lambda: _plan(divided, text))


def _plan(divided: Divided, text: str) -> Candidate:
    """Writers become ``[W₁ U, W₂]``, and of what they write the pieces are taken anew."""
    stream, place, readers = divided.stream, divided.place, divided.behind.readers
    pieces = [piece.columns for piece in divided.pieces]
    sizes, widths = [len(columns) for columns in pieces], [each.out_features for each in readers]
    basis = PieceBasis(_side_by_side(readers), pieces=pieces, place=place)
    is_bare = len(divided.behind.values) == 1 and not divided.behind.shape_readers
    has_several = is_bare and len(readers) > 1
    new = widths if has_several else [sum(widths)]
    sizes[place : place + 1] = new
    rewrite = rebase(stream, basis, sum(sizes))
    if sum(sizes) != stream.width:
        resize_stream(stream, stream.values, sum(sizes), rewrite)
    made = _taken(rewrite.before(divided.cuts[0]), divided.value, sizes, stream)
    own, others = made[place : place + len(new)], [*made[:place], *made[place + len(new) :]]
    values = [piece.value for piece in divided.pieces if piece is not divided.piece]
    rewrite.replaced |= zip(values, others, strict=True)
    if not has_several:
        own = _followed(divided, own[0], basis.matrix, rewrite)
    for reader, value in zip(readers, own, strict=True):
        rewrite.replaced[reader.y] = with_bias(rewrite, reader, value)
    return Candidate(SplitPass.name, text, rewrite)


def _side_by_side(readers: Sequence[Reader]) -> Expression:
    """The columns of all ``readers``."""
    matrices = [reader.matrix for reader in readers]
    dtype = np.result_type(*(matrix.dtype for matrix in matrices))
    wide = [cast(matrix, dtype) for matrix in matrices]
    return wide[0] if len(wide) == 1 else Concatenate(*wide, axis=1)


def _followed(
    divided: Divided, piece: Operand, matrix: Expression, rewrite: Rewrite
) -> list[Operand]:
    """What stands in the place of each reader, if ``piece`` holds what all of them write.

    It goes the way of the piece before, with what is added to that.
    """
    behind, width = replace(divided.behind, readers=[]), matrix.shape[1]
    first, *others = divided.behind.readers
    if any(other.x is not first.x for other in others):
        raise CannotRewriteError(f"layers read '{divided.piece.value.name}' in several places")
    rewrite.replaced[divided.piece.value] = piece
    rewrite.stored |= rebase(behind, Basis(matrix), width).stored
    if width != behind.width:
        kept = [value for value in behind.values if value is not divided.piece.value]
        resize_stream(behind, kept, width, rewrite)
    sizes = [reader.out_features for reader in divided.behind.readers]
    return _taken(rewrite.before(first.node), first.x, sizes, behind)


def _taken(at: Recorder, value: ir.Value, sizes: Sequence[int], stream: Stream) -> list[Operand]:
    """Parts of the channels of ``value``, all of them; no Split is needed for one."""
    return list(at.split(value, sizes, stream.values[value])) if len(sizes) > 1 else [value]
