"""Select heads: whole heads of Q, K and V, together as wide as the stream, become its basis.

``T`` is ``d`` columns of ``[Q | K | V]``, the heads that are best conditioned together. Writers
become ``W T``; the chosen heads are slices of the stream, and only the others are multiplied, by
``T⁻¹ R``. Never half a head: the layout downstream counts in heads. It needs no square reader and
no linear writer, so it serves the embedding of a model with heads · head_dim > hidden_size (Gemma).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import Basis, Side, product_dtype
from onnx_fold.algebra.device import Indices
from onnx_fold.algebra.expression import (
    Concatenate,
    FoldedTensor,
    Literal,
    Spread,
    cast,
    evaluate,
    take,
    transpose,
)
from onnx_fold.algebra.selection import select_blocks
from onnx_fold.engine.folding import Candidate, FoldPass, Options
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.rewriting.rebase import rebase, weights_of
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.heads import head_layout, role
from onnx_fold.streams.stream import Stream


class SelectPass(FoldPass):
    """Let the best conditioned heads of Q, K and V be the stream itself."""

    name = "select"
    operators = 3

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
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

    def _heads(self, layers: Sequence[Linear], head_dim: int) -> Indices:
        """The best heads of ``layers``, found once for the same weights; none if not finite."""
        tensors = tuple(layer.weight.tensor for layer in layers)
        if tensors not in self._selected:
            matrix = evaluate(Concatenate(tuple(map(weights_of, layers)), 1))
            is_finite = bool(np.isfinite(matrix).all())
            blocks = select_blocks(matrix, head_dim) if is_finite else np.zeros(0, np.intp)
            self._selected[tensors] = blocks
        return self._selected[tensors]


def _head_dim(stream: Stream, reader: Linear) -> int | None:
    """Channels of a head, if ``reader`` makes heads and its output can be put together anew."""
    is_plain = reader.is_plain and reader.bias is None
    if not is_plain or reader.y.is_graph_output() or role(reader.y) is None:
        return None
    layout = head_layout(reader.y, reader.out_features, stream.shapes)
    return layout.head_dim if layout is not None else None


@dataclass(frozen=True)
class _Share:
    """What one reader contributes to the basis.

    Attributes:
        reader: The layer.
        chosen: Its columns that are in the basis, sorted.
        others: Its columns that are not.
        offset: Where the first chosen one stands in the basis.
    """

    reader: Linear
    chosen: Indices
    others: Indices
    offset: int


def _select(stream: Stream, layers: Sequence[Linear], heads: Indices, head_dim: int) -> Candidate:
    columns = np.sort((heads[:, None] * head_dim + np.arange(head_dim)).ravel())
    shares: list[_Share] = []
    start = offset = 0
    for layer in layers:
        own = np.arange(layer.out_features)
        is_chosen = np.isin(own + start, columns)
        share = _Share(layer, own[is_chosen], own[~is_chosen], offset)
        start, offset = start + len(own), offset + len(share.chosen)
        if len(share.chosen):
            shares.append(share)

    chosen = (take(weights_of(share.reader), share.chosen, 1) for share in shares)
    basis = Basis(Concatenate(tuple(chosen), 1))
    rebased = rebase(stream, basis, stream.width, pivot=shares[0].reader)
    rewrite = Rewrite(stored=rebased.stored)
    for share in shares:
        rewrite.stored.pop(share.reader.edge, None)
        side = _assemble(stream, share, basis, rewrite)
        rebased.readers[stream.readers.index(share.reader)] = side
    names = compact([share.reader.label for share in shares])
    into = compact(stream.written_by)
    return Candidate(
        strategy=SelectPass.name,
        text=f"{len(heads)} heads of {names} into {into}",
        rewrite=rewrite,
        writers=rebased.writers,
        readers=rebased.readers,
        basis=basis,
    )


def _assemble(stream: Stream, share: _Share, basis: Basis, rewrite: Rewrite) -> Side:
    """Plan to put the output of a reader together from slices of the stream and the other heads."""
    reader, others = share.reader, share.others
    rest = FoldedTensor(basis.of_reader(take(weights_of(reader), others, 1)), reader.weight.dtype)
    runs = _runs(share)
    is_whole = len(runs) == 1 and len(share.chosen) == stream.width
    rewrite.nodes_added += (0 if is_whole else len(runs)) + (len(runs) > 1) + (len(others) > 0)
    rewrite.copied += 0 if is_whole else reader.out_features * min(len(runs), 2)
    if len(others):
        rewrite.added.append(rest)

    def build(editor: Editor) -> ir.Value:
        node = reader.node

        def step(operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            return editor.node(node, operator, inputs, **attributes).outputs[0]

        name = reader.weight.leaf.name

        if is_whole:
            return reader.x
        axes = editor.integers([-1], f"{name}_axes")
        product = None
        if len(others):
            product = step("MatMul", reader.x, editor.constant(rest, f"{name}_rest"))
        pieces = []
        for is_chosen, first, last in runs:
            source = reader.x if is_chosen or product is None else product
            bounds = [editor.integers([b], f"{name}_bound") for b in (first, last)]
            pieces.append(step("Slice", source, *bounds, axes))
        return pieces[0] if len(pieces) == 1 else step("Concat", *pieces, axis=-1)

    rewrite.replaced[reader.y] = build

    units = Literal(share.offset + np.arange(len(share.chosen)))
    order = Literal(np.concatenate([share.chosen, others]))
    columns = transpose(cast(rest.rounded, product_dtype(rest.dtype)))
    return Side(weights_of(reader), transpose(Spread(units, columns, order)))


def _runs(share: _Share) -> list[tuple[bool, int, int]]:
    """Consecutive columns from one source: (from the stream?, first, last) in that source."""
    runs: list[tuple[bool, int, int]] = []
    taken = {True: share.offset, False: 0}
    chosen = set(share.chosen.tolist())
    for column in range(share.reader.out_features):
        is_chosen = column in chosen
        at = taken[is_chosen]
        taken[is_chosen] += 1
        if runs and runs[-1][0] == is_chosen:
            runs[-1] = (is_chosen, runs[-1][1], at + 1)
        else:
            runs.append((is_chosen, at, at + 1))
    return runs
