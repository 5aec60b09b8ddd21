"""``onnx.reference`` with kernels that finish: images of any size in seconds and little memory.

Its Conv writes out the window of every position, its MaxPool and ConvTranspose loop over them, its
Erf calls Python for every element, in float32, its Gelu is exact to float32, its GatherElements
fails on a matrix of more than 32 columns, its BatchNormalization below opset 14 mixes the
statistics of its input in, its OneHot and CumSum take no ``[1]`` for a number, and it has no Resize
of opset 10 and no Scatter. The kernels here compute the same from the ONNX specification. What no
later node reads is dropped at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_cum_sum, op_one_hot, op_scatter_elements

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.operators import Erf, Gelu
from onnx_fold.algebra.precision import is_float

__all__ = ["evaluator", "run"]

_BLOCK = 2**20
"""Elements of windows that are written out at a time."""


class GatherElements(OpRun):
    """An element of ``data`` for each index, which says where on ``axis`` it is."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        along = (axis or 0) % data.ndim
        sizes = enumerate(indices.shape)
        part = tuple(slice(None if place == along else size) for place, size in sizes)
        return (np.take_along_axis(data[part], indices, along),)


class Conv(OpRun):
    """A convolution as products of matrices, some rows of the result at a time."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        axes, groups = x.ndim - 2, group or 1
        windows = _windows(x, w.shape[2:], auto_pad, dilations, pads, strides)
        batch, channels, *sizes = windows.shape[: x.ndim]
        weights = w.reshape(groups, w.shape[0] // groups, -1)
        result = np.empty((batch, w.shape[0], *sizes), x.dtype)
        rows = max(1, _BLOCK // max(1, math.prod(windows.shape) // max(1, sizes[0])))
        for start in range(0, sizes[0], rows):
            part = windows[:, :, start : start + rows]
            around = part.shape[2 : x.ndim]
            split = part.reshape(batch, groups, channels // groups, *around, *w.shape[2:])
            order = (1, 2, *range(3 + axes, 3 + 2 * axes), 0, *range(3, 3 + axes))
            columns = split.transpose(order).reshape(groups, weights.shape[2], -1)
            products = (weights @ columns).reshape(groups, -1, batch, *around)
            made = products.transpose(2, 0, 1, *range(3, 3 + axes))
            result[:, :, start : start + rows] = made.reshape(batch, -1, *around)
        if b is not None:
            result += b.reshape(-1, *[1] * axes)
        return (result,)


def _windows(
    x: Array,
    window: Sequence[int],
    auto_pad: str | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
    *,
    fill: float = 0.0,
    ceil: bool = False,
) -> Array:
    """What is under each window, ``[batch, channels, *places, *window]``; ``fill`` around ``x``."""
    steps, spread = strides or [1] * len(window), dilations or [1] * len(window)
    reach = [(size - 1) * step + 1 for size, step in zip(window, spread, strict=True)]
    around = _padding(x.shape[2:], reach, steps, auto_pad, pads)
    if ceil:
        around = [
            _to_last_window(size, *ends, *how)
            for size, ends, *how in zip(x.shape[2:], around, reach, steps, strict=True)
        ]
    x = np.pad(x, [(0, 0), (0, 0), *around], constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(2, x.ndim)))
    picked = [slice(None, None, step) for step in (*steps, *spread)]
    return windows[(slice(None), slice(None), *picked)]


def _padding(
    sizes: Sequence[int],
    reach: Sequence[int],
    steps: Sequence[int],
    auto_pad: str | None,
    pads: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """How much is in front of each axis and behind it."""
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        found = []
        for size, window, step in zip(sizes, reach, steps, strict=True):
            total = max(0, (-(-size // step) - 1) * step + window - size)
            small, large = total // 2, total - total // 2
            found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
        return found
    if auto_pad == "VALID" or pads is None:
        return [(0, 0)] * len(sizes)
    return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))


class ConvTranspose(OpRun):
    """A transposed convolution: products of each position of the window are added."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        sizes, window, groups = x.shape[2:], w.shape[2:], group or 1
        ones = [1] * len(window)
        steps, spread, extra = strides or ones, dilations or ones, output_padding or [0] * len(ones)
        whole = [
            (size - 1) * step + (places - 1) * apart + 1 + more
            for size, step, places, apart, more in zip(
                sizes, steps, window, spread, extra, strict=True
            )
        ]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER") and not output_shape:
            output_shape = [size * step for size, step in zip(sizes, steps, strict=True)]
        around = _padding(sizes, window, steps, None, pads)
        if output_shape:
            totals = [have - want for have, want in zip(whole, output_shape, strict=True)]
            around = [(total - total // 2, total // 2) for total in totals]
            if auto_pad == "SAME_UPPER":
                around = [ends[::-1] for ends in around]
        columns = x.reshape(x.shape[0], groups, w.shape[0] // groups, -1)
        weights = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        result = np.zeros((x.shape[0], groups * w.shape[1], *whole), x.dtype)
        for place in np.ndindex(*window):
            starts = [index * apart for index, apart in zip(place, spread, strict=True)]
            stops = [
                start + (size - 1) * step + 1
                for start, size, step in zip(starts, sizes, steps, strict=True)
            ]
            at = (slice(*bounds) for bounds in zip(starts, stops, steps, strict=True))
            products = weights[:, :, :, *place].transpose(0, 2, 1) @ columns
            result[:, :, *at] += products.reshape(x.shape[0], -1, *sizes)
        kept = (slice(a, size - b) for size, (a, b) in zip(whole, around, strict=True))
        result = result[:, :, *kept]
        return (result if b is None else result + b.reshape(-1, *ones),)


class MaxPool(OpRun):
    """The largest element of each window; where they are is not asked for."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        storage_order: int | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        lowest = -np.inf if is_float(x) else np.iinfo(x.dtype).min
        how = auto_pad, dilations, pads, strides
        windows = _windows(x, kernel_shape or (), *how, fill=lowest, ceil=bool(ceil_mode))
        return (windows.max(tuple(range(2 - x.ndim, 0))),)


def _to_last_window(size: int, before: int, behind: int, reach: int, step: int) -> tuple[int, int]:
    """Padding to the end of the last window that begins inside or in the padding in front."""
    count = -(-(size + before + behind - reach) // step) + 1
    if (count - 1) * step >= size + before:
        count -= 1
    return before, max(behind, (count - 1) * step + reach - size - before)


class BatchNormalization(OpRun):
    """With the statistics that it is given; with those of its input where it is told to train."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        var: Array,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int | None = None,
        **_: Any,
    ) -> tuple[Array, ...]:
        own: tuple[Array, ...] = ()
        if training_mode:
            others = (0, *range(2, x.ndim))
            given, (mean, var) = (mean, var), (x.mean(others), x.var(others))
            shares = zip(given, (mean, var), strict=True)
            own = tuple(momentum * old + (1 - momentum) * new for old, new in shares)
        shape = (-1, *[1] * (x.ndim - 2))
        factors = (scale / np.sqrt(var + epsilon)).reshape(shape)
        y = (x - mean.reshape(shape)) * factors + bias.reshape(shape)
        return (y.astype(x.dtype), *own)


class Resize(OpRun):
    """As opset 10 has it: pixel ``i`` is taken from ``i / scale``, below it or between its two."""

    op_domain = ""

    def _run(self, x: Array, scales: Array, mode: str | None = None, **_: Any) -> tuple[Array]:
        for axis, factor in enumerate(scales.tolist()):
            size = x.shape[axis]
            places = np.arange(math.floor(size * factor)) / factor
            below = np.minimum(np.floor(places).astype(np.int64), size - 1)
            taken = np.take(x, below, axis)
            if mode == "linear":
                share = (places - below).reshape(-1, *[1] * (x.ndim - 1 - axis))
                above = np.take(x, np.minimum(below + 1, size - 1), axis)
                taken = taken + share.astype(x.dtype) * (above - taken)
            x = taken
        return (x,)


class Scatter(op_scatter_elements.ScatterElements):
    """What ScatterElements was called before opset 11."""

    op_domain = ""


def _of_number(kernel: Any) -> type[OpRun]:
    """``kernel``, whose second input is a number, or a vector of one."""

    def run(self: Any, x: Array, number: Array, *others: Any, **how: Any) -> Any:
        return kernel._run(self, x, np.reshape(number, ()), *others, **how)

    return type(kernel.__name__, (kernel,), {"op_domain": "", "_run": run})


CumSum, OneHot = _of_number(op_cum_sum.CumSum), _of_number(op_one_hot.OneHot)


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """``model`` for :func:`run`, computed by NumPy in the types that it has."""
    asks_for_places = any(
        node.op_type == "MaxPool" and len(node.output) > 1 for node in model.graph.node
    )
    own: list[type[OpRun]] = [BatchNormalization, Conv, ConvTranspose, CumSum, Erf, GatherElements]
    own += [Gelu, OneHot, Scatter]
    if not asks_for_places:
        own.append(MaxPool)
    if any(each.domain in ("", "ai.onnx") and each.version == 10 for each in model.opset_import):
        own.append(Resize)
    return ReferenceEvaluator(model, new_ops=own)


def run(model: ReferenceEvaluator, inputs: Mapping[str, Any]) -> list[Any]:
    """The outputs of ``model``, in order; a value is dropped behind the last node that reads it."""
    nodes = model.rt_nodes_
    if any(node.need_context() for node in nodes):  # bodies may read any value
        return list(model.run(None, dict(inputs)))
    last = {name: place for place, node in enumerate(nodes) for name in node.input}
    kept = {*model.output_names, ""}
    known: dict[str, Any] = {"": None, **model.rt_inits_, **inputs}
    for place, node in enumerate(nodes):
        linked: dict[str, Any] = {}
        if node.has_linked_attribute:
            linked["linked_attributes"] = {}
        results = node.run(*(known[name] for name in node.input), **linked)
        known.update(zip(node.output, results, strict=False))
        for name in node.input:
            if last[name] == place and name not in kept:
                known.pop(name, None)
    return [known[name] for name in model.output_names]
