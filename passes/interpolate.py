"""Interpolate: ``d`` rows of a tall writer, or ``d`` columns of a wide reader, become the basis.

``O = [I; B] O₁`` with ``O₁`` ``d`` well-chosen rows of O and ``B = O₂ O₁⁻¹``. The stream becomes
``x' = h₁ + h₂ B`` and its readers ``O₁ Q``, ``O₁ K``, ``O₁ V``: the same ``d²`` weights go as when
a square reader is absorbed, but nothing is inverted, the coefficients are at most 1.01, and no
square matrix is needed. Rows that condition it badly may be left out: ``O₁ = [O_S; C]`` with ``k``
rows and an orthonormal complement of their span, ``x' = [h_S, 0] + h_R B``, saves ``k d`` weights.
In the same way ``M = M₁ [I, C]`` for the wide first layer of an FFN: its output becomes
``[x', x' C]``, or ``[x'_S, x' C]`` with only ``k`` of its columns. The order of the rows (columns)
goes into the weights before (behind) the activation. Rows after S. Goreinov et al., "How to find a
good submatrix", 2010.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from onnx_fold.algebra.expression import transpose
from onnx_fold.engine import (
    Basis,
    Candidate,
    FoldPass,
    Operand,
    Proposal,
    Reader,
    Rewrite,
    Stream,
    Writer,
    carry_biases,
    compact,
    propose,
    rebase,
    role,
    with_bias,
)
from onnx_fold.rewriting.permute import hidden_beside
from onnx_fold.rewriting.selected import Rows, Selections


class InterpolatePass(FoldPass):
    """Give the stream a basis of rows of its tallest writer, or of columns of its widest reader."""

    name = "interpolate"
    operators = 1

    def begin(self) -> None:
        """Forget what another fold has selected."""
        self._select = Selections(self.options.device)

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield candidates for the writer with most rows and the reader with most columns."""
        tall = [w for w in stream.writers if w.is_pointwise and w.in_features > stream.width]
        if tall and not stream.tables:
            writer = max(tall, key=lambda layer: layer.in_features)
            rows = self._select(stream, writer)
            yield from self._of(rows, partial(_rows_of, stream, writer))
            if len(stream.writers) == 1 and stream.constants:
                yield from self._of(rows, partial(_rows_carrying_biases, stream, writer))
        plain = [reader for reader in stream.readers if reader.is_pointwise and reader.bias is None]
        wide = [reader for reader in plain if reader.out_features > stream.width]
        free = [reader for reader in wide if hidden_beside(stream, reader) is not None]
        if not free and not tall:
            # A last resort: a Gather puts them in order, at an index of 8 bytes for each value.
            pays = (each for each in wide if each.in_features**2 > 4 * each.out_features)
            free = [each for each in pays if role(each.y) is None]
        if free:
            reader = max(free, key=lambda layer: layer.out_features)
            columns = self._select(stream, reader)
            yield from self._of(columns, partial(_columns_of, stream, reader))

    def _of(self, rows: Rows, plan: Callable[[Rows], Proposal | None]) -> Iterator[Proposal]:
        """What ``plan`` makes of all rows of the basis; when it is asked for, of a part of them."""
        whole = plan(rows)
        if isinstance(whole, Candidate):
            whole.lesser = lambda: filter(None, map(plan, self._select.in_part(rows)))
        if whole is not None:
            yield whole


def _rows_of(stream: Stream, writer: Writer, rows: Rows) -> Candidate | None:
    """Biases are expressed in the new basis."""
    basis = Basis(rows.selection.basis, inverted=True)
    rewrite = rebase(stream, basis, pivot=writer)
    if writer.bias is not None and writer.bias not in rewrite.stored:
        return None
    is_inverted = len(rewrite.stored) > len(stream.readers)
    rewrite.replaced[writer.y] = _sum(writer, rows, rewrite, is_biased=True)
    used, degree_of = basis if is_inverted else None, (writer.edge, "own bias")
    return Candidate(InterpolatePass.name, _text(stream, writer, rows), rewrite, used, degree_of)


def _rows_carrying_biases(stream: Stream, writer: Writer, rows: Rows) -> Proposal:
    """Biases are carried through the readers."""
    text, degree_of = _text(stream, writer, rows), (writer.edge, "carried bias")

    def plan() -> Candidate:
        stored = rebase(stream, Basis(rows.selection.basis, inverted=True), pivot=writer).stored
        rewrite = Rewrite({reader.edge: stored[reader.edge] for reader in stream.readers})
        carry_biases(stream, writer, rewrite)
        rewrite.replaced[writer.y] = _sum(writer, rows, rewrite, is_biased=False)
        return Candidate(InterpolatePass.name, text, rewrite, degree_of=degree_of)

    return propose(InterpolatePass.name, text, plan)


def _text(stream: Stream, writer: Writer, rows: Rows) -> str:
    return f"{rows.selection.kept} rows of {writer.label} into {compact(stream.read_by)}"


def _sum(writer: Writer, rows: Rows, rewrite: Rewrite, *, is_biased: bool) -> Operand:
    """``x' = h₂ B + [h₁, 0]`` in the place of ``h O``, ``h = [h₂, h₁]``; with its bias or not."""
    kept = rows.selection.kept
    at = rewrite.before(writer.node)
    h = rows.in_order(rewrite, at)
    h2, h1 = at.split(h, [writer.in_features - kept, kept], rows.axis)
    product: Operand = rows.times_rest(h2, at, writer.bias if is_biased else None)
    if is_biased and not rows.is_conv:
        product = with_bias(rewrite, writer, product)
    return at("Add", product, rows.filled(h1, at))


def _columns_of(stream: Stream, reader: Reader, columns: Rows) -> Candidate:
    """``[x'_S, x' C]`` in the place of ``x M``; ``x'_S`` is ``x'`` where all columns are kept."""
    kept, basis = columns.selection.kept, Basis(transpose(columns.selection.basis))
    rewrite = rebase(stream, basis, pivot=reader)
    at = rewrite.before(reader.node)
    rest = columns.times_rest(reader.x, at)
    both = at("Concat", columns.cut(reader.x, at), rest, axis=columns.axis)
    rewrite.replaced[reader.y] = columns.put_back(both, rewrite, at)
    into = compact([*stream.written_by, *(r.label for r in stream.readers if r is not reader)])
    text = f"{kept} columns of {reader.label} into {into}"
    return Candidate(InterpolatePass.name, text, rewrite, basis, degree_of=reader.edge)
