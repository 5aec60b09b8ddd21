"""Branches: all linear paths from one value to one sum become one layer.

``x W + s (x A) B = x (W + s A B)``, and of convolutions ``x * K₁ + x * K₂ + x = x * (K₁ + K₂ + I)``
with the smaller kernels in the middle of the largest (X. Ding et al., "RepVGG", arXiv 2101.03697).
Nothing is inverted, and the error is that of rounding one weight in the place of several. What
would grow, a pair of low rank without a layer beside it, is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnx_fold.algebra.basis import Side
from onnx_fold.algebra.expression import Expression, FoldedTensor, cast, reshape, transpose
from onnx_fold.engine.folding import Candidate, FoldPass
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import compact
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.branches import Branches
from onnx_fold.streams.maps import LinearMap


class BranchesPass(FoldPass):
    """Let the paths between two values be one convolution, product or gain."""

    name = "branches"
    is_basis_change = False

    def of_branches(self, branches: Branches) -> Iterator[Candidate]:
        """Yield the one layer."""
        total, node = branches.map, branches.result.producer()
        assert node is not None
        dtype = branches.dtype
        weight = FoldedTensor(_stored(total), dtype)
        shape = _bias_shape(total)
        bias = None if total.bias is None else FoldedTensor(reshape(total.bias, shape), dtype)
        rewrite = Rewrite(added=[weight] if bias is None else [weight, bias])
        rewrite.dropped = {each.edge for each in branches.members}
        is_fused = bias is None or _is_conv(total)
        rewrite.nodes_added = 1 + (not is_fused) + len(branches.rest)
        rewrite.nodes_added -= len(branches.inside) - 1 - len(branches.later)

        def build(editor: Editor) -> ir.Value:
            largest = max(branches.members, key=lambda each: each.weight.size)
            name = largest.weight.leaf.name or f"{branches.result.name}_weight"
            held = editor.constant(weight, name)
            shift = None if bias is None else editor.constant(bias, f"{name}_bias")
            value = _layer(editor, node, branches.source, total, held, shift)
            for sign, other in branches.rest:
                operator, inputs = ("Add", [other, value]) if sign > 0 else ("Sub", [value, other])
                value = editor.node(node, operator, inputs).outputs[0]
            return value

        rewrite.replaced |= {**branches.later, branches.result: build}
        rounded = cast(weight.rounded, total.kernel.dtype)
        side = Side(total.matrix, _matrix(total, rounded))
        text = f"{compact(branches.labels)} into one"
        yield Candidate(self.name, text, rewrite, [side], [])


def _is_conv(total: LinearMap) -> bool:
    return total.axis < -1 and not total.is_gain


def _stored(total: LinearMap) -> Expression:
    """The kernel as the operator holds it: of a Conv, a gain, or ``[in, out]``."""
    if _is_conv(total):
        return total.kernel
    if total.is_gain:
        return reshape(total.kernel, (total.out_features, *total.window))
    return transpose(total.kernel)


def _matrix(total: LinearMap, stored: Expression) -> Expression:
    """``[in / groups · window, out]`` of what is stored."""
    if _is_conv(total) or total.is_gain:
        return transpose(reshape(stored, (total.out_features, -1)))
    return stored


def _bias_shape(total: LinearMap) -> tuple[int, ...]:
    """How the bias is stored: a Conv knows where it goes."""
    return (total.out_features, *(() if _is_conv(total) else total.window))


def _layer(
    editor: Editor,
    before: ir.Node,
    x: ir.Value,
    total: LinearMap,
    weight: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    """The operator that computes ``total``, and the Add of its bias if that is another one."""
    if _is_conv(total):
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return editor.node(
            before,
            "Conv",
            inputs,
            kernel_shape=total.window,
            group=total.groups,
            strides=total.strides,
            dilations=total.dilations,
            pads=(*total.before, *total.behind),
        ).outputs[0]
    value = editor.node(before, "Mul" if total.is_gain else "MatMul", [x, weight]).outputs[0]
    return value if bias is None else editor.node(before, "Add", [value, bias]).outputs[0]
