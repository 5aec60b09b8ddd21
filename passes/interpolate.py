"""Interpolate: ``d`` rows of a tall writer, or ``d`` columns of a wide reader, become the basis.

``O = [I; B] O₁`` with ``O₁`` ``d`` well-chosen rows of O and ``B = O₂ O₁⁻¹``. The stream becomes
``x' = h₁ + h₂ B`` and its readers ``O₁ Q``, ``O₁ K``, ``O₁ V``: the same ``d²`` weights go as when
a square reader is absorbed, but nothing is inverted, the coefficients are at most 1.5, and no
square matrix is needed. In the same way ``M = M₁ [I, C]`` for the wide first layer of an FFN: its
output becomes ``[x', x' C]``. The order of the rows (columns) goes into the weights before (behind)
the activation. Rows after S. Goreinov et al., "How to find a good submatrix", 2010.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import Basis, Side
from onnx_fold.algebra.device import Array
from onnx_fold.algebra.expression import FoldedTensor, Spool, cast, evaluate, scale, transpose
from onnx_fold.algebra.selection import RowSelection
from onnx_fold.engine.folding import Candidate, FoldPass, Options, Proposal, propose
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.rewriting.bias import carry_biases
from onnx_fold.rewriting.permute import Hidden, hidden_stream, permute
from onnx_fold.rewriting.rebase import Rebased, rebase, weights_of
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.heads import role
from onnx_fold.streams.stream import Stream


class InterpolatePass(FoldPass):
    """Give the stream a basis of rows of its tallest writer, or of columns of its widest reader."""

    name = "interpolate"
    operators = 1

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._spool = Spool()
        self._selections: dict[tuple[object, ...], RowSelection] = {}

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield candidates for the writer with most rows and the reader with most columns."""
        tall = [w for w in stream.writers if w.is_plain and w.in_features > stream.width]
        if tall and not stream.tables:
            writer = max(tall, key=lambda layer: layer.in_features)
            hidden = _hidden(stream, writer)
            rows = self._selection(writer, stream.rows_of(writer), hidden, is_reader=False)
            yield from _rows_of(stream, writer, hidden, rows)
        wide = [r for r in stream.readers if _can_be_joined(r) and r.out_features > stream.width]
        found = {reader: _hidden(stream, reader) for reader in wide}
        free = [reader for reader in wide if found[reader] is not None]
        if not free and not tall:  # the columns have to be put back in order: a last resort
            free = [reader for reader in wide if role(reader.y) is None and _pays(reader)]
        if free:
            reader = max(free, key=lambda layer: layer.out_features)
            columns = self._selection(reader, None, found[reader], is_reader=True)
            yield _columns_of(stream, reader, found[reader], columns)

    def _selection(
        self, layer: Linear, seen: Array | None, hidden: Hidden | None, *, is_reader: bool
    ) -> RowSelection:
        """The rows (columns) of ``layer``; the same weights are selected among only once."""
        weight = layer.weight
        free = None if hidden is None else hidden.free
        axes = weight.permutation, layer.in_axes, layer.out_axes
        key = weight.tensor, *axes, layer.alpha, is_reader, id(seen), str(free)
        if key not in self._selections:
            self._selections[key] = RowSelection(
                transpose(weights_of(layer)) if is_reader else weights_of(layer),
                weight.dtype,
                seen,
                self._spool,
                self.options.device,
                free=free,
                is_last=not is_reader,
            )
        return self._selections[key]


def _hidden(stream: Stream, layer: Linear) -> Hidden | None:
    """The hidden value, if the basis can stand first in it (of a reader) or last (of a writer).

    So both layers of an FFN find a place: the columns that its first layer copies to the front stay
    there when rows of its last layer are moved to the end.
    """
    hidden = hidden_stream(stream, layer)
    if hidden is None or hidden.free.stop - hidden.free.start <= stream.width:
        return None
    is_writer = layer in stream.writers
    at_the_end = hidden.free.stop == layer.in_features if is_writer else hidden.free.start == 0
    return hidden if at_the_end else None


def _pays(reader: Linear) -> bool:
    """Whether putting the columns in order moves less, for one token, than the weights saved.

    A Gather reads as many indices of 8 bytes as values, and writes the values.
    """
    return reader.in_features**2 > 4 * reader.out_features


def _can_be_joined(reader: Linear) -> bool:
    return reader.is_plain and reader.bias is None


def _rows_of(
    stream: Stream, writer: Linear, hidden: Hidden | None, rows: RowSelection
) -> Iterator[Proposal]:
    """Biases are expressed in the new basis, or carried through the readers."""
    text = f"{stream.width} rows of {writer.label} into {compact(stream.read_by)}"
    basis = Basis(rows.basis, inverted=True)
    rebased = rebase(stream, basis, stream.width, pivot=writer)
    held = None if writer.bias is None else rebased.stored.pop(writer.bias, None)
    own = held if isinstance(held, FoldedTensor) else None
    if writer.bias is None or own is not None:
        rewrite = Rewrite(stored=rebased.stored)
        candidate = _split(stream, writer, hidden, rows, rewrite, rebased, text, own)
        yield replace(candidate, basis=basis if len(rebased.writers) > 1 else None)

    def plan() -> Candidate:
        readers = {reader.edge: rebased.stored[reader.edge] for reader in stream.readers}
        carried = Rewrite(stored=readers)
        carry_biases(stream, writer, carried)
        without = replace(rebased, writers=[s for s in rebased.writers if isinstance(s, Side)])
        return _split(stream, writer, hidden, rows, carried, without, text)

    if len(stream.writers) == 1 and stream.constants:
        yield propose(InterpolatePass.name, text, plan)


def _split(
    stream: Stream,
    writer: Linear,
    hidden: Hidden | None,
    rows: RowSelection,
    rewrite: Rewrite,
    rebased: Rebased,
    text: str,
    own: FoldedTensor | None = None,
) -> Candidate:
    """``x' = h₂ B + h₁`` in the place of ``h O``, ``h = [h₂, h₁]``; ``own`` is its bias."""
    width, depth = stream.width, writer.in_features
    rest = FoldedTensor(rows.rest, writer.weight.dtype)
    rewrite.added.append(rest)
    bias = None if own is None else FoldedTensor(scale(own.expression, writer.beta), own.dtype)
    if bias is not None:
        rewrite.added.append(bias)
        rewrite.nodes_added += 1
    if hidden is not None:
        permute(hidden, writer, rows, rewrite)
    rewrite.nodes_added += 4 if hidden is None else 3
    rewrite.copied, rewrite.gathered = depth + width, 0 if hidden else depth

    def build(editor: Editor) -> ir.Value:
        value, node, name = writer.x, writer.node, writer.weight.leaf.name
        if hidden is None:
            indices = editor.integers(evaluate(rows.final_order), f"{name}_order")
            value = editor.node(node, "Gather", [value, indices], axis=-1).outputs[0]
        others, chosen = editor.split(node, value, [depth - width, width])
        weight = editor.constant(rest, f"{name}_rest")
        product = editor.node(node, "MatMul", [others, weight])
        total = editor.node(node, "Add", [product.outputs[0], chosen]).outputs[0]
        if bias is not None:
            held = editor.constant(bias, f"{name}_bias")
            total = editor.node(node, "Add", [total, held]).outputs[0]
        return total

    rewrite.replaced[writer.y] = build
    sides = list(rebased.writers)
    position = stream.writers.index(writer)
    before = rows.matrix
    after = rows.rebuilt(cast(rows.rest, before.dtype))
    sides[position] = Side(before, after, stream.rows_of(writer))
    return Candidate(InterpolatePass.name, text, rewrite, sides, rebased.readers)


def _columns_of(
    stream: Stream, reader: Linear, hidden: Hidden | None, columns: RowSelection
) -> Candidate:
    """``[x', x' C]`` in the place of ``x M``."""
    width = stream.width
    before = weights_of(reader)
    basis = Basis(transpose(columns.basis))
    rebased = rebase(stream, basis, width, pivot=reader)
    rest = FoldedTensor(transpose(columns.rest), reader.weight.dtype)
    rewrite = Rewrite(stored=rebased.stored, added=[rest], nodes_added=2 if hidden else 3)
    rewrite.copied = reader.out_features
    rewrite.gathered = 0 if hidden else reader.out_features
    if hidden is not None:
        permute(hidden, reader, columns, rewrite)

    def build(editor: Editor) -> ir.Value:
        node = reader.node
        weight = editor.constant(rest, f"{reader.weight.leaf.name}_rest")
        product = editor.node(node, "MatMul", [reader.x, weight]).outputs[0]
        value = editor.node(node, "Concat", [reader.x, product], axis=-1).outputs[0]
        if hidden is not None:
            return value
        places = np.argsort(evaluate(columns.final_order))
        indices = editor.integers(places, f"{reader.weight.leaf.name}_order")
        return editor.node(node, "Gather", [value, indices], axis=-1).outputs[0]

    rewrite.replaced[reader.y] = build
    sides = list(rebased.readers)
    after = transpose(columns.rebuilt(cast(columns.rest, before.dtype)))
    sides[stream.readers.index(reader)] = Side(before, after)
    into = compact([*stream.written_by, *(r.label for r in stream.readers if r is not reader)])
    text = f"{width} columns of {reader.label} into {into}"
    return Candidate(InterpolatePass.name, text, rewrite, rebased.writers, sides, basis)
