"""Linear maps along one channel axis: what a layer does to a value, and what a path of layers does.

Products, gains, biases, inference BatchNorms and convolutions are one kind of map, ONNX's Conv:
``y = x * kernel + bias``. A product is a convolution without a window, a gain has as many groups as
channels. Maps in a row are one map (:meth:`LinearMap.then`), and so is a sum of maps (:func:`add`).
The kernels are merged as in X. Ding et al., "RepVGG", arXiv 2101.03697.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Indices
from onnx_fold.algebra.expression import (
    Concatenate,
    Expression,
    Placed,
    Sum,
    Times,
    broadcast,
    evaluate,
    literal,
    product,
    reshape,
    scale,
    take,
    transpose,
)
from onnx_fold.graph.channels import CUTS, taken
from onnx_fold.graph.constants import FLOATS, Constant, constant
from onnx_fold.graph.linear import as_linear
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.fixed import fixed

__all__ = ["LinearMap", "add", "as_map", "as_selection", "as_vector", "identity", "transposed"]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y = x * kernel + bias``.

    Attributes:
        axis: The channel axis of ``x`` and ``y``, from the end. The window lies along the axes
            behind it.
        kernel: ``[out, in / groups, *window]``, float64.
        groups: Into how many parts the channels are divided.
        bias: ``[out]``, float64; None if nothing is added.
        strides: Steps of the window, one for each of its axes.
        dilations: Distances between its positions.
        before: Zeros in front of ``x`` along these axes.
        behind: Zeros behind it.
        spread: Zeros behind ``y``, for each axis of the window, of a transposed convolution, which
            spreads each position over a window; None for any other map.
    """

    axis: int
    kernel: Expression
    groups: int
    bias: Expression | None
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    behind: tuple[int, ...]
    spread: tuple[int, ...] | None = None

    @property
    def out_features(self) -> int:
        """Channels of ``y``."""
        return self.kernel.shape[0]

    @property
    def in_features(self) -> int:
        """Channels of ``x``."""
        return self.kernel.shape[1] * self.groups

    @property
    def window(self) -> tuple[int, ...]:
        """Size of the window."""
        return self.kernel.shape[2:]

    @property
    def is_padded(self) -> bool:
        """Whether some positions of ``y`` read zeros around ``x``, or less than others."""
        return self.spread is not None or any((*self.before, *self.behind))

    @property
    def is_pointwise(self) -> bool:
        """Whether each position of ``y`` comes from the same position of ``x``."""
        return not self.is_padded and self.has_one_position

    @property
    def has_one_position(self) -> bool:
        """Whether each position of ``y`` comes from one of ``x``, or of the zeros around it."""
        return self.spread is None and all(size == 1 for size in (*self.window, *self.strides))

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is made of the same one of ``x``."""
        return self.groups == self.in_features == self.out_features

    @property
    def is_gain(self) -> bool:
        """Whether each channel is only multiplied by a number, and shifted."""
        return self.is_pointwise and self.is_depthwise

    @property
    def matrix(self) -> Expression:
        """``[in / groups · window, out]``: what the probe multiplies by."""
        return transpose(reshape(self.kernel, (self.out_features, -1)))

    def then(self, second: LinearMap) -> LinearMap | None:
        """This map and behind it ``second``, as one; None if that is not one map.

        A bias that zeros are put around is not the same at every position. Of two layers one must
        look at one position only: two windows in a row have more weights as one. If that is the
        first it may put zeros around ``x``, where its bias is then as well.
        """
        if second.is_padded and self.bias is not None:
            return None
        joined = self._joined(second)
        return None if joined is None else replace(joined, bias=self._bias_behind(second))

    def _joined(self, second: LinearMap) -> LinearMap | None:
        """What :meth:`then` gives, biases aside."""
        if second.is_gain:
            return replace(self, kernel=Times(self.kernel, _column(second.kernel, self.kernel)))
        if self.is_gain:
            gains = _inputs(reshape(self.kernel, (-1,)), second)
            return replace(second, kernel=Times(second.kernel, gains))
        if second.spread is not None:
            return None
        if self.has_one_position and second.is_depthwise:
            alone = reshape(self.kernel, (*self.kernel.shape[:2], *(1,) * len(second.window)))
            return self._widened(second, Times(alone, second.kernel))
        if self.groups != second.groups:
            return None
        if self.groups > 1:
            return self._joined_by_group(second)
        if second.is_pointwise:
            rows = reshape(self.kernel, (self.out_features, -1))
            mixed = product(reshape(second.kernel, (second.out_features, -1)), rows)
            kernel = reshape(mixed, (second.out_features, *self.kernel.shape[1:]))
            return replace(self, kernel=kernel)
        if self.has_one_position:
            order = (0, *range(2, len(second.kernel.shape)), 1)
            columns = transpose(second.kernel, order)
            rows = reshape(self.kernel, (-1, self.in_features))
            mixed = product(reshape(columns, (-1, second.in_features)), rows)
            shape = (second.out_features, *second.window, self.in_features)
            back = (0, len(shape) - 1, *range(1, len(shape) - 1))
            return self._widened(second, transpose(reshape(mixed, shape), back))
        return None

    def _widened(self, second: LinearMap, kernel: Expression) -> LinearMap:
        """``kernel`` with the window of ``second``, and the zeros that both put around ``x``."""
        before, behind = (
            tuple(map(sum, zip(own, others, strict=True)))
            for own, others in ((self.before, second.before), (self.behind, second.behind))
        )
        return replace(second, kernel=kernel, groups=self.groups, before=before, behind=behind)

    def _joined_by_group(self, second: LinearMap) -> LinearMap | None:
        """Layers that divide their channels alike: each part is a map by itself."""
        places = range(self.groups)
        joined = [self._part(place)._joined(second._part(place)) for place in places]
        parts = [part for part in joined if part is not None]
        if len(parts) < self.groups:
            return None
        kernel = Concatenate(*(part.kernel for part in parts), axis=0)
        return replace(parts[0], kernel=kernel, groups=self.groups)

    def _part(self, group: int) -> LinearMap:
        """What it makes of the channels of one group."""
        size = self.out_features // self.groups
        rows = slice(group * size, (group + 1) * size)
        return replace(self, kernel=take(self.kernel, rows, 0), groups=1)

    def _bias_behind(self, second: LinearMap) -> Expression | None:
        """What the own bias has become behind ``second``, and its bias."""
        if self.bias is None:
            return second.bias
        weighted = Times(second.kernel, _inputs(self.bias, second))
        rows = reshape(weighted, (second.out_features, -1))
        carried = reshape(product(rows, literal(np.ones((rows.shape[1], 1)))), (-1,))
        return carried if second.bias is None else Sum(carried, second.bias)

    def moved(self, axis: int) -> LinearMap:
        """The map of one position along another channel axis."""
        assert self.is_pointwise
        ones, zeros = (1,) * (-axis - 1), (0,) * (-axis - 1)
        kernel = reshape(self.kernel, (*self.kernel.shape[:2], *ones))
        return LinearMap(axis, kernel, self.groups, self.bias, ones, ones, zeros, zeros)

    def shifted(self, vector: Expression) -> LinearMap:
        """The map with ``vector``, ``[out]``, added to its result."""
        return replace(self, bias=vector if self.bias is None else Sum(self.bias, vector))

    def scaled(self, factor: float) -> LinearMap:
        """The map times a number."""
        bias = None if self.bias is None else scale(self.bias, factor)
        return replace(self, kernel=scale(self.kernel, factor), bias=bias)


def identity(axis: int, width: int) -> LinearMap:
    """The map that changes nothing."""
    return _gain(axis, literal(np.ones(width)))


def add(maps: Sequence[LinearMap]) -> LinearMap | None:
    """The sum of maps of one value, as one; None if their windows do not move alike.

    Windows of several dilations lie in one of the largest dilation that divides all of them.
    """
    if len(maps) == 1:
        return maps[0]
    first = next((each for each in maps if not each.is_pointwise), maps[0])
    axes = range(len(first.strides))
    if len({(each.in_features, each.out_features) for each in maps}) > 1:
        return None
    if any(each.spread is not None for each in maps):
        return None
    for axis in axes:
        sizes = {(each.strides[axis], _shrinks(each, axis)) for each in maps}
        if len(sizes) > 1:
            return None
    dilations = tuple(
        math.gcd(*(each.dilations[axis] for each in maps if each.window[axis] > 1)) or 1
        for axis in axes
    )
    offsets = {each: _offset(each, maps, dilations) for each in maps}
    if any(offset is None for offset in offsets.values()):
        return None
    before = tuple(max(each.before[axis] for each in maps) for axis in axes)
    behind = tuple(max(each.behind[axis] for each in maps) for axis in axes)
    groups = {each.groups for each in maps if not each.is_gain or each.in_features == 1}
    groups = groups or {first.in_features}
    divided = groups.pop() if len(groups) == 1 else 1
    window = tuple(
        (before[axis] + behind[axis] - _shrinks(first, axis) - 1) // dilations[axis] + 1
        for axis in axes
    )
    kernels = tuple(_placed(each, divided, window, dilations, offsets[each] or ()) for each in maps)
    biases = tuple(each.bias for each in maps if each.bias is not None)
    bias = None if not biases else biases[0] if len(biases) == 1 else Sum(*biases)
    kernel = kernels[0] if len(kernels) == 1 else Sum(*kernels)
    return LinearMap(first.axis, kernel, divided, bias, first.strides, dilations, before, behind)


def _shrinks(each: LinearMap, axis: int) -> int:
    """Zeros around ``x``, less what the window covers: what the size of ``y`` depends on."""
    covered = (each.window[axis] - 1) * each.dilations[axis]
    return each.before[axis] + each.behind[axis] - covered - 1


def _offset(
    each: LinearMap, maps: Sequence[LinearMap], dilations: Sequence[int]
) -> tuple[int, ...] | None:
    """Where the window of one map begins in the one that holds those of all ``maps``."""
    offset = []
    for axis, step in enumerate(dilations):
        zeros = max(other.before[axis] for other in maps) - each.before[axis]
        if zeros % step:
            return None
        offset.append(zeros // step)
    return tuple(offset)


def _placed(
    each: LinearMap,
    groups: int,
    window: Sequence[int],
    dilations: Sequence[int],
    offset: Sequence[int],
) -> Expression:
    """The kernel for another number of groups and a larger window."""
    outs, ins = each.kernel.shape[:2]
    dims = (outs, each.in_features // groups, *window)
    if dims == each.kernel.shape and groups == each.groups:
        return each.kernel
    rows, columns = np.arange(outs), np.arange(ins)
    channel = (rows // (outs // each.groups) * ins)[:, None] + columns  # of x, by output and input
    column = channel - (rows // (outs // groups) * dims[1])[:, None]
    ones = [1] * len(window)
    places = [rows.reshape(-1, 1, *ones), column.reshape(outs, ins, *ones)]
    for axis, (size, start) in enumerate(zip(each.window, offset, strict=True)):
        shape = [1] * len(dims)
        shape[2 + axis] = size
        step = each.dilations[axis] // dilations[axis]
        places.append((np.arange(size) * step + start).reshape(shape))
    positions = np.ravel_multi_index(np.broadcast_arrays(*places), dims)
    return Placed(each.kernel, literal(positions.reshape(-1)), shape=dims)


def _column(kernel: Expression, like: Expression) -> Expression:
    """The numbers of a gain, one for each output of another kernel."""
    return reshape(kernel, (kernel.shape[0], *[1] * (len(like.shape) - 1)))


def _inputs(vector: Expression, second: LinearMap) -> Expression:
    """``vector``, ``[in]``, for each input of a kernel: ``[out, in / groups, 1, ...]``."""
    outs, ins = second.kernel.shape[:2]
    ones = [1] * len(second.window)
    if second.groups == 1:
        return reshape(vector, (1, ins, *ones))
    channel: Indices = (np.arange(outs) // (outs // second.groups) * ins)[:, None] + np.arange(ins)
    return reshape(take(vector, channel.reshape(-1), 0), (outs, ins, *ones))


# --- What a node does ----------------------------------------------------------------------------


def as_map(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    """What ``node`` does to the channels along ``axis`` of what it reads, if it is linear.

    Returns:
        The value that it reads and the map; None if it is no linear map with constant weights.
    """
    if len(node.outputs) != 1 and operator(node) != "Dropout":
        return None
    match operator(node):
        case "Conv":
            return _conv(node, axis, shapes)
        case "ConvTranspose":
            return _conv_transpose(node, axis, shapes)
        case "AveragePool":
            return _average_pool(node, axis, shapes)
        case "BatchNormalization":
            return _batch_norm(node, axis, shapes)
        case "Mul" | "Div" | "Add" | "Sub":
            return _with_constant(node, axis, shapes)
        case "Identity":
            return _scaled(node, axis, 1.0, shapes)
        case "Neg":
            return _scaled(node, axis, -1.0, shapes)
        case "Resize":
            return _scaled(node, axis, 1.0, shapes) if _keeps_size(node, shapes) else None
    if axis != -1:
        return None
    return _product(node, axis, shapes) or _product_of_formula(node, axis, shapes)


def as_selection(value: ir.Value, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    """What a Split, Slice or Gather of channels makes ``value`` of: a map of zeros and ones.

    Returns:
        As :func:`as_map`.
    """
    node = value.producer()
    if node is None or operator(node) not in CUTS:
        return None
    x = node.inputs[0]
    width = None if x is None or constant(x) is not None else shapes.dim(x, axis)
    found = taken(node, axis, width, shapes) if isinstance(width, int) else []
    if x is None or not isinstance(width, int) or not found:
        return None
    columns = found[value.index() or 0]
    positions = np.arange(len(columns)) * width + columns
    ones, shape = literal(np.ones(len(columns))), (len(columns), width)
    kernel = Placed(ones, literal(positions), shape=shape)
    return x, LinearMap(-1, kernel, 1, None, (), (), (), ()).moved(axis)


def _scaled(
    node: ir.Node, axis: int, factor: float, shapes: Shapes
) -> tuple[ir.Value, LinearMap] | None:
    """All channels times one number."""
    x = node.inputs[0]
    width = None if x is None else shapes.dim(x, axis)
    if x is None or not isinstance(width, int) or -axis > (shapes.rank(x) or 0):
        return None
    return x, identity(axis, width).scaled(factor)


def _keeps_size(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a Resize to given sizes changes none of them: every sample is where it was."""
    x, sizes = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if x is None or sizes is None or mode == "tf_crop_and_resize":
        return False
    dims = shapes(x)
    return dims is not None and None not in dims and dims == shapes(node.outputs[0])


def _product(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    linear = as_linear(node, shapes)
    if linear is None or not linear.is_plain or linear.edge[0] is not node:
        return None
    if linear.identity_shape is not None or operator(node) == "Conv":
        return None
    bias = None
    if linear.bias is not None:
        held = constant(node.inputs[linear.bias[1]])
        bias = None if held is None else as_vector(held.wide(), -1, linear.out_features, 2)
        if held is None or bias is None:
            return None
        bias = None if _is_zero(held) else scale(bias, linear.beta)
    return linear.x, LinearMap(
        axis, transpose(linear.unpack(linear.weight.wide())), 1, bias, (), (), (), ()
    )


def _product_of_formula(
    node: ir.Node, axis: int, shapes: Shapes
) -> tuple[ir.Value, LinearMap] | None:
    """A product by a matrix that is computed from constants, as LoHa's and LoKr's are."""
    if operator(node) != "MatMul" or constant(node.inputs[1]) is not None:
        return None
    x, matrix = node.inputs[0], _numbers(node.inputs[1], shapes)
    if x is None or matrix is None or constant(x) is not None or len(matrix.shape) != 2:
        return None
    return x, LinearMap(axis, transpose(matrix), 1, None, (), (), (), ())


def _is_zero(held: Constant) -> bool:
    """Whether a bias adds nothing; exporters store one such for all layers of a width."""
    stored = held.values.stored
    return stored is not None and not np.any(stored)


def _conv(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    x, kernel = node.inputs[0], _numbers(node.inputs[1], shapes)
    if x is None or kernel is None or constant(x) is not None:
        return None
    if axis != 1 - len(kernel.shape) or 0 in kernel.shape:
        return None
    window = kernel.shape[2:]
    ones = (1,) * len(window)
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    pads = _pads(node, window, strides, dilations)
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        vector = constant(node.inputs[2])
        if vector is None:
            return None
        bias = None if _is_zero(vector) else vector.wide()
    if pads is None:
        return None
    groups = node.attributes.get_int("group", 1)
    before, behind = pads[: len(window)], pads[len(window) :]
    return x, LinearMap(axis, kernel, groups, bias, strides, dilations, before, behind)


def _conv_transpose(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    """A transposed convolution of which the size of the result follows from its padding."""
    found, held = _conv(node, axis, shapes), constant(node.inputs[1])
    is_plain = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    if found is None or held is None or not is_plain or "output_shape" in node.attributes:
        return None
    x, read = found
    spread = tuple(node.attributes.get_ints("output_padding", (0,) * len(read.window)))
    kernel = transposed(held.wide(), read.groups)
    return x, replace(read, kernel=kernel, spread=spread)


def transposed(kernel: Expression, groups: int) -> Expression:
    """``[in, out / groups, *window]``, of a transposed convolution, as of another one; and back."""
    ins, outs, *window = kernel.shape
    parts = reshape(kernel, (groups, ins // groups, outs, *window))
    swapped = transpose(parts, (0, 2, 1, *range(3, len(parts.shape))))
    return reshape(swapped, (groups * outs, ins // groups, *window))


def _average_pool(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    """Means of windows that are all of one size: zeros around ``x`` count, if there are any."""
    x, window = node.inputs[0], tuple(node.attributes.get_ints("kernel_shape", ()))
    width = None if x is None else shapes.dim(x, axis)
    if x is None or not isinstance(width, int) or axis != -1 - len(window):
        return None
    ones = (1,) * len(window)
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    pads = _pads(node, window, strides, dilations)
    is_even = pads is not None and (
        not any(pads) or node.attributes.get_int("count_include_pad", 0) == 1
    )
    if pads is None or not is_even or node.attributes.get_int("ceil_mode", 0) != 0:
        return None
    kernel = broadcast(literal(np.full((1, *window), 1 / math.prod(window))), (width, 1, *window))
    before, behind = pads[: len(window)], pads[len(window) :]
    return x, LinearMap(axis, kernel, width, None, strides, dilations, before, behind)


def _pads(
    node: ir.Node, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[int, ...] | None:
    """Zeros in front of each axis, then behind each; None if they depend on its size."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    zeros = (0,) * (2 * len(window))
    if mode == "NOTSET":
        pads = tuple(node.attributes.get_ints("pads", zeros))
        return pads if min(pads, default=0) >= 0 else None
    if mode == "VALID":
        return zeros
    if any(step != 1 for step in strides):
        return None
    total = [(size - 1) * step for size, step in zip(window, dilations, strict=True)]
    small, large = [size // 2 for size in total], [size - size // 2 for size in total]
    return (*small, *large) if mode == "SAME_UPPER" else (*large, *small)


def _batch_norm(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    """``(x - mean) / sqrt(var + epsilon) · scale + bias`` with the statistics of inference."""
    x, *rest = node.inputs
    held = [constant(value) for value in rest]
    rank = None if x is None else shapes.rank(x)
    if x is None or rank is None or axis != 1 - rank or constant(x) is not None:
        return None
    if len(held) != 4 or node.attributes.get_int("training_mode", 0) != 0:
        return None
    opsets = {} if node.graph is None else node.graph.opset_imports
    if opsets.get("", 7) < 7:  # where it may train unless it is told not to
        return None
    factors: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
    for each in held:
        if each is None or each.dtype not in FLOATS:
            return None
        factors.append(evaluate(each.wide()))
    gain, shift, mean, variance = factors
    with np.errstate(all="ignore"):
        gain = gain / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    if not np.isfinite(gain).all():
        return None
    return x, replace(_gain(axis, literal(gain)), bias=literal(shift - mean * gain))


def _with_constant(node: ir.Node, axis: int, shapes: Shapes) -> tuple[ir.Value, LinearMap] | None:
    """A gain or a number that multiplies, a vector or a number that is added."""
    name = operator(node)
    for index in (1, 0) if name != "Div" else (1,):
        x, numbers = node.inputs[1 - index], _numbers(node.inputs[index], shapes)
        if x is None or numbers is None or constant(x) is not None:
            continue
        width, rank = shapes.dim(x, axis), shapes.rank(x)
        if rank is None or -axis > rank or not isinstance(width, int):
            return None
        vector = as_vector(numbers, axis, width, rank)
        if vector is None:
            return None
        if name in ("Add", "Sub"):
            sign = -1.0 if name == "Sub" and index == 0 else 1.0
            if (held := constant(node.inputs[index])) is not None and _is_zero(held):
                return x, identity(axis, width).scaled(sign)
            bias = scale(vector, -1.0 if name == "Sub" and index == 1 else 1.0)
            return x, replace(identity(axis, width).scaled(sign), bias=bias)
        if name == "Div":
            with np.errstate(all="ignore"):
                inverse = 1.0 / evaluate(vector)
            if not np.isfinite(inverse).all():
                return None
            vector = literal(inverse)
        return x, _gain(axis, vector)
    return None


def _numbers(value: ir.Value | None, shapes: Shapes) -> Expression | None:
    """What is the same in every run, float64: a constant, or what is computed from constants."""
    held = constant(value)
    if held is not None:
        return held.wide() if held.dtype in FLOATS else None
    found = None if value is None else fixed(value, shapes)
    return None if found is None else literal(found)


def as_vector(numbers: Expression, axis: int, width: int, rank: int) -> Expression | None:
    """``[width]``: one number a channel, if ``numbers`` are the same at every position."""
    dims, size = numbers.shape, math.prod(numbers.shape)
    if len(dims) > rank or any(size != 1 for i, size in enumerate(dims) if i - len(dims) != axis):
        return None
    return broadcast(reshape(numbers, (size,)), (width,)) if size in (1, width) else None


def _gain(axis: int, vector: Expression) -> LinearMap:
    """Each channel times its number."""
    width = math.prod(vector.shape)
    alone = LinearMap(-1, reshape(vector, (width, 1)), width, None, (), (), (), ())
    return alone.moved(axis)
