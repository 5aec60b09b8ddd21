"""A layer cut into panels of columns, each of which reads a part of what the layer reads.

What the other parts would be multiplied by is zero, and is not stored. An orthogonal basis can make
any ``d`` columns of the readers of a stream, or ``d`` rows of a writer, such a triangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from onnx_fold.algebra.expression import (
    Concatenate,
    Expression,
    FoldedTensor,
    Sum,
    cast,
    literal,
    product,
    scale,
    scaled_rows,
    take,
    transpose,
)
from onnx_fold.base.tables import counted
from onnx_fold.graph.constants import constant
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.rewriting.rebase import with_bias
from onnx_fold.rewriting.record import Operand
from onnx_fold.rewriting.rewrite import Rewrite, Work
from onnx_fold.streams.ends import Reader, Writer
from onnx_fold.streams.heads import head_layout, roles
from onnx_fold.streams.stream import Stream

PANELS = (8, 4, 2, 1)
"""Into how many panels a triangle is cut; each further one saves less and costs as much."""

USUAL = 4
"""As many at the most where time counts; what might be gained is told of so many, too."""


@dataclass(frozen=True)
class Panels:
    """A layer cut into panels of columns, each of which reads a part of the channels.

    Attributes:
        layer: The layer.
        parts: For each panel its first column, the last, and the first and last channel it reads.
    """

    layer: Writer | Reader
    parts: tuple[tuple[int, int, int, int], ...]

    def is_whole(self, start: int, end: int) -> bool:
        """Whether a panel reads all channels, so that nothing is sliced."""
        return start == 0 and end == self.layer.in_features

    @property
    def weights(self) -> int:
        """Weights that are not stored."""
        rows = self.layer.in_features
        return sum((last - first) * (rows - end + start) for first, last, start, end in self.parts)

    @property
    def nodes(self) -> int:
        """Operators that come, less the one that goes."""
        slices = sum(not self.is_whole(start, end) for _, _, start, end in self.parts)
        count = len(self.parts)
        extra = (count > 1) + (self.layer.bias is not None)
        return slices + count - 1 + extra

    @property
    def copied(self) -> int:
        """Values that the Slices and the Concat copy for one token."""
        parts = [end - start for _, _, start, end in self.parts if not self.is_whole(start, end)]
        return sum(parts) + self.layer.out_features * (len(self.parts) > 1)


def can_be_cut(layer: Linear) -> bool:
    """Whether ``layer`` is one plain matrix, with a bias that is added as it is or none."""
    held = None if layer.bias is None else constant(layer.node.inputs[layer.bias[1]])
    has_place = layer.bias is None or (held is not None and layer.beta == 1.0)
    return layer.is_plain and has_place


def cut(panels: Panels, tensors: Sequence[FoldedTensor], rewrite: Rewrite) -> None:
    """Plan one MatMul for each panel in the place of the layer, and a Concat behind them."""
    layer, name = panels.layer, panels.layer.weight.leaf.name
    at = rewrite.before(layer.node)
    axes = at.integers([-1], f"{name}_axes")
    products: list[Operand] = []
    for tensor, (_, _, start, end) in zip(tensors, panels.parts, strict=True):
        value: Operand = layer.x
        if not panels.is_whole(start, end):
            bounds = [at.integers([bound], f"{name}_bound") for bound in (start, end)]
            value = at("Slice", value, *bounds, axes)
        products.append(at("MatMul", value, at.constant(tensor, f"{name}_panel")))
    total = products[0]
    if len(products) > 1:
        total = at("Concat", *products, axis=-1)
    rewrite.replaced[layer.y] = with_bias(rewrite, layer, total)


@dataclass(frozen=True, eq=False)
class Triangle:
    """The layers that become triangular: readers side by side, or one writer.

    Attributes:
        stream: The stream.
        count: Into how many panels the ``d`` columns or rows were to be cut, but for heads.
        panels: How they are cut.
    """

    stream: Stream
    count: int
    panels: tuple[Panels, ...]

    @property
    def is_writer(self) -> bool:
        """Whether it is a writer."""
        return isinstance(self.panels[0].layer, Writer)

    @property
    def weights(self) -> int:
        """Weights that are not stored."""
        return sum(each.weights for each in self.panels)

    @property
    def work(self) -> Work:
        """What the operators that come do, less the ones that go."""
        nodes = sum(each.nodes for each in self.panels)
        return Work(nodes, copied=sum(each.copied for each in self.panels))

    def size(self) -> tuple[int, int, int]:
        """Sorts what saves most weights last; of what saves as many, the fewest operators."""
        return self.weights, -self.work.nodes, -self.work.copied

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
        found = tuple(each.layer.matrix for each in self.panels)
        if self.is_writer:
            return transpose(take(found[0], slice(width), 0))
        return found[0] if len(found) == 1 else Concatenate(*found, axis=1)

    def stored(self, panels: Panels, factor: Expression) -> list[FoldedTensor]:
        """What each panel stores: rows and columns of ``Tᵀ G R``, or of ``W T``."""
        dtype, matrix = panels.layer.weight.dtype, panels.layer.matrix
        return [FoldedTensor(self._panel(matrix, factor, part), dtype) for part in panels.parts]

    def _panel(
        self, matrix: Expression, factor: Expression, part: tuple[int, int, int, int]
    ) -> Expression:
        first, last, start, end = part
        if self.is_writer:
            rows = take(matrix, slice(start, end), 0) if start else matrix
            return self._written(rows, factor, slice(first, last), start)
        whole = end == factor.shape[0]
        channels = factor if whole else self._channels(factor, slice(end))
        columns = take(matrix, slice(first, last), 1)
        return product(cast(transpose(channels), matrix.dtype), columns)

    def _written(
        self, rows: Expression, factor: Expression, channels: slice, start: int
    ) -> Expression:
        """``W T`` from row ``start`` on; less its last channel in the rows that are to have zeros.

        A norm that takes the mean off does not see that. In rows without zeros the last channel is
        as large as any other: they would be larger by it, and so would be the error of rounding.
        """
        written = product(rows, take(factor, channels, 1))
        if not self.stream.keeps_ones:
            return written
        with_zeros = self.panels[0].parts[-1][2] - start
        taken = np.where(np.arange(rows.shape[0]) < with_zeros, -1.0, 0.0)
        last = product(rows, take(factor, slice(-1, None), 1))
        return Sum(written, scaled_rows(last, literal(taken)))

    def _channels(self, factor: Expression, channels: slice) -> Expression:
        """Columns of ``T``; less the last where a multiple of the ones is left below the triangle.

        Where the channels add up to zero, as behind a LayerNorm, that is the same.
        """
        columns = take(factor, channels, 1)
        if not self.stream.keeps_ones:
            return columns
        return Sum(columns, scale(take(factor, slice(-1, None), 1), -1.0))


def triangles(stream: Stream) -> Iterator[Triangle]:
    """All readers side by side, the narrow ones first; each of them alone; each tall writer."""
    width = stream.width
    readers = [each for each in stream.readers if can_be_cut(each) and _is_free(stream, each)]
    readers.sort(key=lambda layer: layer.out_features)
    sequences = dict.fromkeys([tuple(readers)] * bool(readers) + [(each,) for each in readers])
    for count in PANELS:
        for sequence in sorted(sequences, key=len):
            panels, offset = [], 0
            for reader in sequence:
                if offset < width:
                    panels.append(_columns_of(stream, reader, offset, count))
                offset += reader.out_features
            yield Triangle(stream, count, tuple(panels))
        for writer in filter(can_be_cut, stream.writers):
            if writer.in_features >= width and (stream.ignores_ones or not stream.keeps_ones):
                yield Triangle(stream, count, (_rows_of(stream, writer, count),))


def _is_free(stream: Stream, reader: Reader) -> bool:
    """Whether a multiple of the ones may be added to a column of ``reader``, if it has to be."""
    return not stream.keeps_ones or reader.x in stream.centred


def _columns_of(stream: Stream, reader: Reader, offset: int, count: int) -> Panels:
    """Panels of a reader whose first column is number ``offset`` of the triangle.

    They end where an equal share of the ``d`` columns does, or with the head behind it.
    """
    width, size, unit = stream.width, reader.out_features, _head_dim(stream, reader)
    cuts = {-(-(share * width // count - offset) // unit) * unit for share in range(1, count)}
    inside = sorted(cut for cut in cuts if 0 < cut < size and cut + offset < width)
    ends = [*inside, size]
    parts = zip([0, *inside], ends, strict=True)
    return Panels(reader, tuple((a, b, 0, min(width, offset + b)) for a, b in parts))


def _head_dim(stream: Stream, reader: Reader) -> int:
    """Columns that stay together; the three parts of packed Q, K and V are no heads."""
    layout = head_layout(reader.y, reader.out_features, stream.shapes)
    if layout is None or (layout.heads == 3 and len(roles(reader.y)) > 1):
        return 1
    return layout.head_dim


def _rows_of(stream: Stream, writer: Writer, count: int) -> Panels:
    """Panels of a writer, the first ``d`` rows of which are the triangle."""
    width = stream.width
    cuts = sorted({share * width // count for share in range(count + 1)})
    parts = tuple((a, b, a, writer.in_features) for a, b in pairwise(cuts))
    return Panels(writer, parts)
