"""Merge a sole writer into its readers, or a sole reader into its writers.

``(x P + b) M = x (P M) + b M``: two projections become one, nothing is inverted, and the error is
no worse than before. This is P into the FFN of Graef, arXiv 2404.12362, fig. 2(a), where ``M`` is
the FFN's input layer or its gate and up layers. Weights that would grow (a low-rank pair) refuse
it.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_fold.engine import (
    Basis,
    Candidate,
    CannotRewriteError,
    FoldPass,
    Proposal,
    Reader,
    Rewrite,
    Stream,
    Writer,
    become_identity,
    carry_biases,
    compact,
    in_place,
    propose,
    rebase,
    resize_stream,
)


class MergePass(FoldPass):
    """Multiply out two linear layers in a row, wherever weights do not grow."""

    name = "merge"
    is_basis_change = False

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield the merge of the sole writer, or of the sole reader, if there is one."""
        writers = [] if stream.tables or len(stream.writers) > 1 else stream.writers
        single = [writer for writer in writers if writer.num_matrices == 1]
        readers = stream.readers if len(stream.readers) == 1 else []
        if single and (single[0].keeps_layout or not any(each.keeps_layout for each in readers)):
            (writer,) = single
            text = f"{writer.label} into {compact(stream.read_by)}"
            yield propose(self.name, text, lambda: _merge_writer(stream, writer, text))
        elif readers and readers[0].num_matrices == 1:
            (reader,) = readers
            text = f"{reader.label} into {compact(stream.written_by)}"
            yield propose(self.name, text, lambda: _merge_reader(stream, reader, text))


def _merge_writer(stream: Stream, writer: Writer, text: str) -> Candidate:
    """Readers become ``P R``; the stream carries what ``P`` read."""
    width = writer.in_features
    rewrite = Rewrite()
    carry_biases(stream, writer, rewrite)
    if not writer.keeps_layout:
        raise CannotRewriteError(f"{writer.label} {writer.moves}")
    rewrite.replaced[writer.y] = in_place(rewrite, writer)
    stored = rebase(stream, Basis(writer.matrix, inverted=True), width, pivot=writer).stored
    rewrite.stored |= {reader.edge: stored[reader.edge] for reader in stream.readers}
    if width != stream.width:
        kept = [value for value in stream.values if value not in rewrite.replaced]
        resize_stream(stream, kept, width, rewrite)
    return Candidate(MergePass.name, text, rewrite)


def _merge_reader(stream: Stream, reader: Reader, text: str) -> Candidate:
    """Writers become ``W R``; the stream carries what ``R`` wrote."""
    width = reader.out_features
    rewrite = rebase(stream, Basis(reader.matrix), width, pivot=reader)
    become_identity(rewrite, reader)
    if width != stream.width:
        resize_stream(stream, stream.values, width, rewrite)
    return Candidate(MergePass.name, text, rewrite)
