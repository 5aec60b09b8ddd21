"""Select heads: whole heads of Q, K and V, together as wide as the stream, become its basis.

``T`` is ``d`` columns of ``[Q | K | V]``, the heads that are best conditioned together. Writers
become ``W T``; the chosen heads are slices of the stream, and only the others are multiplied, by
``T⁻¹ R``. Never half a head: the layout downstream counts in heads. It needs no square reader and
no linear writer, so it serves the embedding of a model with heads · head_dim > hidden_size (Gemma).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Indices
from onnx_fold.algebra.expression import Concatenate, evaluate, take
from onnx_fold.algebra.selection import select_blocks
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
from onnx_fold.rewriting.selected import shares
from onnx_fold.streams.heads import head_layout


class SelectPass(FoldPass):
    """Let the best conditioned heads of Q, K and V be the stream itself."""

    name = "select"
    operators = 3

    def begin(self) -> None:
        """Forget what another fold has selected."""
        self._selected: dict[tuple[ir.TensorProtocol, ...], Indices] = {}

    def candidates(self, stream: Stream) -> Iterator[Candidate]:
        """Yield one candidate, if whole heads can make up the width of the stream."""
        readers = [(reader, _head_dim(stream, reader)) for reader in stream.readers]
        head_dims = {head_dim for _, head_dim in readers if head_dim is not None}
        if len(head_dims) != 1:
            return
        (head_dim,) = head_dims
        layers = [reader for reader, own in readers if own is not None]
        total = sum(layer.out_features for layer in layers)
        if stream.width % head_dim or total < stream.width:
            return
        heads = self._heads(layers, head_dim)
        if len(heads):
            yield _select(stream, layers, heads, head_dim)

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
    is_plain = reader.is_plain and reader.bias is None
    if not is_plain or reader.y.is_graph_output() or role(reader.y) is None:
        return None
    layout = head_layout(reader.y, reader.out_features, stream.shapes)
    return layout.head_dim if layout is not None else None


def _select(stream: Stream, layers: Sequence[Reader], heads: Indices, head_dim: int) -> Candidate:
    """``T`` is made of the chosen columns; the others become ``T⁻¹ R``."""
    columns = np.sort((heads[:, None] * head_dim + np.arange(head_dim)).ravel())
    found = list(shares(layers, columns))
    chosen = (take(share.reader.matrix, share.chosen, 1) for share in found)
    basis = Basis(Concatenate(*chosen, axis=1))
    rewrite = rebase(stream, basis)
    for share in found:
        reader = share.reader
        others = basis.of_reader(take(reader.matrix, share.others, 1))
        rewrite.stored.pop(reader.edge)
        rest = FoldedTensor(others, reader.weight.dtype)
        rewrite.replaced[reader.y] = share.assemble(rewrite.before(reader.node), rest)
    names, into = compact([share.reader.label for share in found]), compact(stream.written_by)
    text = f"{len(heads)} heads of {names} into {into}"
    return Candidate(SelectPass.name, text, rewrite, basis)
