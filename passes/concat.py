"""Concat: a layer behind channels side by side goes into the layers that write them.

``[x W₁ + b₁, y W₂] F = x (W₁ F₁) + b₁ F₁ + y (W₂ F₂)``, with the rows of F that belong to each. It
is the head of SegFormer (E. Xie et al., arXiv 2105.15203): four projections, resized to one size,
side by side, and a 1x1 convolution. Nothing is inverted. What is written by something else stays
side by side, with its rows of F.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_fold.algebra.expression import reshape, scale, take
from onnx_fold.engine import (
    Basis,
    Candidate,
    CannotRewriteError,
    FoldedTensor,
    FoldPass,
    Joined,
    Operand,
    Proposal,
    Recorder,
    Rewrite,
    compact,
    propose,
    rebase,
    resize_stream,
)
from onnx_fold.graph.constants import constant
from onnx_fold.graph.operators import operator


class ConcatPass(FoldPass):
    """Let a layer behind a Concat of channels be a sum of the layers in front of it."""

    name = "concat"
    is_basis_change = False

    def of_joined(self, joined: Joined) -> Iterator[Proposal]:
        """Yield the merge of the layer into all that write its operands."""
        text = f"{joined.reader.label} into {compact(joined.labels)}"
        yield propose(self.name, text, lambda: _plan(joined, text))


def _plan(joined: Joined, text: str) -> Candidate:
    """Writers become ``W F``; their streams carry what ``F`` wrote, and are added."""
    reader, rewrite = joined.reader, Rewrite()
    for part in joined.parts:
        if part.stream is None:
            continue
        if reader.out_features > part.stream.width:
            raise CannotRewriteError(f"'{part.value.name}' would have more channels than before")
        rows = take(reader.matrix, np.asarray(part.rows), 0)
        rewrite.stored |= rebase(part.stream, Basis(rows), reader.out_features).stored
        if reader.out_features != part.stream.width:
            resize_stream(part.stream, part.stream.values, reader.out_features, rewrite)
    rewrite.replaced[reader.y] = _sum(joined, rewrite.before(reader.node))
    return Candidate(ConcatPass.name, text, rewrite)


def _sum(joined: Joined, at: Recorder) -> Operand:
    """``Σ operands + rest F + bias`` in the place of the layer."""
    reader, terms = joined.reader, list[Operand]()
    terms += [part.value for part in joined.parts if part.stream is not None]
    rest = [part for part in joined.parts if part.stream is None]
    if rest:
        matrix = take(reader.matrix, np.concatenate([part.rows for part in rest]), 0)
        is_conv = operator(reader.node) == "Conv"
        packed = reader.pack(matrix) if is_conv else matrix
        held = FoldedTensor(packed, reader.weight.dtype)
        x: Operand = rest[0].value
        if len(rest) > 1:
            x = at("Concat", *(part.value for part in rest), axis=reader.x_axis or -1)
        weight = at.constant(held, f"{reader.weight.leaf.name}_rest")
        terms.append(at("Conv" if is_conv else "MatMul", x, weight))
    if (bias := _bias(joined)) is not None:
        terms.append(at.constant(bias, f"{reader.y.name}_bias"))
    total = terms[0]
    for term in terms[1:]:
        total = at("Add", total, term)
    return total


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
