"""Merge a sole writer into its readers, or a sole reader into its writers.

``(x P + b) M = x (P M) + b M``: two projections become one, nothing is inverted, and the error is
no worse than before. This is P into the FFN of Graef, arXiv 2404.12362, fig. 2(a), where ``M`` is
the FFN's input layer or its gate and up layers. Weights that would grow (a low-rank pair) refuse
it.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_fold.basis import Basis
from onnx_fold.bias import carry_biases
from onnx_fold.folding import Candidate, FoldPass
from onnx_fold.linear import Linear, compact
from onnx_fold.rebase import become_identity, rebase
from onnx_fold.resize import CannotResizeError, resize_stream
from onnx_fold.rewrite import Rewrite
from onnx_fold.stream import Stream


class MergePass(FoldPass):
    """Multiply out two linear layers in a row, wherever weights do not grow."""

    name = "merge"
    is_basis_change = False

    def candidates(self, stream: Stream) -> Iterator[Candidate]:
        """Yield the merge of the sole writer, or of the sole reader, if there is one."""
        if len(stream.writers) == 1 and not stream.tables:
            yield from _merge_writer(stream, stream.writers[0])
        elif len(stream.readers) == 1:
            yield from _merge_reader(stream, stream.readers[0])


def _merge_writer(stream: Stream, writer: Linear) -> Iterator[Candidate]:
    """Readers become ``P R``; the stream carries what ``P`` read."""
    width = writer.in_features
    rewrite = Rewrite()
    if not writer.keeps_layout:
        return
    if not carry_biases(stream, writer, rewrite):
        return
    rewrite.replaced[writer.y] = writer.x
    basis = Basis(writer.matrix, inverted=True)
    rebased = rebase(stream, basis, width, pivot=writer)
    for reader in stream.readers:
        rewrite.stored[reader.edge] = rebased.stored[reader.edge]
    try:
        if width != stream.width:
            kept = [value for value in stream.values if value not in rewrite.replaced]
            resize_stream(stream, kept, width, rewrite)
    except CannotResizeError:
        return
    into = compact(stream.read_by)
    writers = [side for side in rebased.writers if not side.is_table]
    yield Candidate(
        strategy=MergePass.name,
        text=f"{writer.label} into {into}",
        rewrite=rewrite,
        writers=writers,
        readers=rebased.readers,
    )


def _merge_reader(stream: Stream, reader: Linear) -> Iterator[Candidate]:
    """Writers become ``W R``; the stream carries what ``R`` wrote."""
    width = reader.out_features
    if not reader.keeps_layout:
        return
    rebased = rebase(stream, Basis(reader.matrix), width, pivot=reader)
    rewrite = Rewrite(stored=rebased.stored)
    if not become_identity(rewrite, reader):
        return
    try:
        if width != stream.width:
            resize_stream(stream, stream.values, width, rewrite)
    except CannotResizeError:
        return
    into = compact(stream.written_by)
    yield Candidate(
        strategy=MergePass.name,
        text=f"{reader.label} into {into}",
        rewrite=rewrite,
        writers=rebased.writers,
        readers=rebased.readers,
    )
