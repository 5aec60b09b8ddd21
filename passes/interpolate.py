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

from onnx_fold.basis import Basis, Side
from onnx_fold.bias import carry_biases
from onnx_fold.expression import FoldedTensor, cast, evaluate, transpose
from onnx_fold.folding import Candidate, FoldPass, attempt
from onnx_fold.linear import Linear, compact
from onnx_fold.permute import hidden_stream, permute
from onnx_fold.rebase import Rebased, rebase, weights_of
from onnx_fold.report import CandidateReport
from onnx_fold.rewrite import Rewrite, new_constant, new_node, new_split
from onnx_fold.selection import RowSelection
from onnx_fold.stream import Stream


class InterpolatePass(FoldPass):
    """Give the stream a basis of rows of its tallest writer, or of columns of its widest reader."""

    name = "interpolate"
    operators = 1

    def candidates(self, stream: Stream) -> Iterator[Candidate | CandidateReport]:
        """Yield candidates for the writer with most rows and the reader with most columns."""
        tall = [w for w in stream.writers if w.is_plain and w.in_features > stream.width]
        if tall and not stream.tables:
            yield from _rows_of(stream, max(tall, key=lambda layer: layer.in_features))
        wide = [r for r in stream.readers if _can_be_joined(r) and r.out_features > stream.width]
        if wide:
            yield from _columns_of(stream, max(wide, key=lambda layer: layer.out_features))


def _can_be_joined(reader: Linear) -> bool:
    return reader.is_plain and reader.node.op_type == "MatMul"


def _rows_of(stream: Stream, writer: Linear) -> Iterator[Candidate | CandidateReport]:
    """Biases are expressed in the new basis, or else carried through the readers."""
    text = f"{stream.width} rows of {writer.label} into {compact(stream.read_by)}"
    rows = RowSelection(weights_of(writer), writer.weight.dtype, stream.rows_of(writer))
    basis = Basis(rows.basis, inverted=True)
    rebased = rebase(stream, basis, stream.width, pivot=writer)
    if writer.node.op_type != "Gemm":  # its bias would need an Add of its own
        rewrite = Rewrite(stored=rebased.stored)
        candidate = _split(stream, writer, rows, rewrite, rebased, text)
        yield replace(candidate, basis=basis if len(rebased.writers) > 1 else None)

    def plan() -> Candidate:
        readers = {reader.edge: rebased.stored[reader.edge] for reader in stream.readers}
        carried = Rewrite(stored=readers)
        carry_biases(stream, writer, carried)
        without = replace(rebased, writers=[s for s in rebased.writers if isinstance(s, Side)])
        return _split(stream, writer, rows, carried, without, text)

    if len(stream.writers) == 1 and stream.constants:
        yield attempt(InterpolatePass.name, text, plan)


def _split(
    stream: Stream,
    writer: Linear,
    rows: RowSelection,
    rewrite: Rewrite,
    rebased: Rebased,
    text: str,
) -> Candidate:
    """``x' = h₁ + h₂ B`` in the place of ``h O``."""
    width, depth = stream.width, writer.in_features
    rewrite.added.append(rows.rest)
    hidden = hidden_stream(stream, writer)
    if hidden is not None:
        permute(hidden, writer, rows.order, rewrite)
    rewrite.nodes_added += 4 if hidden is None else 3

    def build(graph: ir.Graph) -> ir.Value:
        value, node, name = writer.x, writer.node, writer.weight.leaf.name
        if hidden is None:
            order = ir.tensor(evaluate(rows.order).astype(np.int64))
            indices = new_constant(graph, order, f"{name}_order")
            value = new_node(graph, node, "Gather", [value, indices], axis=-1).outputs[0]
        head, tail = new_split(graph, node, value, [width, depth - width])
        rest = new_constant(graph, rows.rest, f"{name}_rest")
        product = new_node(graph, node, "MatMul", [tail, rest])
        return new_node(graph, node, "Add", [head, product.outputs[0]]).outputs[0]

    rewrite.replaced[writer.y] = build
    sides = list(rebased.writers)
    position = stream.writers.index(writer)
    before = rows.matrix
    after = rows.rebuilt(cast(rows.rest.rounded, before.dtype))
    sides[position] = Side(before, after, stream.rows_of(writer))
    return Candidate(InterpolatePass.name, text, rewrite, sides, rebased.readers)


def _columns_of(stream: Stream, reader: Linear) -> Iterator[Candidate]:
    """``[x', x' C]`` in the place of ``x M``."""
    hidden = hidden_stream(stream, reader)
    if hidden is None:
        return
    width = stream.width
    before = weights_of(reader)
    rows = RowSelection(transpose(before), reader.weight.dtype)
    basis = Basis(transpose(rows.basis))
    rebased = rebase(stream, basis, width, pivot=reader)
    rest = FoldedTensor(transpose(rows.rest.expression), reader.weight.dtype)
    rewrite = Rewrite(stored=rebased.stored, added=[rest], nodes_added=2)
    permute(hidden, reader, rows.order, rewrite)

    def build(graph: ir.Graph) -> ir.Value:
        node = reader.node
        weight = new_constant(graph, rest, f"{reader.weight.leaf.name}_rest")
        product = new_node(graph, node, "MatMul", [reader.x, weight]).outputs[0]
        return new_node(graph, node, "Concat", [reader.x, product], axis=-1).outputs[0]

    rewrite.replaced[reader.y] = build
    sides = list(rebased.readers)
    after = transpose(rows.rebuilt(cast(rows.rest.rounded, before.dtype)))
    sides[stream.readers.index(reader)] = Side(before, after)
    into = compact([*stream.written_by, *(r.label for r in stream.readers if r is not reader)])
    text = f"{width} columns of {reader.label} into {into}"
    yield Candidate(InterpolatePass.name, text, rewrite, rebased.writers, sides, basis)
