"""Concat: a layer behind channels side by side goes into the layers that write them.

``[x W₁ + b₁, y W₂] F = x (W₁ F₁) + b₁ F₁ + y (W₂ F₂)``, with the rows of F that belong to each. It
is the head of SegFormer (E. Xie et al., arXiv 2105.15203): four projections, resized to one size,
side by side, and a 1x1 convolution. Nothing is inverted. What is written by something else stays
side by side, with its rows of F.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import Basis, Side
from onnx_fold.algebra.expression import (
    Expression,
    FoldedTensor,
    product,
    reshape,
    scale,
    take,
)
from onnx_fold.engine.folding import Candidate, FoldPass, Proposal, propose
from onnx_fold.graph.constants import constant
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import compact
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.rebase import rebase, weights_of
from onnx_fold.rewriting.resize import resize_stream
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.joined import Joined


class ConcatPass(FoldPass):
    """Let a layer behind a Concat of channels be a sum of the layers in front of it."""

    name = "concat"
    is_basis_change = False

    def of_joined(self, joined: Joined) -> Iterator[Proposal]:
        """Yield the merge of the layer into all that write its operands."""
        text = f"{joined.reader.label} into {compact(joined.labels)}"
        yield propose(self.name, text, lambda: _plan(joined, text))


def _plan(joined: Joined, text: str) -> Candidate:
    reader, rewrite, sides = joined.reader, Rewrite(), []
    width = reader.out_features
    for part in joined.parts:
        if part.stream is None:
            continue
        if width > part.stream.width:
            raise CannotRewriteError(f"'{part.value.name}' would become {width} channels wide")
        rows = take(weights_of(reader), np.asarray(part.rows), 0)
        rebased = rebase(part.stream, Basis(rows), width, pivot=reader)
        rewrite.stored |= rebased.stored
        sides += [_through(side, rows) for side in rebased.writers if isinstance(side, Side)]
        if width != part.stream.width:
            resize_stream(part.stream, part.stream.values, width, rewrite)
    _sum(joined, rewrite)
    return Candidate(ConcatPass.name, text, rewrite, list(sides), [])


def _through(side: Side, rows: Expression) -> Side:
    """A writer before and after: in front of the layer, and as one with it."""
    return Side(product(side.before, rows), side.after, side.rows)


def _sum(joined: Joined, rewrite: Rewrite) -> None:
    """Plan ``Σ operands + rest F + bias`` in the place of the layer."""
    reader, node = joined.reader, joined.reader.node
    rest = [part for part in joined.parts if part.stream is None]
    merged = [part for part in joined.parts if part.stream is not None]
    bias = _bias(joined)
    weight, is_conv = None, operator(node) == "Conv"
    if rest:
        rows = np.concatenate([np.asarray(part.rows) for part in rest])
        matrix = take(weights_of(reader), rows, 0)
        packed = reader.pack(matrix, is_writer=False) if is_conv else matrix
        weight = FoldedTensor(packed, reader.weight.dtype)
        rewrite.added.append(weight)
    rewrite.added += [] if bias is None else [bias]
    rewrite.nodes_added += len(merged) - 2 + (bias is not None)
    rewrite.nodes_added += 2 * bool(rest) + (len(rest) > 1)

    def build(editor: Editor) -> ir.Value:
        values = [part.value for part in merged]
        if weight is not None:
            x = rest[0].value
            if len(rest) > 1:
                operands, axis = [part.value for part in rest], reader.x_axis or -1
                x = editor.node(node, "Concat", operands, axis=axis).outputs[0]
            held = editor.constant(weight, f"{reader.weight.leaf.name}_rest")
            layer = editor.node(node, "Conv" if is_conv else "MatMul", [x, held])
            values.append(layer.outputs[0])
        total = values[0]
        for value in values[1:]:
            total = editor.node(node, "Add", [total, value]).outputs[0]
        if bias is not None:
            held = editor.constant(bias, f"{reader.y.name}_bias")
            total = editor.node(node, "Add", [total, held]).outputs[0]
        return total

    rewrite.replaced[reader.y] = build


def _bias(joined: Joined) -> FoldedTensor | None:
    """The bias of the layer, as it is added to the sum."""
    reader = joined.reader
    if reader.bias is None:
        return None
    held = constant(reader.node.inputs[reader.bias[1]])
    shape = reader.vector_shape
    if held is None or shape is None or held.size != reader.out_features:
        raise CannotRewriteError(f"{reader.label} adds a bias that is computed at run time")
    return FoldedTensor(scale(reshape(held.wide(), shape), reader.beta), held.dtype)
