"""Rows of a writer, or columns of readers, that become a basis, and what puts them in order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_fold.algebra.completion import Completion
from onnx_fold.algebra.device import Device, Indices
from onnx_fold.algebra.expression import FoldedTensor, reshape, transpose
from onnx_fold.algebra.selection import RowSelection, Selection
from onnx_fold.algebra.storage import Spool
from onnx_fold.graph.linear import Edge
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.permute import Hidden, hidden_beside, permute
from onnx_fold.rewriting.record import Made, Operand, Present, Recorder
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.ends import Reader, Writer
from onnx_fold.streams.stream import Stream

SHARES = (0.98, 0.95, 0.92, 0.9, 0.88, 0.85)
"""Of the rows of a basis, what is kept where all of them are not accurate enough."""


def parts(width: int) -> list[int]:
    """How many rows of a basis :data:`SHARES` are, the largest first, less than all of them.

    They are multiples of 8 where ``width`` is: processors like such sizes.
    """
    step = 8 if width % 8 == 0 else 1
    sizes = (math.ceil(width * share / step) * step for share in SHARES)
    return [size for size in dict.fromkeys(sizes) if size < width]


@dataclass(frozen=True)
class Rows:
    """The rows of a writer that are the basis, or the columns of a reader.

    Attributes:
        layer: The writer or reader.
        selection: Which rows these are, of its matrix or of the transposed one, and what the others
            are in terms of them.
        hidden: The value on its other side, if the order of its channels is free.
        rank: The dimensions of what the layer reads, if their number is known.
        axis: The channel axis of what it reads and writes, from the end.
    """

    layer: Writer | Reader
    selection: Selection
    hidden: Hidden | None
    rank: int | None
    axis: int

    @property
    def name(self) -> str | None:
        """The name of the weight."""
        return self.layer.weight.leaf.name

    def in_order(self, rewrite: Rewrite, at: Recorder) -> Operand:
        """What the writer reads, the others first and the basis last."""
        if self.hidden is not None:
            permute(self.hidden, self.layer, self.selection, rewrite)
            return self.layer.x
        order = at.integers(self.selection.final_order, f"{self.name}_order")
        return at("Gather", self.layer.x, order, axis=self.axis)

    def put_back(self, value: Operand, rewrite: Rewrite, at: Recorder) -> Operand:
        """What the reader writes, from a ``value`` in which the basis comes first."""
        if self.hidden is not None:
            permute(self.hidden, self.layer, self.selection, rewrite)
            return value
        places = at.integers(self.selection.places, f"{self.name}_order")
        return at("Gather", value, places, axis=self.axis)

    def filled(self, value: Operand, at: Recorder) -> Operand:
        """``[h₁, 0]``, as wide as the basis, for a ``value`` of the rows that are kept."""
        kept, width = self.selection.kept, self.selection.matrix.shape[1]
        if kept == width or self.rank is None:
            return value
        return at.pad(value, self.rank, kept, width - kept, self.axis)

    def cut(self, value: Operand, at: Recorder) -> Operand:
        """``x'_S``: those channels of ``value`` that stand for rows that are kept."""
        kept, width = self.selection.kept, self.selection.matrix.shape[1]
        return value if kept == width else at.split(value, [kept, width - kept], self.axis)[0]

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a 1x1 convolution."""
        return operator(self.layer.node) == "Conv"

    def times_rest(self, x: Operand, at: Recorder, bias: Edge | None = None) -> Made:
        """``x B``, with the other rows in terms of the basis; ``x C`` of a reader.

        Args:
            x: The rows that are not kept, of a writer; all channels, of a reader.
            at: Receives the operator.
            bias: What a convolution adds.
        """
        is_reader = isinstance(self.layer, Reader)
        matrix = transpose(self.selection.rest) if is_reader else self.selection.rest
        shape = (*matrix.shape[::-1], *(1,) * (-1 - self.axis))
        stored = reshape(transpose(matrix), shape) if self.is_conv else matrix
        held = at.constant(FoldedTensor(stored, self.layer.weight.dtype), f"{self.name}_rest")
        if not self.is_conv:
            return at("MatMul", x, held)
        return at("Conv", x, held, *([] if bias is None else [Present(bias)]))


class Selections:
    """Selects rows and columns; among the same weights only once."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spool = Spool()
        self._known: dict[tuple[object, ...], RowSelection] = {}
        self._completed: dict[Selection, Completion] = {}

    def __call__(self, stream: Stream, layer: Writer | Reader) -> Rows:
        """The rows of a writer of ``stream``, or the columns of a reader."""
        is_reader = isinstance(layer, Reader)
        seen = None if isinstance(layer, Reader) else stream.rows_of(layer)
        hidden = hidden_beside(stream, layer)
        free, weight = None if hidden is None else hidden.free, layer.weight
        axes = weight.permutation, layer.in_axes, layer.out_axes
        key = weight.tensor, *axes, layer.alpha, is_reader, id(seen), str(free)
        if key not in self._known:
            self._known[key] = RowSelection(
                transpose(layer.matrix) if is_reader else layer.matrix,
                weight.dtype,
                seen,
                self._spool,
                self._device,
                free=free,
                is_last=not is_reader,
            )
        return Rows(
            layer, self._known[key], hidden, stream.shapes.rank(layer.x), layer.y_axis or -1
        )

    def in_part(self, rows: Rows) -> Iterator[Rows]:
        """The same with a part of the rows of the basis, the largest part first."""
        if rows.rank is None:  # a Pad has to know it
            return
        whole, width = rows.selection, rows.selection.kept
        assert isinstance(whole, RowSelection)
        if sizes := parts(width):
            known = self._completed.setdefault(whole, Completion(whole, width - min(sizes)))
            for size in sizes:
                yield replace(rows, selection=known.keeping(size))


@dataclass(frozen=True)
class Share:
    """What one reader contributes to a basis of columns.

    Attributes:
        reader: The layer.
        chosen: Its columns that are in the basis, sorted.
        others: Its columns that are not.
        offset: Where the first chosen one stands in the basis.
    """

    reader: Reader
    chosen: Indices
    others: Indices
    offset: int

    @property
    def places(self) -> Indices:
        """Where the chosen columns stand in the basis."""
        return self.offset + np.arange(len(self.chosen))

    def assemble(self, at: Recorder, rest: FoldedTensor) -> Operand:
        """What the reader writes: slices of the stream, and ``rest``, by which the others come."""
        x, name = self.reader.x, self.reader.weight.leaf.name
        runs = self._runs()
        if len(runs) == 1 and len(self.chosen) == self.reader.in_features:
            return x
        axes = at.integers([-1], f"{name}_axes")
        product: Operand = x
        if len(self.others):
            product = at("MatMul", x, at.constant(rest, f"{name}_rest"))
        pieces = []
        for is_chosen, *bounds in runs:
            first, last = (at.integers([bound], f"{name}_bound") for bound in bounds)
            pieces.append(at("Slice", x if is_chosen else product, first, last, axes))
        return pieces[0] if len(pieces) == 1 else at("Concat", *pieces, axis=-1)

    def _runs(self) -> list[tuple[bool, int, int]]:
        """Consecutive columns from one source: (from the stream?, first, last) in that source."""
        runs: list[tuple[bool, int, int]] = []
        taken = {True: self.offset, False: 0}
        chosen = set(self.chosen.tolist())
        for column in range(self.reader.out_features):
            is_chosen = column in chosen
            at = taken[is_chosen]
            taken[is_chosen] += 1
            if runs and runs[-1][0] == is_chosen:
                runs[-1] = (is_chosen, runs[-1][1], at + 1)
            else:
                runs.append((is_chosen, at, at + 1))
        return runs


def shares(layers: Sequence[Reader], columns: Indices) -> Iterator[Share]:
    """Share out ``columns`` of ``layers`` side by side, sorted; who has none is left out."""
    start = offset = 0
    for layer in layers:
        own = np.arange(layer.out_features)
        is_chosen = np.isin(own + start, columns)
        share = Share(layer, own[is_chosen], own[~is_chosen], offset)
        start, offset = start + len(own), offset + len(share.chosen)
        if len(share.chosen):
            yield share
