"""Tables: what depends on the rows of a constant alone is computed once for each row.

``y = f(E)[ids]`` in the place of ``f(E[ids])``, where ``f`` is linear layers, norms and whatever
else looks at each row by itself: "precompute the first layer" (N. Graef, arXiv 2402.13388). The
same holds for a learned query that is repeated for every input: ``repeat(q) W + b`` is
``repeat(q W + b)``, and ``d²`` weights are as many as the query has rows. Nothing is inverted, and
each result is rounded once. Rows that tokens pick are asked about where the weights count that one
token reads: the tables store more than the layers did.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.expression import evaluate, reshape, take
from onnx_fold.engine import (
    Candidate,
    CandidateReport,
    CannotRewriteError,
    FoldedTensor,
    FoldPass,
    Operand,
    Proposal,
    Rewrite,
    RowLayer,
    Stream,
    compact,
    propose,
)
from onnx_fold.graph.channels import channels, ports
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.resize import resized_shape


class TablesPass(FoldPass):
    """Let a layer that reads rows of a constant go into the constant."""

    name = "tables"
    is_basis_change = False

    def of_rows(self, layer: RowLayer) -> Iterator[Proposal]:
        """Yield the constant that takes the place of the layers."""
        text = f"{compact(layer.labels)} into {layer.rows.source.label}"
        if layer.rows.obstacle:
            yield CandidateReport(self.name, text, 0, 0, refused=layer.rows.obstacle)
        else:
            yield propose(self.name, text, lambda: _plan(layer, text))


def _plan(layer: RowLayer, text: str) -> Candidate:
    """The rows as they have become, moved to where the result was."""
    rows, node = layer.rows, layer.inside[-1]
    rewrite = Rewrite()
    try:
        evaluate(take(rows.numbers, np.zeros(1, np.intp), 0))
    except Exception as error:  # whatever the NumPy code of an operator raises
        raise CannotRewriteError(f"its rows cannot be computed here: {error}") from error
    at = rewrite.before(node)
    held = FoldedTensor(reshape(rows.numbers, rows.shape), layer.dtype)
    if _is_alone(layer):
        rewrite.stored[rows.source.edge] = held
        rewrite.replaced[rows.value] = rows.moves[-1][0].outputs[0]
        return Candidate(TablesPass.name, text, rewrite)
    value: Operand = at.constant(held, f"{layer.rows.value.name}_rows")
    for move, before in rows.moves:
        shape = None if before == layer.width else _resized(move, before, layer, rewrite)
        if operator(move) == "ConstantOfShape":
            value = at("Expand", value, move.inputs[0])
        else:
            value = at.again(move, value, *([shape] if shape else move.inputs[1:]))
    rewrite.replaced[rows.value] = value
    return Candidate(TablesPass.name, text, rewrite)


def _is_alone(layer: RowLayer) -> bool:
    """Whether nothing else reads the rows, and they stay as wide: then they keep their place."""
    rows = layer.rows
    moves = [move for move, _ in rows.moves]
    if not moves or rows.source.edge != (moves[0], 0) or moves[0].op_type == "ConstantOfShape":
        return False
    widths = {rows.source.weight.shape[-1:], *((width,) for _, width in rows.moves)}
    if widths != {(layer.width,)}:
        return False
    following = [{move} for move in moves[1:]] + [set(rows.steps)]
    return all(
        node in after or operator(node) in ("Shape", "Size")
        for move, after in zip(moves, following, strict=True)
        for node, _ in move.outputs[0].uses()
    ) and not any(move.outputs[0].is_graph_output() for move in moves)


def _resized(move: ir.Node, before: int, layer: RowLayer, rewrite: Rewrite) -> Operand | None:
    """The shape that ``move`` needs for as many channels as the result has; None for its own."""
    if channels(move).shape_input is None and operator(move) != "ConstantOfShape":
        return None
    if operator(move) == "ConstantOfShape":
        raise CannotRewriteError(f"ConstantOfShape '{move.name}' names the width of its channels")
    ends = [value for value in (move.inputs[0], move.outputs[0]) if value is not None]
    stream = Stream(before, layer.search, ports, dict.fromkeys(ends, -1))
    shape = resized_shape(move, stream, layer.width, rewrite)
    if isinstance(shape, ir.TensorProtocol):
        return rewrite.before(move).constant(shape, f"{move.outputs[0].name}_shape")
    return shape
