"""Absorb a square reader (or writer) into everything else that touches the stream.

With ``T = Q``: ``O* = O Q``, ``K* = Q⁻¹ K``, ``V* = Q⁻¹ V``, and Q is the identity (Graef,
arXiv 2404.12362, fig. 2(b); 2(c) and 2(d) for K and V of MHA). In the first block the embedding
table takes O's place. A square writer gives ``T = P⁻¹``, the choice for P in a parallel block. The
matrix has to be inverted, so the error grows with its condition number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_fold.basis import Basis, Side
from onnx_fold.constants import constant
from onnx_fold.expression import Array, FoldedTensor, scale, take
from onnx_fold.folding import Candidate, FoldPass, attempt
from onnx_fold.heads import Fused, Part, fused, role
from onnx_fold.linear import Linear, compact
from onnx_fold.rebase import become_identity, rebase, stored_matrix, weights_of
from onnx_fold.report import CandidateReport
from onnx_fold.resize import resize, resized_shape
from onnx_fold.rewrite import CannotRewriteError, Rewrite, new_constant, new_node, new_split
from onnx_fold.stream import Stream


class AbsorbPass(FoldPass):
    """Make a square layer of the stream the identity."""

    name = "absorb"

    def candidates(self, stream: Stream) -> Iterator[Candidate | CandidateReport]:
        """Yield a candidate for each square layer that the pivot option admits."""
        for reader in stream.readers:
            if reader.is_square and self._admits(role(reader.y)):
                yield _absorb(stream, reader, Basis(weights_of(reader)))
            elif (parts := fused(reader, stream.shapes)) is not None:
                for part in parts.parts:
                    if part.size == stream.width and self._admits(role(part.output)):
                        yield _absorb_part(stream, parts, part)
        for writer in stream.writers:
            if writer.is_square and self._admits("p"):
                yield _absorb(stream, writer, Basis(weights_of(writer), inverted=True))

    def _admits(self, kind: str | None) -> bool:
        return self.options.pivot == "auto" or kind is None or kind == self.options.pivot


def _absorb(stream: Stream, pivot: Linear, basis: Basis) -> Candidate | CandidateReport:
    text = _text(stream, pivot.label)

    def plan() -> Candidate:
        rebased = rebase(stream, basis, stream.width, pivot)
        rewrite = Rewrite(stored=rebased.stored)
        become_identity(rewrite, pivot)
        sides = rebased.writers, rebased.readers
        return Candidate(AbsorbPass.name, text, rewrite, *sides, basis)

    return attempt(AbsorbPass.name, text, plan)


def _text(stream: Stream, pivot: str) -> str:
    others = dict.fromkeys([*stream.written_by, *stream.read_by])
    return f"{pivot} into {compact([name for name in others if name != pivot])}"


def _absorb_part(stream: Stream, fused: Fused, part: Part) -> Candidate | CandidateReport:
    name = f"{fused.linear.label}[{part.start}:{part.start + part.size}]"
    text = _text(stream, name)
    return attempt(AbsorbPass.name, text, lambda: _plan_part(stream, fused, part, text))


def _plan_part(stream: Stream, fused: Fused, part: Part, text: str) -> Candidate:
    """Absorb the columns of ``part``: the fused weight, its bias and its Split lose them."""
    linear = fused.linear
    columns = slice(part.start, part.start + part.size)
    kept = np.r_[0 : part.start, part.start + part.size : linear.out_features]
    chosen, others = (take(weights_of(linear), part, 1) for part in (columns, kept))
    basis = Basis(chosen)
    rebased = rebase(stream, basis, stream.width, pivot=linear)
    tensor = FoldedTensor(linear.pack(basis.of_reader(others)), linear.weight.dtype)
    rewrite = Rewrite(stored={**rebased.stored, linear.edge: tensor})
    position = stream.readers.index(linear)
    rebased.readers[position : position + 1] = [
        Side(others, stored_matrix(linear, tensor)),
        Side(chosen, None),
    ]
    _shrink_path(fused, kept, rewrite)
    _replay_path(fused, part, columns, rewrite)
    _shrink_split(fused, part, rewrite)
    return Candidate(AbsorbPass.name, text, rewrite, rebased.writers, rebased.readers, basis)


def _shrink_path(fused: Fused, kept: Array, rewrite: Rewrite) -> None:
    """Let the operators between the layer and its Split handle the ``kept`` columns only."""
    for node in (fused.linear.node, *fused.path):
        resize(node.outputs[0], -1, len(kept), rewrite)
    for node, index in _vectors(fused):
        rewrite.stored[node, index] = _columns(node, index, kept)


def _replay_path(fused: Fused, part: Part, columns: slice, rewrite: Rewrite) -> None:
    """Let ``part`` come from what the layer reads, by way of the same biases and Reshapes."""
    biases = {node: _columns(node, index, columns) for node, index in _vectors(fused)}
    reshapes = {n: resized_shape(n, -1, part.size) for n in fused.path if n.op_type == "Reshape"}
    shape_inputs = {node: node.inputs[1] for node in reshapes}
    rewrite.added.extend(biases.values())
    rewrite.nodes_added += len(biases) + len(reshapes)

    def build(graph: ir.Graph) -> ir.Value:
        value = fused.linear.x
        for node in (fused.linear.node, *fused.path):
            operand: ir.Value | None = None
            if node in biases:
                operand = new_constant(graph, biases[node], f"{part.output.name}_bias")
            elif node in reshapes:
                shape = reshapes[node]
                if shape is None:
                    operand = shape_inputs[node]
                elif isinstance(shape, ir.TensorProtocol):
                    operand = new_constant(graph, shape, f"{part.output.name}_shape")
                else:
                    operand = shape(graph)
            if operand is None:
                continue
            operator = "Reshape" if node in reshapes else "Add"
            value = new_node(graph, fused.split, operator, [value, operand]).outputs[0]
        return value

    rewrite.replaced[part.output] = build


def _shrink_split(fused: Fused, part: Part, rewrite: Rewrite) -> None:
    """Split what is left into the other parts, or pass it on if there is only one."""
    others = [other for other in fused.parts if other is not part]
    made: list[ir.Value] = []

    def split(graph: ir.Graph, index: int) -> ir.Value:
        source = fused.split.inputs[0]
        assert source is not None
        if len(others) == 1:
            return source
        if not made:
            made.extend(new_split(graph, fused.split, source, [other.size for other in others]))
        return made[index]

    for index, other in enumerate(others):
        rewrite.replaced[other.output] = partial(split, index=index)
    rewrite.nodes_added += len(others) > 1


def _vectors(fused: Fused) -> Iterator[tuple[ir.Node, int]]:
    """Inputs on the path that hold a constant along the columns."""
    linear = fused.linear.node
    edges = [(linear, 2)] if linear.op_type == "Gemm" and len(linear.inputs) > 2 else []
    adds = (node for node in fused.path if node.op_type == "Add")
    edges.extend((node, 0 if constant(node.inputs[0]) is not None else 1) for node in adds)
    for node, index in edges:
        held = constant(node.inputs[index])
        if held is None or held.shape[-1:] != (fused.linear.out_features,):
            raise CannotRewriteError(
                f"{node.op_type} '{node.name}' adds something else than a bias"
            )
        yield node, index


def _columns(node: ir.Node, index: int, columns: Array | slice) -> FoldedTensor:
    held = constant(node.inputs[index])
    assert held is not None
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    factor = beta if isinstance(columns, slice) else 1.0  # the part taken out leaves the Gemm
    return FoldedTensor(scale(take(held.wide(), columns, -1), factor), held.dtype)
