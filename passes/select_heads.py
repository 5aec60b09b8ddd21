"""Select heads: whole heads of Q, K and V, together as wide as the stream, become its basis.

``T`` is ``d`` columns of ``[Q | K | V]``, the heads that are best conditioned together. Writers
become ``W T``; the chosen heads are slices of the stream, and only the others are multiplied, by
``T⁻¹ R``. It needs no square reader and no linear writer, so it serves the embedding of a model
with heads · head_dim > hidden_size (Gemma). Where that is not accurate enough, ``T = [R_S, C]``
with the first ``k`` columns of the narrowest readers, and an orthonormal complement of what they
span: K and V are slices of the stream then, and most of Q; ``k d`` weights go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.completion import FirstColumns
from onnx_fold.algebra.device import Indices
from onnx_fold.algebra.expression import Concatenate, Expression, evaluate, take
from onnx_fold.algebra.selection import select_blocks
from onnx_fold.algebra.storage import Spool
from onnx_fold.engine import (
    Basis,
    Candidate,
    FoldedTensor,
    FoldPass,
    Reader,
    Stream,
    compact,
    rebase,
    role,
)
from onnx_fold.rewriting.selected import parts, shares
from onnx_fold.streams.heads import head_layout


class SelectPass(FoldPass):
    """Let the best conditioned heads of Q, K and V, or columns of readers, be the stream itself."""

    name = "select"
    operators = 3

    def begin(self) -> None:
        """Forget what another fold has selected."""
        self._selected: dict[tuple[ir.TensorProtocol, ...], Indices] = {}
        self._spool = Spool()

    def candidates(self, stream: Stream) -> Iterator[Candidate]:
        """Yield one candidate, if whole heads can make up the width of the stream, and parts."""
        whole = self._of_heads(stream)
        in_part = partial(self._in_part, stream)
        if whole is None:
            yield from in_part()
        else:
            whole.lesser = in_part
            yield whole

    def _of_heads(self, stream: Stream) -> Candidate | None:
        """The best conditioned heads, together as wide as the stream."""
        readers = [(reader, _head_dim(stream, reader)) for reader in stream.readers]
        head_dims = {head_dim for _, head_dim in readers if head_dim is not None}
        if len(head_dims) != 1:
            return None
        (head_dim,) = head_dims
        layers = [reader for reader, own in readers if own is not None]
        total = sum(layer.out_features for layer in layers)
        if stream.width % head_dim or total < stream.width:
            return None
        heads = self._heads(layers, head_dim)
        if not len(heads):
            return None
        columns = np.sort((heads[:, None] * head_dim + np.arange(head_dim)).ravel())
        return _select(stream, layers, columns, f"{len(heads)} heads")

    def _in_part(self, stream: Stream) -> Iterator[Candidate]:
        """The first columns of the narrowest layers, where none is wider than the stream.

        Well-chosen rows of a tall writer, or columns of a wide reader, condition it better.
        """
        sizes = [layer.in_features for layer in stream.writers]
        sizes += [layer.out_features for layer in stream.readers]
        if max(sizes, default=0) > stream.width:
            return
        layers = sorted(filter(_is_free, stream.readers), key=attrgetter("out_features"))
        total = sum(layer.out_features for layer in layers)
        counts = [count for count in parts(stream.width) if count <= total]
        if not counts:
            return
        matrix = Concatenate(*(layer.matrix for layer in layers), axis=1)
        first = FirstColumns(take(matrix, slice(max(counts)), 1), self._spool)
        for count in counts:
            columns = np.arange(count)
            candidate = _select(
                stream, layers, columns, f"{count} columns", first.complement(count)
            )
            candidate.degree_of = layers[0].edge, "columns"
            yield candidate

    def _heads(self, layers: Sequence[Reader], head_dim: int) -> Indices:
        """The best heads of ``layers``, found once for the same weights; none if not finite."""
        tensors = tuple(layer.weight.tensor for layer in layers)
        if tensors not in self._selected:
            matrix = evaluate(Concatenate(*(layer.matrix for layer in layers), axis=1))
            is_finite = bool(np.isfinite(matrix).all())
            blocks = select_blocks(matrix, head_dim) if is_finite else np.zeros(0, np.intp)
            self._selected[tensors] = blocks
        return self._selected[tensors]


def _head_dim(stream: Stream, reader: Reader) -> int | None:
    """Channels of a head, if ``reader`` makes heads and its output can be put together anew."""
    if not _is_free(reader) or role(reader.y) is None:
        return None
    layout = head_layout(reader.y, reader.out_features, stream.shapes)
    return layout.head_dim if layout is not None else None


def _is_free(reader: Reader) -> bool:
    """Whether the output of ``reader`` can be put together anew."""
    return reader.is_plain and reader.bias is None and not reader.y.is_graph_output()


def _select(
    stream: Stream,
    layers: Sequence[Reader],
    columns: Indices,
    what: str,
    complement: Expression | None = None,
) -> Candidate:
    """``T`` is made of the chosen columns, and what completes them; the others are ``T⁻¹ R``."""
    found = list(shares(layers, columns))
    chosen = [take(share.reader.matrix, share.chosen, 1) for share in found]
    completed = [] if complement is None else [complement]
    basis = Basis(Concatenate(*chosen, *completed, axis=1))
    rewrite = rebase(stream, basis)
    for share in found:
        reader = share.reader
        others = basis.of_reader(take(reader.matrix, share.others, 1))
        rewrite.stored.pop(reader.edge)
        rest = FoldedTensor(others, reader.weight.dtype)
        rewrite.replaced[reader.y] = share.assemble(rewrite.before(reader.node), rest)
    names, into = compact([share.reader.label for share in found]), compact(stream.written_by)
    return Candidate(SelectPass.name, f"{what} of {names} into {into}", rewrite, basis)
