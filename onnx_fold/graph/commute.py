"""Operators that commute with a change of basis of the channel axis: they lie inside a stream.

Each rule takes a node, one port of it that is known to carry the channel axis, and answers which
other ports then carry it, and at which axis. Axes count from the end. An operator without a rule,
or a rule that answers None, opens the stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_fold.graph.constants import FLOATS, axes_of, constant, scalar
from onnx_fold.graph.operators import operator
from onnx_fold.graph.shapes import Dims, Shapes


@dataclass(frozen=True)
class Port:
    """An input or output of a node that carries the channel axis."""

    is_output: bool
    index: int
    axis: int


class OpensStreamError(Exception):
    """A node looks at the channels; the message completes "the stream is open because x ..."."""


Rule = Callable[[ir.Node, Port, int, Shapes], "list[Port] | None"]


def _through(axis: int) -> list[Port]:
    return [Port(False, 0, axis), Port(True, 0, axis)]


def same(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Identity, Neg: the output has the channels where the input has them."""
    return _through(known.axis) if known.index == 0 else None


def cast(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Cast between types of floats."""
    floats = shapes.dtype(_input(node)) in FLOATS
    target = ir.DataType(node.attributes.get_int("to", 0))
    return _through(known.axis) if floats and target in FLOATS else None


def cast_like(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """CastLike: the second input is read for its type alone."""
    if not known.is_output and known.index == 1:
        return [known]
    floats = shapes.dtype(_input(node)) in FLOATS and shapes.dtype(node.outputs[0]) in FLOATS
    return _through(known.axis) if floats else None


def dropout(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Dropout at inference, whose mask is not used."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    masked = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if known.index != 0 or masked or (training is not None and scalar(training) != 0.0):
        return None
    return _through(known.axis)


def add(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Add, Sub, Sum: every operand is in the stream; a constant may broadcast along channels."""
    found = [Port(True, 0, known.axis)]
    for index, value in enumerate(node.inputs):
        assert value is not None
        if not _fits(value, known.axis, width, shapes):
            raise OpensStreamError(
                f"adds '{value.name}', which has no channel axis of width {width}"
            )
        found.append(Port(False, index, known.axis))
    return found


def _fits(value: ir.Value, axis: int, width: int, shapes: Shapes) -> bool:
    """Whether ``value`` has all the channels, or is a constant that broadcasts to them."""
    size = shapes.dim(value, axis)
    return size == width or (size == 1 and constant(value) is not None)


def scale(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Mul, Div by something that is the same for all channels."""
    sizes = [shapes.dim(value, known.axis) for value in node.inputs if value is not None]
    if operator(node) == "Div" or not known.is_output:
        operand = 0 if known.is_output else known.index
    else:
        operand = 0 if sizes[0] == width else 1
    if operator(node) == "Div" and operand != 0:
        return None
    if width == 1 and scalar(node.inputs[1 - operand]) is None:
        return None  # one channel: the factor may be a value of the stream too
    if sizes[operand] != width or sizes[1 - operand] != 1:
        gain = node.inputs[1 - operand]
        if gain is not None and constant(gain) is not None:
            raise OpensStreamError("has a gain of its own for each channel")
        return None
    return [Port(False, operand, known.axis), Port(True, 0, known.axis)]


def where(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Where with a condition that is the same for all channels; both branches are in the stream."""
    condition, *branches = node.inputs
    if condition is None or shapes.dim(condition, known.axis) != 1:
        return None
    if not known.is_output and known.index == 0:
        return None
    for value in branches:
        assert value is not None
        if not _fits(value, known.axis, width, shapes):
            return None
    return [Port(True, 0, known.axis), Port(False, 1, known.axis), Port(False, 2, known.axis)]


def transpose(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Transpose: the axis goes where the permutation says."""
    rank = shapes.rank(node.outputs[0]) or shapes.rank(_input(node))
    perm = node.attributes.get_ints("perm") or (rank and tuple(reversed(range(rank))))
    if not perm:
        return None
    rank = len(perm)
    if known.is_output:
        return [known, Port(False, 0, perm[known.axis + rank] - rank)]
    return [known, Port(True, 0, perm.index(known.axis + rank) - rank)]


def reshape(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the channel axis must survive whole.

    In row-major order it does if an axis of the same size has as many elements behind it, or (the
    total being the same) as many in front of it.
    """
    if known.index != 0:
        return None
    here, there = _input(node), node.outputs[0]
    if known.is_output:
        here, there = there, here
    dims, target = shapes(here), shapes(there)
    if dims is None or target is None:
        return None
    at = known.axis + len(dims)
    for axis, size in enumerate(target):
        if size == width and (
            _same_count(dims[at + 1 :], target[axis + 1 :]) or _same_count(dims[:at], target[:axis])
        ):
            return [known, Port(not known.is_output, 0, axis - len(target))]
    raise OpensStreamError("does not keep the channel axis whole")


def _same_count(a: Dims, b: Dims) -> bool:
    def factors(dims: Dims) -> tuple[int, Counter[object]]:
        number, symbols = 1, Counter[object]()
        for dim in dims:
            if isinstance(dim, int):
                number *= dim
            else:
                symbols[dim if dim is not None else object()] += 1
        return number, symbols

    return factors(a) == factors(b)


def expand(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Expand, Tile: along other axes."""
    sizes = (shapes.dim(_input(node), known.axis), shapes.dim(node.outputs[0], known.axis))
    return _through(known.axis) if known.index == 0 and sizes == (width, width) else None


def cut(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Slice of other axes."""
    axes = shapes.integers(node.inputs[3]) if len(node.inputs) > 3 else None
    rank = shapes.rank(_input(node))
    if known.index != 0 or axes is None or rank is None:
        return None
    if known.axis in _from_end(axes, rank):
        raise OpensStreamError("takes a part of the channels")
    return _through(known.axis)


def split(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Split of another axis."""
    rank = shapes.rank(_input(node))
    if rank is None or (not known.is_output and known.index != 0):
        return None
    if known.axis in _from_end([node.attributes.get_int("axis", 0)], rank):
        raise OpensStreamError("splits the channels")
    outputs = [Port(True, index, known.axis) for index in range(len(node.outputs))]
    return [Port(False, 0, known.axis), *outputs]


def gather(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Gather along another axis; an embedding table is the constant that it reads."""
    data, indices = _input(node), node.inputs[1]
    rank = shapes.rank(data)
    index_rank = shapes.rank(indices) if indices is not None else None
    if rank is None or index_rank is None or known.index != 0:
        return None
    axis = _from_end([node.attributes.get_int("axis", 0)], rank)[0]
    shift = index_rank - 1  # how much longer the output is, in the place of `axis`
    inner = known.axis if not known.is_output or known.axis > axis else known.axis + shift
    if inner == axis:
        raise OpensStreamError("gathers channels")
    outer = inner if inner > axis else inner - shift
    if known.is_output and outer != known.axis:
        return None
    return [Port(False, 0, inner), Port(True, 0, outer)]


def gather_nd(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """GatherND of whole vectors: the channels lie behind the axes that the indices count."""
    data, indices = _input(node), node.inputs[1]
    rank = shapes.rank(data)
    depth = shapes.dim(indices, -1) if indices is not None else None
    if rank is None or not isinstance(depth, int) or known.index != 0:
        return None
    if -known.axis > rank - depth - node.attributes.get_int("batch_dims", 0):
        raise OpensStreamError("gathers channels")
    return _through(known.axis)


def concat(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Concat along another axis."""
    rank = shapes.rank(node.outputs[0])
    if rank is None:
        return None
    if known.axis in _from_end([node.attributes.get_int("axis", 0)], rank):
        raise OpensStreamError("joins channels")
    return [
        Port(True, 0, known.axis),
        *(Port(False, index, known.axis) for index in range(len(node.inputs))),
    ]


def pad(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Pad with zeros along other axes."""
    pads = shapes.integers(node.inputs[1]) if len(node.inputs) > 1 else None
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    rank = shapes.rank(_input(node))
    zero = fill is None or scalar(fill) == 0.0
    constant_mode = node.attributes.get_string("mode", "constant") == "constant"
    if pads is None or rank is None or not zero or not constant_mode or known.index != 0:
        return None
    axes: Sequence[int] | None = range(rank)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = shapes.integers(node.inputs[3])
    if axes is None or len(pads) != 2 * len(axes):
        return None
    count = len(axes)
    padded = [axis for i, axis in enumerate(axes) if pads[i] or pads[i + count]]
    if known.axis in _from_end(padded, rank):
        raise OpensStreamError("pads the channels")
    return _through(known.axis)


def reduce(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """ReduceSum, ReduceMean over other axes."""
    rank = shapes.rank(_input(node))
    axes = axes_of(node, shapes.integers)
    if rank is None or not axes or known.index != 0:
        return None
    reduced = _from_end(axes, rank)
    if node.attributes.get_int("keepdims", 1):
        if known.axis in reduced:
            raise OpensStreamError("reduces over the channels")
        return _through(known.axis)
    kept = [axis for axis in range(-rank, 0) if axis not in reduced]
    if known.is_output:
        return [known, Port(False, 0, kept[known.axis])]
    if known.axis in reduced:
        raise OpensStreamError("reduces over the channels")
    return [known, Port(True, 0, kept.index(known.axis) - len(kept))]


def depthwise(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Conv of each channel by itself, for changes that only reorder them: weights and bias too."""
    x, kernel, *bias = node.inputs
    dims = None if kernel is None else shapes(kernel)
    is_alone = dims is not None and dims[:2] == (width, 1)
    if x is None or dims is None or not is_alone or known.index != 0:
        return None
    if node.attributes.get_int("group", 1) != width or known.axis != 1 - len(dims):
        return None
    found = [*_through(known.axis), Port(False, 1, -len(dims))]
    return [*found, Port(False, 2, -1)] if bias and bias[0] is not None else found


def pool(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """AveragePool, GlobalAveragePool: means along the axes behind the channels, axis 1."""
    rank = shapes.rank(_input(node))
    if rank is None or known.index != 0 or known.axis != 1 - rank:
        return None
    return _through(known.axis)


def resize(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Resize of other axes, without zeros from outside."""
    if known.index != 0 or node.attributes.get_string("coordinate_transformation_mode", "") == (
        "tf_crop_and_resize"
    ):
        return None
    sizes = (shapes.dim(_input(node), known.axis), shapes.dim(node.outputs[0], known.axis))
    return _through(known.axis) if sizes == (width, width) else None


def elementwise(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """Every operand that has all the channels, for changes that only reorder them."""
    found = [Port(True, 0, known.axis)]
    for index, value in enumerate(node.inputs):
        size = 1 if value is None else shapes.dim(value, known.axis)
        if size == width:
            found.append(Port(False, index, known.axis))
        elif size != 1:
            return None
    return found if known in found else None


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _from_end(axes: Sequence[int], rank: int) -> list[int]:
    return [axis if axis < 0 else axis - rank for axis in axes]
