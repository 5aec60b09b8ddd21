"""A fused projection without one of its parts: the others, laid out where they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnx_fold.algebra.expression import FoldedTensor, reshape, scale, take
from onnx_fold.graph.constants import constant, integers
from onnx_fold.graph.layout import CHANNELS, Columns, ComputedShape, Layout
from onnx_fold.graph.linear import Edge
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.record import Operand
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.fused import Fused, Part
from onnx_fold.streams.stream import Stream


def take_out(stream: Stream, fused: Fused, part: Part, rewrite: Rewrite) -> None:
    """Let ``part`` be what the layer reads; the layer writes the others, one behind another.

    Raises:
        CannotRewriteError: The width of what the layer writes is read.
    """
    linear = fused.linear
    if fused.shape_readers:
        raise CannotRewriteError(f"{fused.shape_readers[0].name} reads the width of {linear.label}")
    others = [other for other in fused.parts if other is not part]
    kept = np.concatenate([other.columns for other in others])
    own = [_bias(edge, part.columns, is_kept=False) for edge in fused.biases]
    left = {edge: _bias(edge, kept, is_kept=True) for edge in fused.biases}
    if linear.bias is not None:
        rewrite.stored[linear.bias] = left.pop(linear.bias)
    rewrite.resized[linear.y] = (-1, len(kept))
    ends = {each.value.producer() for each in fused.parts}
    first = min((node for node in fused.nodes if node in ends), key=stream.search.position)
    at = rewrite.before(first)

    order = at.integers(np.argsort(np.concatenate([kept, part.columns])), f"{linear.y.name}_order")
    whole = at("Concat", linear.y, linear.x, axis=-1)
    rewrite.parted[linear.y] = at("Gather", whole, order, axis=-1)

    def biased(value: Operand, biases: Iterable[FoldedTensor]) -> Operand:
        for tensor in biases:
            value = at("Add", value, at.constant(tensor, f"{linear.y.name}_bias"))
        return value

    alone = biased(linear.x, own)
    layouts = [each.layout for each in fused.parts]
    layouts.sort(key=lambda each: stream.search.position(each.reshape) if each.reshape else 0)
    shapes = _compute_shapes(layouts, rewrite)
    rewrite.replaced[part.value] = _lay_out(part, alone, shapes, rewrite)
    rest = biased(linear.y, left.values())
    sizes = [len(other.columns) for other in others]
    pieces = at.split(rest, sizes) if len(sizes) > 1 else [rest]
    for other, piece in zip(others, pieces, strict=True):
        rewrite.replaced[other.value] = _lay_out(other, piece, shapes, rewrite)


def _bias(edge: Edge, columns: Columns, *, is_kept: bool) -> FoldedTensor:
    """The elements of a bias that belong to ``columns``."""
    node, index = edge
    held = constant(node.inputs[index])
    assert held is not None
    leaves_gemm = operator(node) == "Gemm" and not is_kept
    beta = node.attributes.get_float("beta", 1.0) if leaves_gemm else 1.0
    vector = take(reshape(held.wide(), (held.size,)), columns, 0)
    return FoldedTensor(scale(vector, beta), held.dtype)


def _compute_shapes(layouts: Sequence[Layout], rewrite: Rewrite) -> dict[ComputedShape, Operand]:
    """The shapes that ``layouts`` need and the graph computes, each once.

    Those whose Reshape comes first in the graph come first.
    """
    made: dict[ComputedShape, Operand] = {}
    for layout in layouts:
        needed, before = layout.computed_shape, layout.reshape
        if needed is None or before is None or needed in made:
            continue
        source, leading, tail = needed
        at, name = rewrite.before(before), before.name or before.op_type
        start, stop, heads = (
            at.integers(numbers, f"{name}_{suffix}")
            for numbers, suffix in (([0], "start"), ([leading], "stop"), (tail, "heads"))
        )
        made[needed] = at("Concat", at("Slice", source, start, stop), heads, axis=0)
    return made


def _lay_out(
    part: Part, value: Operand, shapes: Mapping[ComputedShape, Operand], rewrite: Rewrite
) -> Operand:
    """Lay out ``value``, ``[leading axes of the layer..., channels]``, as ``part`` was."""
    layout, end = part.layout, part.value.producer()
    assert end is not None
    at, leading = rewrite.before(end), layout.num_leading
    if layout.reshape is not None or layout.columns.ndim != 1:
        if (computed := layout.computed_shape) is not None:
            shape = shapes[computed]
        else:
            shape = at.integers(_shape(layout), f"{end.name or end.op_type}_shape")
        value = at("Reshape", value, shape)
    if not layout.is_in_order:
        channel = iter(range(leading, len(layout.axes)))
        perm = [next(channel) if axis == CHANNELS else axis for axis in layout.axes]
        value = at("Transpose", value, perm=perm)
    return value


def _shape(layout: Layout) -> list[int]:
    """What a Reshape to ``layout`` is given, where the graph need not compute it."""
    given = None if layout.reshape is None else integers(layout.reshape.inputs[1])
    leading = (0,) * layout.num_leading if given is None else given[: layout.num_leading]
    return [*leading, *layout.columns.shape]
