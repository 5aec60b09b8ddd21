"""A layer cut into panels of columns, each of which reads a part of what the layer reads.

What the other parts would be multiplied by is zero, and is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import product_dtype
from onnx_fold.algebra.expression import (
    Concatenate,
    Expression,
    FoldedTensor,
    Literal,
    broadcast,
    cast,
)
from onnx_fold.graph.constants import constant
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import Linear
from onnx_fold.rewriting.rewrite import Rewrite


@dataclass(frozen=True)
class Panels:
    """A layer cut into panels of columns, each of which reads a part of the channels.

    Attributes:
        layer: The layer.
        parts: For each panel its first column, the last, and the first and last channel it reads.
    """

    layer: Linear
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
        extra = (count > 1) + (self.layer.bias is not None) + self.layer.y.is_graph_output()
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
    layer = panels.layer
    rewrite.added.extend(tensors)
    goes = not layer.y.is_graph_output()  # with what is replaced, else an Identity takes its name
    rewrite.nodes_added += panels.nodes + goes
    rewrite.copied += panels.copied
    if layer.bias is not None and layer.bias not in rewrite.stored:
        bias = layer.node.inputs[layer.bias[1]]
        assert bias is not None
        rewrite.kept.add(bias)

    def build(editor: Editor) -> ir.Value:
        node, name = layer.node, layer.weight.leaf.name
        axes = editor.integers([-1], f"{name}_axes")
        products = []
        for tensor, (_, _, start, end) in zip(tensors, panels.parts, strict=True):
            value = layer.x
            if not panels.is_whole(start, end):
                bounds = [editor.integers([at], f"{name}_bound") for at in (start, end)]
                value = editor.node(node, "Slice", [value, *bounds, axes]).outputs[0]
            weight = editor.constant(tensor, f"{name}_panel")
            products.append(editor.node(node, "MatMul", [value, weight]).outputs[0])
        total = products[0]
        if len(products) > 1:
            total = editor.node(node, "Concat", products, axis=-1).outputs[0]
        if layer.bias is not None:
            bias = node.inputs[layer.bias[1]]  # what is stored there by now
            total = editor.node(node, "Add", [total, bias]).outputs[0]
        return total

    rewrite.replaced[layer.y] = build


def rebuilt(panels: Panels, tensors: Sequence[FoldedTensor]) -> Expression:
    """What the panels multiply by together, with the zeros that are not stored."""
    rows = panels.layer.in_features
    columns: list[Expression] = []
    for tensor, (first, last, start, end) in zip(tensors, panels.parts, strict=True):
        stored = cast(tensor.rounded, product_dtype(tensor.dtype))
        zero = Literal(np.zeros((1, 1), stored.dtype))
        above, below = (broadcast(zero, (n, last - first)) for n in (start, rows - end))
        parts = [each for each in (above, stored, below) if each.shape[0]]
        columns.append(stored if len(parts) == 1 else Concatenate(tuple(parts), 0))
    return columns[0] if len(columns) == 1 else Concatenate(tuple(columns), 1)
