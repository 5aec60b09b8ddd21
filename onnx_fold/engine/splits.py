"""Splits of a constant, written as the constants that they make for the time of the fold.

Exporters store the projections of ``nn.MultiheadAttention`` as one weight, and cut it in the graph
where query, key and value are read from different values. Each part is a weight like any other.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from onnx_fold.algebra.expression import FoldedTensor, take
from onnx_fold.graph.constants import FLOATS, constant, integers
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.operators import only_user, operator

__all__ = ["split_constants"]


def split_constants(graph: ir.Graph, editor: Editor, protect: Collection[str] = ()) -> ExitStack:
    """Let each Split of a constant that nothing else reads be the constants that it makes.

    What has to do with a name in ``protect`` stays as it is.

    Returns:
        What writes back, when it is closed, those of which every part is still read.
    """
    with ExitStack() as parts:
        for node in list(graph):
            names = {node.name, *(each.name for each in (*node.inputs, *node.outputs) if each)}
            if operator(node) == "Split" and not names.intersection(protect):
                _split(node, parts, editor)
        return parts.pop_all()


def _split(node: ir.Node, parts: ExitStack, editor: Editor) -> None:
    whole = node.inputs[0]
    held, sizes = constant(whole), _sizes(node)
    if whole is None or held is None or sizes is None or held.dtype not in FLOATS:
        return
    if held.leaf is not whole or not whole.is_initializer() or only_user(whole) is not node:
        return
    if any(output.is_graph_output() or not output.uses() for output in node.outputs):
        return
    axis, start = node.attributes.get_int("axis", 0), 0
    made: list[ir.Value] = []
    for output, size in zip(node.outputs, sizes, strict=True):
        rows = take(held.values, np.arange(start, start + size), axis)
        part = editor.constant(FoldedTensor(rows, held.dtype), f"{output.name}_part")
        replace_all_uses_with(output, part)
        made.append(part)
        start += size

    def write_back() -> None:
        if not all(part.uses() for part in made):
            editor.remove_dead(node.outputs)
            return
        for part, output in zip(made, node.outputs, strict=True):
            replace_all_uses_with(part, output)
        editor.remove_dead(made)

    parts.callback(write_back)


def _sizes(node: ir.Node) -> tuple[int, ...] | None:
    """The size of each part, if the graph says it."""
    stated = node.attributes.get_ints("split") or integers(
        node.inputs[1] if len(node.inputs) > 1 else None
    )
    held, count = constant(node.inputs[0]), len(node.outputs)
    if stated or held is None:
        return tuple(stated) if stated and len(stated) == count else None
    size = held.shape[node.attributes.get_int("axis", 0)]
    largest = -(-size // count)
    return (*(largest,) * (count - 1), size - largest * (count - 1))
