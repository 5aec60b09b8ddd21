"""Absorb a square reader (or writer) into everything else that touches the stream.

With ``T = Q``: ``O* = O Q``, ``K* = Q⁻¹ K``, ``V* = Q⁻¹ V``, and Q is the identity (Graef,
arXiv 2404.12362, fig. 2(b); 2(c) and 2(d) for K and V of MHA). In the first block the embedding
table takes O's place. A square writer gives ``T = P⁻¹``, the choice for P in a parallel block. The
matrix has to be inverted, so the error grows with its condition number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import Basis, Side
from onnx_fold.algebra.expression import FoldedTensor, reshape, scale, take
from onnx_fold.engine.folding import Candidate, FoldPass, Proposal, propose
from onnx_fold.graph.constants import constant
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.layout import Columns, ComputedShape, compute_shapes
from onnx_fold.graph.linear import Edge, compact
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.rebase import rebase, stored_matrix, weights_of
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.fused import Fused, Part, fused
from onnx_fold.streams.heads import role
from onnx_fold.streams.stream import Stream


class AbsorbPass(FoldPass):
    """Make a square layer of the stream the identity."""

    name = "absorb"

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield a candidate for each square layer that the pivot option admits."""
        for reader in stream.readers:
            if reader.is_square and self._admits(role(reader.y)):
                yield self.make_identity(stream, reader, Basis(weights_of(reader)))
            elif (parts := fused(reader, stream.shapes)) is not None:
                for part in parts.parts:
                    if len(part.columns) == stream.width and self._admits(part.role):
                        yield _absorb_part(stream, parts, part)
        for writer in stream.writers:
            if writer.is_square and self._admits("p"):
                yield self.make_identity(stream, writer, Basis(weights_of(writer), inverted=True))

    def _admits(self, kind: str | None) -> bool:
        return self.options.pivot == "auto" or kind is None or kind == self.options.pivot


def _absorb_part(stream: Stream, fused: Fused, part: Part) -> Proposal:
    name = f"{fused.linear.label}{part.name}"
    text = f"{name} into {compact(stream.labels)}"
    return propose(AbsorbPass.name, text, lambda: _plan_part(stream, fused, part, text))


def _plan_part(stream: Stream, fused: Fused, part: Part, text: str) -> Candidate:
    """Absorb the columns of ``part``; the fused layer makes the other parts, one behind another."""
    linear = fused.linear
    kept = np.concatenate([other.columns for other in fused.parts if other is not part])
    chosen, others = (take(weights_of(linear), columns, 1) for columns in (part.columns, kept))
    basis = Basis(chosen)
    rebased = rebase(stream, basis, stream.width, pivot=linear)
    tensor = FoldedTensor(linear.pack(basis.of_reader(others)), linear.weight.dtype)
    rewrite = Rewrite(stored={**rebased.stored, linear.edge: tensor})
    rewrite.resized[linear.y] = (-1, len(kept))
    position = stream.readers.index(linear)
    rebased.readers[position : position + 1] = [
        Side(others, stored_matrix(linear, tensor)),
        Side(chosen, None),
    ]
    if fused.shape_readers:
        raise CannotRewriteError(f"{fused.shape_readers[0].name} reads the width of {linear.label}")
    _lay_out(stream, fused, part, rewrite)
    return Candidate(AbsorbPass.name, text, rewrite, rebased.writers, rebased.readers, basis)


def _lay_out(stream: Stream, fused: Fused, part: Part, rewrite: Rewrite) -> None:
    """Let ``part`` come from what the layer reads, and the others from what it writes now."""
    linear = fused.linear
    others = [other for other in fused.parts if other is not part]
    sizes = [len(other.columns) for other in others]
    kept = np.concatenate([other.columns for other in others])
    own = [_bias(edge, part.columns, is_kept=False) for edge in fused.biases]
    left = {edge: _bias(edge, kept, is_kept=True) for edge in fused.biases}
    if linear.bias is not None:
        rewrite.stored[linear.bias] = left.pop(linear.bias)
    rewrite.dropped.update(left)
    rewrite.added.extend([*own, *left.values()])
    ends = {part.value.producer() for part in fused.parts}
    rewrite.nodes_added += len(own) + len(left) + (len(others) > 1)
    layouts = [each.layout for each in fused.parts]
    layouts.sort(key=lambda each: stream.search.position(each.reshape) if each.reshape else 0)
    rewrite.nodes_added += sum(layout.num_nodes for layout in layouts)
    rewrite.nodes_added += 2 * len({layout.computed_shape for layout in layouts} - {None})
    rewrite.nodes_added -= sum(node not in ends for node in fused.nodes)
    first = min((node for node in fused.nodes if node in ends), key=stream.search.position)
    made: list[ir.Value] = []
    shapes: dict[ComputedShape, ir.Value] = {}

    def biased(editor: Editor, value: ir.Value, biases: Iterable[FoldedTensor]) -> ir.Value:
        for tensor in biases:
            bias = editor.constant(tensor, f"{linear.y.name}_bias")
            value = editor.node(first, "Add", [value, bias]).outputs[0]
        return value

    def laid_out(editor: Editor, each: Part, value: ir.Value) -> ir.Value:
        end = each.value.producer()
        assert end is not None
        if not shapes:
            shapes.update(compute_shapes(editor, layouts))
        return each.layout.build(editor, end, value, shapes)

    def build_part(editor: Editor) -> ir.Value:
        return laid_out(editor, part, biased(editor, linear.x, own))

    def build_other(editor: Editor, index: int) -> ir.Value:
        if not made:
            value = biased(editor, linear.y, left.values())
            made.extend(editor.split(first, value, sizes) if len(sizes) > 1 else [value])
        return laid_out(editor, others[index], made[index])

    rewrite.replaced[part.value] = build_part
    for index, other in enumerate(others):
        rewrite.replaced[other.value] = partial(build_other, index=index)


def _bias(edge: Edge, columns: Columns, *, is_kept: bool) -> FoldedTensor:
    """The elements of a bias that belong to ``columns``."""
    node, index = edge
    held = constant(node.inputs[index])
    assert held is not None
    leaves_gemm = operator(node) == "Gemm" and not is_kept
    beta = node.attributes.get_float("beta", 1.0) if leaves_gemm else 1.0
    vector = take(reshape(held.wide(), (held.size,)), columns, 0)
    return FoldedTensor(scale(vector, beta), held.dtype)
