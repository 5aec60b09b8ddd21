"""Operators between the layers of :mod:`traps`: those that carry a stream, and their twins."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from traps import WIDTH, Graph, Value, broadcast


def inside(g: Graph, v: Value) -> Value | None:
    """An operator on ``v``, or None if the one that was drawn does not fit."""
    return g.choose(*INSIDE)(g, v)


def unary(g: Graph, v: Value) -> Value:
    op = g.choose("Neg", "Identity", "Dropout", "Neg", "Identity")
    return g.add(op, [v.name], v.dims)


def nonlinear(g: Graph, v: Value) -> Value:
    return g.add(g.choose("Abs", "Relu", "Abs"), [v.name], v.dims)


def operand(g: Graph, v: Value) -> tuple[str, tuple]:
    """Something of any rank that broadcasts with ``v``; a constant."""
    sizes = [size if isinstance(size, int) and g.chance(0.7) else 1 for size in v.dims]
    if v.rank and g.chance(0.5):
        sizes = [1] * (v.rank - 1) + sizes[-1:]
    keep = int(g.rng.integers(0, v.rank + 1))
    shape = tuple(sizes[v.rank - keep :])
    if g.chance(0.15):
        shape = (1,) * int(g.rng.integers(1, 3)) + tuple(sizes)
    elif g.chance(0.4) and isinstance(v.width, int):
        shape = (v.width,)
    return g.weight(*shape), shape


def bias(g: Graph, v: Value) -> Value:
    name, shape = operand(g, v)
    op = g.choose("Add", "Add", "Add", "Sub", "Sum")
    operands = [v.name, name] if g.chance() else [name, v.name]
    return g.add(op, operands, broadcast(v.dims, shape))


def gain(g: Graph, v: Value) -> Value:
    """By scalar, by channel or by position; now and then nothing but zeros."""
    _, shape = operand(g, v)
    zero = g.chance(0.15)
    array = np.zeros(shape) if zero else g.rng.choice([1.0, -1.0, 2.0, 0.5], shape)
    name = g.constant(np.asarray(array, g.dtype))
    dims = broadcast(v.dims, shape)
    if not zero and g.chance(0.3):
        return g.add("Div", [v.name, name], dims)
    return g.add("Mul", [v.name, name] if g.chance() else [name, v.name], dims)


def total(g: Graph, v: Value) -> Value | None:
    """A sum with another value; they may broadcast."""
    other = g.value(lambda u: u.rank > 0 and _fits(u, v))
    if other is None:
        return None
    operands = [v.name, other.name] if g.chance() else [other.name, v.name]
    return g.add(g.choose("Add", "Sub", "Sum"), operands, broadcast(v.dims, other.dims))


def _fits(u: Value, v: Value) -> bool:
    pairs = zip(reversed(u.dims), reversed(v.dims), strict=False)
    return all(not isinstance(a, int) or not isinstance(b, int) or a == b or 1 in (a, b)
               for a, b in pairs)  # fmt: skip


def double(g: Graph, v: Value) -> Value:
    for _ in range(g.choose(1, 2, 3)):
        v = g.add("Add", [v.name, v.name], v.dims)
    return v


def dead_skip(g: Graph, v: Value) -> Value | None:
    """A skip times zero: by scalar, by channel, twice over, of the value itself."""
    other = v if g.chance(0.3) else g.value(lambda u: u.rank > 0 and _fits(u, v))
    if other is None:
        return None
    for _ in range(g.choose(1, 1, 2)):
        shape = g.choose((), (1,), (1, 1), (other.width if isinstance(other.width, int) else 1,))
        zero = g.constant(np.zeros(shape, g.dtype))
        operands = [other.name, zero] if g.chance() else [zero, other.name]
        other = g.add("Mul", operands, broadcast(other.dims, shape))
    operands = [v.name, other.name] if g.chance() else [other.name, v.name]
    return g.add("Add", operands, broadcast(v.dims, other.dims))


def centring(g: Graph, v: Value) -> Value | None:
    if v.rank == 0 or not isinstance(v.width, int):
        return None
    axis = g.choose(-1, -1, -1, v.rank - 1, 0)
    keep = 1 if axis != -1 else g.choose(1, 1, 1, 0)
    mean = reduced(g, v, axis, keep, "ReduceMean")
    if keep == 0 and v.rank > 1:
        mean = g.add("Unsqueeze", [mean.name, g.ints(-1)], (*mean.dims, 1))
    return g.add("Sub", [v.name, mean.name], broadcast(v.dims, mean.dims))


def reduced(g: Graph, v: Value, axis: int, keep: int, op: str) -> Value:
    at = axis % v.rank
    dims = tuple(1 if i == at else d for i, d in enumerate(v.dims) if keep or i != at)
    if g.opset < 18 and op == "ReduceMean":
        return g.add(op, [v.name], dims, axes=[axis], keepdims=keep)
    return g.add(op, [v.name, g.ints(axis)], dims, keepdims=keep)


def reduce(g: Graph, v: Value) -> Value | None:
    if v.rank < 2:
        return None
    axis = int(g.rng.integers(-v.rank, v.rank))
    return reduced(g, v, axis, int(g.chance()), g.choose("ReduceMean", "ReduceSum"))


def where(g: Graph, v: Value) -> Value | None:
    other = g.value(lambda u: u.dims == v.dims) if g.chance() else None
    name = operand(g, v)[0] if other is None else other.name
    shape = g.choose((1,), (), (1, 1), (v.width if isinstance(v.width, int) else 1,))
    condition = g.hold(g.rng.random(shape) < 0.5)
    return g.add("Where", [condition, v.name, name], broadcast(v.dims, shape))


def transpose(g: Graph, v: Value) -> Value | None:
    if v.rank < 2:
        return None
    order = g.rng.permutation(v.rank).tolist()
    if g.chance(0.2):
        return g.add("Transpose", [v.name], v.dims[::-1])
    return g.add("Transpose", [v.name], tuple(v.dims[i] for i in order), perm=order)


def reshape(g: Graph, v: Value) -> Value | None:
    """Cut the channels, merge axes, flatten, or put a 1 anywhere."""
    if v.rank < 2 or not isinstance(v.width, int):
        return None
    kept = [0] * (v.rank - 1)
    kind = g.choose("same", "flat", "cut", "one", "Flatten", "front")
    if kind == "Flatten":
        axis = g.choose(v.rank - 1, -1, 1)
        inner = v.width if axis % v.rank == v.rank - 1 else None
        return g.add("Flatten", [v.name], (None, inner), axis=axis)
    if kind == "cut" and v.width % 2 == 0:
        target, dims = [*kept, v.width // 2, 2], (*v.dims[:-1], v.width // 2, 2)
    elif kind == "one":
        target, dims = [*kept, 1, v.width], (*v.dims[:-1], 1, v.width)
    elif kind == "flat":
        target, dims = [-1, v.width], (None, v.width)
    elif kind == "front":
        target, dims = [1, -1, v.width], (1, None, v.width)
    else:
        target, dims = [*kept, g.choose(v.width, -1, 0)], v.dims
    return g.add("Reshape", [v.name, g.ints(*target)], dims)


def measured(g: Graph, v: Value) -> Value | None:
    """The shape of a value, part of it perhaps, used to reshape or to expand."""
    if v.rank < 1:
        return None
    sizes = g.add("Shape", [v.name], (v.rank,))
    if g.chance(0.3) and isinstance(v.width, int):
        lead = g.add("Slice", [sizes.name, g.ints(0), g.ints(-1), g.ints(0)], (v.rank - 1,))
        sizes = g.add("Concat", [lead.name, g.ints(v.width)], (v.rank,), axis=0)
    other = g.value(lambda u: u.dims == v.dims) or v
    return g.add(g.choose("Reshape", "Expand"), [other.name, sizes.name], v.dims)


def axes(g: Graph, v: Value) -> Value | None:
    ones = [axis for axis, size in enumerate(v.dims) if size == 1]
    if ones and v.rank > 1 and g.chance():
        at = g.choose(*ones)
        dims = (*v.dims[:at], *v.dims[at + 1 :])
        return g.add("Squeeze", [v.name, g.ints(at)], dims)
    if v.rank > 3:
        return None
    at = int(g.rng.integers(0, v.rank + 1))
    return g.add("Unsqueeze", [v.name, g.ints(at)], (*v.dims[:at], 1, *v.dims[at:]))


def repeat(g: Graph, v: Value) -> Value | None:
    if not v.rank:
        return None
    axis = int(g.rng.integers(0, v.rank))
    size = v.dims[axis]
    if size == 1 and g.chance():
        dims = (*v.dims[:axis], 2, *v.dims[axis + 1 :])
        target = [2 if i == axis else 1 for i in range(v.rank)]
        if g.chance(0.3):
            target, dims = [2, *target], (2, *dims)
        return g.add("Expand", [v.name, g.ints(*target)], dims)
    times = [2 if i == axis else 1 for i in range(v.rank)]
    dims = (*v.dims[:axis], 2 * size if isinstance(size, int) else None, *v.dims[axis + 1 :])
    return g.add("Tile", [v.name, g.ints(*times)], dims)


def part(g: Graph, v: Value) -> Value | None:
    axes = [axis for axis, size in enumerate(v.dims) if isinstance(size, int) and size > 1]
    if not axes:
        return None
    axis = g.choose(*axes)
    size = v.dims[axis]
    at = int(g.rng.integers(1, size))

    def resized(new: int) -> tuple:
        return (*v.dims[:axis], new, *v.dims[axis + 1 :])

    match g.choose("Slice", "back", "Split", "Gather", "one"):
        case "Slice":
            bounds = [g.ints(at), g.ints(size), g.ints(axis - v.rank)]
            return g.add("Slice", [v.name, *bounds], resized(size - at))
        case "back":
            bounds = [g.ints(-1), g.ints(-size - 1), g.ints(axis), g.ints(-1)]
            return g.add("Slice", [v.name, *bounds], resized(size))
        case "Split":
            sizes = resized(at), resized(size - at)
            parts = g.add("Split", [v.name, g.ints(at, size - at)], *sizes, axis=axis)
            g.values.append(parts[0])
            return parts[1]
        case "Gather":
            order = g.rng.permutation(size).tolist()
            return g.add("Gather", [v.name, g.ints(*order)], v.dims, axis=axis)
        case _:
            dims = (*v.dims[:axis], *v.dims[axis + 1 :])
            index = g.hold(np.array(at, np.int64))
            return g.add("Gather", [v.name, index], dims, axis=axis) if dims else None


def rows(g: Graph, v: Value) -> Value | None:
    """A position or two of a leading axis; the first exists at every size."""
    if v.rank < 2:
        return None
    axis = int(g.rng.integers(0, v.rank - 1))
    match g.choose("one", "two", "slice", "pad"):
        case "one":
            index = g.hold(np.array(0, np.int64))
            dims = (*v.dims[:axis], *v.dims[axis + 1 :])
            return g.add("Gather", [v.name, index], dims, axis=axis)
        case "two":
            dims = (*v.dims[:axis], 2, *v.dims[axis + 1 :])
            return g.add("Gather", [v.name, g.ints(0, -1)], dims, axis=axis)
        case "slice":
            dims = (*v.dims[:axis], 1, *v.dims[axis + 1 :])
            return g.add("Slice", [v.name, g.ints(0), g.ints(1), g.ints(axis)], dims)
        case _:
            pads = [0] * (2 * v.rank)
            pads[axis] = 1
            size = v.dims[axis]
            grown = size + 1 if isinstance(size, int) else None
            fill = [g.hold(np.array(g.choose(0.0, 1.0), g.dtype))] if g.chance() else []
            dims = (*v.dims[:axis], grown, *v.dims[axis + 1 :])
            return g.add("Pad", [v.name, g.ints(*pads), *fill], dims)


def join(g: Graph, v: Value) -> Value | None:
    """A Concat with another value or with a constant, along any axis."""
    if not v.rank:
        return None
    axis = int(g.rng.integers(0, v.rank))
    other = g.value(lambda u: u.dims == v.dims)
    known = all(isinstance(size, int) for i, size in enumerate(v.dims) if i != axis)
    size = v.dims[axis]
    if known and g.chance():
        shape = tuple(1 if i == axis else d for i, d in enumerate(v.dims))
        name, grown = g.weight(*shape), size + 1 if isinstance(size, int) else None
    else:
        name = (other or v).name
        grown = 2 * size if isinstance(size, int) else None
    dims = (*v.dims[:axis], grown, *v.dims[axis + 1 :])
    operands = [v.name, name] if g.chance() else [name, v.name]
    return g.add("Concat", operands, dims, axis=g.choose(axis, axis - v.rank))


def heads(g: Graph, v: Value) -> Value | None:
    """A projection that is cut into Q, K and V, which meet in an attention core."""
    if v.rank != 3 or not isinstance(v.width, int):
        return None
    b, s, _ = v.dims
    if g.chance():
        size = g.choose(WIDTH, WIDTH, 8)
        q, k, u = (_projected(g, v, size) for _ in range(3))
    else:
        size = WIDTH
        fused = _projected(g, v, 3 * size)
        parts = g.ints(size, size, size)
        q, k, u = g.add("Split", [fused.name, parts], *((b, s, size),) * 3, axis=-1)

    def split(x: Value) -> Value:
        cut = g.add("Reshape", [x.name, g.ints(0, 0, size // 2, 2)], (b, s, size // 2, 2))
        return g.add("Transpose", [cut.name], (b, size // 2, s, 2), perm=[0, 2, 1, 3])

    q, k, u = split(q), split(k), split(u)
    turned = g.add("Transpose", [k.name], (b, size // 2, 2, s), perm=[0, 1, 3, 2])
    scores = g.add("MatMul", [q.name, turned.name], (b, size // 2, s, s))
    small = g.hold(np.array(0.01, g.dtype))
    scores = g.add("Mul", [scores.name, small], scores.dims)
    probs = g.add("Softmax", [scores.name], scores.dims, axis=-1)
    context = g.add("MatMul", [probs.name, u.name], (b, size // 2, s, 2))
    back = g.add("Transpose", [context.name], (b, s, size // 2, 2), perm=[0, 2, 1, 3])
    return g.add("Reshape", [back.name, g.ints(0, 0, size)], (b, s, size))


def _projected(g: Graph, v: Value, size: int) -> Value:
    y = g.add("MatMul", [v.name, g.weight(v.width, size)], (*v.dims[:-1], size))
    return bias(g, y) if g.chance(0.2) else y


def cast(g: Graph, v: Value) -> Value | None:
    """To float64 and back."""
    if g.dtype != np.float32:
        return None
    there = g.add("Cast", [v.name], v.dims, to=TensorProto.DOUBLE)
    return g.add("Cast", [there.name], v.dims, to=TensorProto.FLOAT)


INSIDE = (
    *(bias, bias, bias, bias, gain, gain, gain, total, total, total, double),
    *(dead_skip, dead_skip, centring, reduce, where, transpose, transpose, reshape, reshape),
    *(measured, axes, axes, repeat, part, part, rows, rows, join, cast, unary, unary),
)
