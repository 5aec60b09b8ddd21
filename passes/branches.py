"""Branches: all linear paths from one value to one sum become one layer.

``x W + s (x A) B = x (W + s A B)``, and of convolutions ``x * K₁ + x * K₂ + x = x * (K₁ + K₂ + I)``
with the smaller kernels in the middle of the largest (X. Ding et al., "RepVGG", arXiv 2101.03697).
A layer and the BatchNorm beside it are one too, a convolution and its gains, a product and the
LayerScale behind it, and a layer between Transposes that undo each other: a product of pixels is a
1x1 convolution. Nothing is inverted, and the error is that of rounding one weight in the place of
several. What would grow, a pair of low rank without a layer beside it, is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from onnx_fold.algebra.expression import Expression, reshape, transpose
from onnx_fold.engine import (
    Branches,
    Candidate,
    FoldedTensor,
    FoldPass,
    Made,
    Operand,
    Recorder,
    Rewrite,
    compact,
)
from onnx_fold.graph.operators import operator
from onnx_fold.streams.maps import LinearMap, transposed


class BranchesPass(FoldPass):
    """Let the paths between two values be one convolution, product or gain."""

    name = "branches"
    is_basis_change = False

    def of_branches(self, branches: Branches) -> Iterator[Candidate]:
        """Yield the one layer."""
        total, node = branches.map, branches.result.producer()
        assert node is not None
        largest = max(branches.members, key=lambda each: each.weight.size)
        name = largest.weight.leaf.name or f"{branches.result.name}_weight"
        weight = FoldedTensor(_stored(total), branches.dtype)
        rewrite = Rewrite()
        at = rewrite.before(node)
        value = _layer(at, branches.source, total, weight, name)
        for sign, other in branches.rest:
            value = at("Add", other, value) if sign > 0 else at("Sub", value, other)
        rewrite.replaced |= {**branches.later, branches.result: value}
        yield Candidate(self.name, f"{_named(branches)} into one", rewrite)


def _named(branches: Branches) -> str:
    """The layers, and that it is not they alone."""
    inside = {operator(node) for node in branches.inside}
    beside = ""
    if len(branches.layers) == 1:
        moved = " and what moves its channels" if "Transpose" in inside else ""
        beside = moved or (" and its gains" if inside & {"Div", "Mul"} else "")
    return compact(branches.labels) + beside


def _is_conv(total: LinearMap) -> bool:
    return total.axis < -1 and not total.is_gain


def _stored(total: LinearMap) -> Expression:
    """The kernel as the operator holds it: of a Conv, a gain, or ``[in, out]``."""
    if total.spread is not None:
        return transposed(total.kernel, total.groups)
    if _is_conv(total):
        return total.kernel
    if total.is_gain:
        return reshape(total.kernel, (total.out_features, *total.window))
    return transpose(total.kernel)


def _layer(at: Recorder, x: ir.Value, total: LinearMap, weight: FoldedTensor, name: str) -> Made:
    """The operator that computes ``total``, and the Add of its bias if that is another one."""
    inputs: list[Operand] = [x, at.constant(weight, name)]
    if _is_conv(total):
        if total.bias is not None:
            inputs.append(at.constant(FoldedTensor(total.bias, weight.dtype), f"{name}_bias"))
        spread: dict[str, Any] = {}
        if total.spread is not None:
            spread["output_padding"] = total.spread
        return at(
            "Conv" if total.spread is None else "ConvTranspose",
            *inputs,
            **spread,
            kernel_shape=total.window,
            group=total.groups,
            strides=total.strides,
            dilations=total.dilations,
            pads=(*total.before, *total.behind),
        )
    value = at("Mul" if total.is_gain else "MatMul", *inputs)
    if total.bias is None:
        return value
    bias = reshape(total.bias, (total.out_features, *total.window))
    return at("Add", value, at.constant(FoldedTensor(bias, weight.dtype), f"{name}_bias"))
