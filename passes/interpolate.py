"""Interpolate a writer: express its rows by ``d`` of them, which become the basis of the stream.

``O = [I; B] O₁`` with ``O₁`` ``d`` well-chosen rows of O and ``B = O₂ O₁⁻¹``. The stream becomes
``x' = h₁ + h₂ B`` and its readers ``O₁ Q``, ``O₁ K``, ``O₁ V``: the same ``d²`` weights go as when
a square reader is absorbed, but nothing is inverted, the coefficients are at most 1.5, and no
square matrix is needed. The order of the rows goes into the columns of the layers that make ``h``. Rows
after S. Goreinov et al., "How to find a good submatrix", 2010.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.basis import Basis, FoldedTensor, Side, select_rows
from onnx_fold.bias import carry_biases
from onnx_fold.constants import Array
from onnx_fold.folding import Candidate, FoldPass
from onnx_fold.linear import Linear, compact
from onnx_fold.permute import permute
from onnx_fold.rebase import Rebased, rebase
from onnx_fold.rewrite import Rewrite, initializer, new_node, unused_name
from onnx_fold.stream import Stream


class InterpolatePass(FoldPass):
    """Give the stream a basis of rows of its widest writer."""

    name = "interpolate"

    def candidates(self, stream: Stream) -> Iterator[Candidate]:
        """Yield candidates for the linear writer with most rows.

        Biases are expressed in the new basis, or else carried through the readers.
        """
        tall = [w for w in stream.writers if w.in_features > w.out_features and w.is_plain]
        if not tall or stream.tables:
            return
        writer = max(tall, key=lambda layer: layer.in_features)
        rows = _Rows(writer)
        rebased = rebase(stream, Basis(rows.basis, inverted=True), stream.width, pivot=writer)
        if writer.node.op_type != "Gemm":  # its bias would need an Add of its own
            yield from _interpolate(stream, rows, Rewrite(stored=rebased.stored), rebased)
        carried = Rewrite(
            stored={reader.edge: rebased.stored[reader.edge] for reader in stream.readers}
        )
        is_sole = len(stream.writers) == 1
        if stream.constants and is_sole and carry_biases(stream, writer, carried):
            without = replace(rebased, writers=[s for s in rebased.writers if not s.is_table])
            yield from _interpolate(stream, rows, carried, without)


class _Rows:
    """The rows of a writer, selected when they are first needed."""

    def __init__(self, writer: Linear) -> None:
        self.writer = writer

    @cached_property
    def _selected(self) -> tuple[npt.NDArray[np.intp], Array]:
        return select_rows(self.writer.matrix())

    def order(self) -> npt.NDArray[np.intp]:
        """All rows, the basis first."""
        return self._selected[0]

    def rest(self) -> Array:
        """``B``, ``[f - d, d]``."""
        return self._selected[1]

    def basis(self) -> Array:
        """``O₁``, ``[d, d]``."""
        return self.writer.matrix()[self.order()[: self.writer.out_features]]


def _interpolate(
    stream: Stream, rows: _Rows, rewrite: Rewrite, rebased: Rebased
) -> Iterator[Candidate]:
    writer, width = rows.writer, stream.width
    depth = writer.in_features
    rest = FoldedTensor(rows.rest, writer.weight.dtype, (depth - width, width))
    rewrite.added.append(rest)
    is_free = permute(stream, writer, rows.order, rewrite)
    rewrite.nodes_added += 3 if is_free else 4

    def build(graph: ir.Graph) -> ir.Value:
        hidden, node = writer.x, writer.node
        name = writer.weight.leaf.name or "weight"

        def step(operator: str, *inputs: ir.Value, **attributes: int) -> ir.Node:
            return new_node(graph, node, operator, inputs, f"{node.name}_{operator}", **attributes)

        def held(tensor: ir.TensorProtocol, suffix: str) -> ir.Value:
            value = initializer(tensor)
            value.name = unused_name(graph, f"{name}_{suffix}")
            graph.register_initializer(value)
            return value

        if not is_free:
            order = ir.tensor(rows.order().astype(np.int64))
            hidden = step("Gather", hidden, held(order, "order"), axis=-1).outputs[0]
        sizes = ir.tensor(np.array([width, depth - width], dtype=np.int64))
        split = step("Split", hidden, held(sizes, "sizes"), axis=-1, num_outputs=2)
        head, tail = split.outputs
        product = step("MatMul", tail, held(rest, "rest")).outputs[0]
        return step("Add", head, product).outputs[0]

    rewrite.replaced[writer.y] = build

    def after() -> Array:
        matrix = np.empty((depth, width))
        matrix[rows.order()] = np.vstack([np.eye(width), rest.numpy().astype(np.float64)])
        return matrix

    sides = list(rebased.writers)
    sides[stream.writers.index(writer)] = Side(writer.matrix, after)
    into = compact([reader.label for reader in stream.readers])
    yield Candidate(
        strategy=InterpolatePass.name,
        text=f"{width} rows of {writer.label} into {into}",
        rewrite=rewrite,
        writers=sides,
        readers=rebased.readers,
    )
