"""Rotate: a layer beside a norm that stays becomes triangular, and its zeros are not stored.

An RMSNorm lets every orthogonal basis through, ``RMS(x T) = RMS(x)`` with ``Tᵀ T = I``
(:mod:`onnx_fold.streams.norms`). With the gain ``G`` in front of the readers, choose ``T`` by
``G Q = T R`` (QR): writers become ``W T``, readers ``Tᵀ G K``, the gain ones, and Q the upper
triangle ``R``. Its columns ``[c₁, c₂)`` have nothing below row ``c₂``: as ``b`` panels, each of
which reads only the first channels, ``n[:c₂] R[:c₂, c₁:c₂]``, it stores ``(1 - 1/b) / 2 · d²``
weights less. ``T`` has ``d (d - 1) / 2`` free numbers, so no choice can save more than half of d².

The ``d`` columns may be those of several readers side by side: where K and V are narrow (GQA), K
reads only its own number of channels, V as many more, and no output has to be put together. Or the
first ``d`` rows of a writer become a lower triangle, ``W T``, whose panels read ``h[c₁:]``. S.
Ashkboos et al., "SliceGPT", arXiv 2401.15024, rotate an RMSNorm's stream so too, to cut channels
off; nothing is cut off here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import Side
from onnx_fold.algebra.expression import (
    Concatenate,
    Expression,
    FoldedTensor,
    Literal,
    Spool,
    Sum,
    cast,
    product,
    scale,
    take,
    transpose,
)
from onnx_fold.algebra.rotation import OrthogonalBasis, orthogonal_factor
from onnx_fold.base.tables import counted
from onnx_fold.engine.cost import TARGETS
from onnx_fold.engine.folding import Candidate, FoldPass, Options, Proposal, propose
from onnx_fold.engine.outcome import CandidateReport
from onnx_fold.graph.channels import Group
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.rewriting.bias import carry_behind_gains
from onnx_fold.rewriting.panels import Panels, can_be_cut, cut, rebuilt
from onnx_fold.rewriting.rebase import behind_gain, rebase, weights_of
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.heads import head_layout
from onnx_fold.streams.norms import squares
from onnx_fold.streams.stream import Stream

PANELS = (4, 2, 1)
"""Into how many panels a triangle is cut; each further one saves less and costs as much."""


class RotatePass(FoldPass):
    """Give a stream with norms the orthogonal basis in which one of its layers is triangular."""

    name = "rotate"
    operators = 2
    group = Group.ORTHOGONAL

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._spool = Spool()
        self._factors: dict[tuple[object, ...], Expression] = {}

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield the triangle that saves most time, or with ``force`` most weights."""
        provider = self.options.target or "cpu"
        found = [each for each in _triangles(stream) if each.weights > 0]
        if not found:
            return
        largest = max(found, key=lambda each: (each.weights, -each.nodes, -each.copied))
        best = max(found, key=lambda each: (each.time_saved(provider), -each.copied))
        if self.options.force:
            best = largest
        elif refused := _refused(stream, best, provider):
            text = f"{largest.weights / stream.width**2:.3g} d² by rotation"
            yield CandidateReport(self.name, text, largest.weights, largest.nodes, refused=refused)
            return
        text = best.text
        yield propose(self.name, text, lambda: _rotate(stream, best, self._factor(best)))

    def _factor(self, triangle: Triangle) -> Expression:
        """``T``, found once for the same weights."""
        key: list[object] = [triangle.is_writer, triangle.stream.keeps_ones]
        for panels in triangle.panels:
            layer, gain = panels.layer, triangle.stream.gains.get(panels.layer.x)
            key += [layer.weight.tensor, layer.weight.permutation, layer.in_axes, layer.alpha]
            key += [None if gain is None else gain.weight.tensor]
        if tuple(key) not in self._factors:
            keeps = triangle.stream.keeps_ones
            made = orthogonal_factor(triangle.matrix, self._spool, keeps_ones=keeps)
            self._factors[tuple(key)] = made
        return self._factors[tuple(key)]


def _refused(stream: Stream, best: Triangle, provider: str) -> str:
    """Why a rotation does not pay, if it does not."""
    if _is_residual(stream):
        return "does not pay in a residual model"
    return "" if best.time_saved(provider) > 0 else f"does not pay in time on {provider}"


def _is_residual(stream: Stream) -> bool:
    """Whether more than one writer depends on the stream: it runs through blocks, not beside them.

    All of their weights would have to be rotated for what one block can save.
    """
    order = stream.search.position
    last = max((order(writer.node) for writer in stream.writers), default=-1)
    queue = [reader.node for reader in stream.readers if order(reader.node) < last]
    seen = set(queue)
    while queue:
        users = (user for value in queue.pop().outputs for user, _ in value.uses())
        new = {user for user in users if order(user) <= last} - seen
        seen |= new
        queue.extend(new)
    return sum(writer.node in seen for writer in stream.writers) > 1


@dataclass(frozen=True, eq=False)
class Triangle:
    """The layers that become triangular: readers side by side, or one writer.

    Attributes:
        stream: The stream.
        panels: How they are cut.
        is_writer: Whether it is a writer.
    """

    stream: Stream
    panels: tuple[Panels, ...]
    is_writer: bool = False

    @property
    def weights(self) -> int:
        """Weights that are not stored."""
        return sum(each.weights for each in self.panels)

    @property
    def nodes(self) -> int:
        """Operators that come, less those that go."""
        return sum(each.nodes for each in self.panels)

    @property
    def copied(self) -> int:
        """Values that these copy for one token."""
        return sum(each.copied for each in self.panels)

    def time_saved(self, provider: str) -> float:
        """Bytes that are read in the time that is saved on ``provider``, for one token."""
        target = TARGETS[provider]
        saved = self.weights * self.stream.dtype.itemsize
        if self.weights < self.copied * target.macs_per_copied:
            return -1.0
        return saved - self.nodes * target.bytes_per_node

    @property
    def text(self) -> str:
        """What becomes triangular, and what is rotated."""
        names = [each.layer.label for each in self.panels]
        others = [name for name in self.stream.labels if name not in names]
        count = sum(len(each.parts) for each in self.panels)
        return f"triangle of {compact(names)} ({counted(count, 'panel')}) into {compact(others)}"

    @cached_property
    def matrix(self) -> Expression:
        """What is ``T R``: the columns of the readers, or the rows of the writer, ``[d, n]``."""
        width = self.stream.width
        layers = [each.layer for each in self.panels]
        if self.is_writer:
            return transpose(take(weights_of(layers[0]), slice(width), 0))
        columns = tuple(behind_gain(self.stream, layer) for layer in layers)
        return columns[0] if len(columns) == 1 else Concatenate(columns, 1)


def _triangles(stream: Stream) -> Iterator[Triangle]:
    """All readers side by side, the narrow ones first; each of them alone; each tall writer."""
    width = stream.width
    readers = [each for each in stream.readers if can_be_cut(each) and _is_free(stream, each)]
    readers.sort(key=lambda layer: layer.out_features)
    sequences = {tuple(readers), *((reader,) for reader in readers)} - {()}
    for count in PANELS:
        for sequence in sorted(sequences, key=len):
            panels, offset = [], 0
            for reader in sequence:
                if offset < width:
                    panels.append(_columns_of(stream, reader, offset, count))
                offset += reader.out_features
            yield Triangle(stream, tuple(panels))
        for writer in filter(can_be_cut, stream.writers):
            if writer.in_features >= width and (stream.ignores_ones or not stream.keeps_ones):
                yield Triangle(stream, (_rows_of(stream, writer, count),), is_writer=True)


def _is_free(stream: Stream, reader: Linear) -> bool:
    """Whether a multiple of the ones may be added to a column of ``reader``, if it has to be."""
    return not stream.keeps_ones or reader.x in stream.centred


def _columns_of(stream: Stream, reader: Linear, offset: int, count: int) -> Panels:
    """Panels of a reader whose first column is number ``offset`` of the triangle.

    They end where an equal share of the ``d`` columns does, or with the head behind it.
    """
    width, size = stream.width, reader.out_features
    layout = head_layout(reader.y, size, stream.shapes)
    unit = 1 if layout is None else layout.head_dim
    cuts = {-(-(share * width // count - offset) // unit) * unit for share in range(1, count)}
    inside = sorted(cut for cut in cuts if 0 < cut < size and cut + offset < width)
    ends = [*inside, size]
    parts = zip([0, *inside], ends, strict=True)
    return Panels(reader, tuple((a, b, 0, min(width, offset + b)) for a, b in parts))


def _rows_of(stream: Stream, writer: Linear, count: int) -> Panels:
    """Panels of a writer, the first ``d`` rows of which are the triangle."""
    width = stream.width
    cuts = sorted({share * width // count for share in range(count + 1)})
    parts = tuple((a, b, a, writer.in_features) for a, b in pairwise(cuts))
    return Panels(writer, parts)


def _rotate(stream: Stream, triangle: Triangle, factor: Expression) -> Candidate:
    basis = OrthogonalBasis(factor)
    rebased = rebase(stream, basis, stream.width)
    rewrite = Rewrite(stored=rebased.stored, reordered=list(squares(stream)))
    _take_gains(stream, rewrite)
    carry_behind_gains(stream, rewrite)
    layers, sides = (
        (stream.writers, rebased.writers)
        if triangle.is_writer
        else (stream.readers, rebased.readers)
    )
    for panels in triangle.panels:
        layer = panels.layer
        rewrite.stored.pop(layer.edge, None)
        matrix = weights_of(layer) if triangle.is_writer else behind_gain(stream, layer)
        tensors = [
            FoldedTensor(_panel(matrix, factor, part, triangle), layer.weight.dtype)
            for part in panels.parts
        ]
        cut(panels, tensors, rewrite)
        position = layers.index(layer)
        rows = stream.rows_of(layer) if triangle.is_writer else None
        sides[position] = Side(matrix, rebuilt(panels, tensors), rows)
    for position, reader in enumerate(stream.readers):
        side = rebased.readers[position]
        if stream.keeps_ones and reader.x in stream.centred and side.after is not None:
            rebased.readers[position] = Side(_centred(side.before), _centred(side.after))
    return Candidate(RotatePass.name, triangle.text, rewrite, rebased.writers, rebased.readers)


def _centred(matrix: Expression) -> Expression:
    """``C A``: what a layer behind a LayerNorm multiplies by, ``A`` less the mean of its rows."""
    width = matrix.shape[0]
    mean = product(Literal(np.full((1, width), -1.0 / width, matrix.dtype)), matrix)
    return Sum((matrix, mean))


def _panel(
    matrix: Expression, factor: Expression, part: tuple[int, int, int, int], triangle: Triangle
) -> Expression:
    """The rows and columns of ``Tᵀ G R``, or of ``W T``, that a panel stores."""
    first, last, start, end = part
    if triangle.is_writer:
        rows = take(matrix, slice(start, end), 0) if start else matrix
        return product(rows, _channels(factor, slice(first, last), triangle.stream))
    whole = end == factor.shape[0]
    channels = factor if whole else _channels(factor, slice(end), triangle.stream)
    columns = take(matrix, slice(first, last), 1)
    return product(cast(transpose(channels), matrix.dtype), columns)


def _channels(factor: Expression, channels: slice, stream: Stream) -> Expression:
    """Columns of ``T``; less the last one where a multiple of the ones is left below the triangle.

    Where the channels add up to zero (behind a LayerNorm, or in front of it) that is the same.
    """
    columns = take(factor, channels, 1)
    if not stream.keeps_ones:
        return columns
    return Sum((columns, scale(take(factor, slice(-1, None), 1), -1.0)))


def _take_gains(stream: Stream, rewrite: Rewrite) -> None:
    """Let each gain be ones: it is in the layers behind it.

    The operator stays, and with it the pattern that ONNX Runtime fuses into one norm.
    """
    ones: dict[ir.Value, FoldedTensor] = {}
    for gain in stream.gains.values():
        held = gain.weight
        if held.value not in ones:
            ones[held.value] = FoldedTensor(Literal(np.ones(held.shape)), held.dtype)
        rewrite.stored[gain.edge] = ones[held.value]
