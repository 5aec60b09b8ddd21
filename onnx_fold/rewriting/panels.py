"""A layer cut into panels of columns, each of which reads a part of what the layer reads.

What the other parts would be multiplied by is zero, and is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
from onnx_fold.graph.linear import Linear
from onnx_fold.rewriting.record import Operand, Present
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
    if layer.bias is not None:
        total = at("Add", total, Present(layer.bias))
    rewrite.replaced[layer.y] = total


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
