"""Linear layers for :mod:`traps`: every form that has a constant on one side."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from traps import WIDTH, Graph, Value, broadcast


def layer(g: Graph, v: Value) -> Value | None:
    """A linear layer that reads ``v``, or None if the one that was drawn does not fit."""
    return g.choose(*LAYERS)(g, v)


def _out(g: Graph) -> int:
    return g.choose(WIDTH, WIDTH, WIDTH, 8, 8, 6, 3, 1)


def matmul(g: Graph, v: Value) -> Value | None:
    """The weight on the right, with leading axes now and then."""
    if v.rank < 2 or not isinstance(v.width, int):
        return None
    width = _out(g)
    lead = g.choose((), (), (), (), (1,), (1, 1), (2,), (2, 1))
    name = g.weight(*lead, v.width, width)
    dims = broadcast(v.dims[:-2], lead) if lead and v.rank > 2 else lead or v.dims[:-2]
    return g.add("MatMul", [v.name, name], (*dims, v.dims[-2], width))


def vector(g: Graph, v: Value) -> Value | None:
    """A weight without an axis of outputs, or a value without rows."""
    if not isinstance(v.width, int):
        return None
    if v.rank > 1 and g.chance():
        return g.add("MatMul", [v.name, g.weight(v.width)], v.dims[:-1])
    return g.add("MatMul", [v.name, g.weight(v.width, 5)], (*v.dims[:-1], 5))


def left_matmul(g: Graph, v: Value) -> Value | None:
    """The weight on the left; the channels are the last axis but one, or are brought there."""
    if v.rank < 2:
        return None
    if not isinstance(v.dims[-2], int):
        if v.rank > 3 or not isinstance(v.width, int):
            return None
        order = [*range(v.rank - 2), v.rank - 1, v.rank - 2]
        v = g.add("Transpose", [v.name], tuple(v.dims[i] for i in order), perm=order)
    width = _out(g)
    lead = g.choose((), (), (1,), (2,), (2, 1))
    name = g.weight(*lead, width, v.dims[-2])
    dims = broadcast(v.dims[:-2], lead) if lead and v.rank > 2 else lead or v.dims[:-2]
    return g.add("MatMul", [name, v.name], (*dims, width, v.dims[-1]))


def gemm(g: Graph, v: Value) -> Value | None:
    if v.rank != 2 or not isinstance(v.width, int):
        v = _flat(g, v)
        if v is None:
            return None
    turn, width = int(g.chance()), _out(g)
    attributes = {"transB": turn} if turn or g.chance(0.3) else {}
    if g.chance(0.4):
        attributes |= {"alpha": g.choose(0.5, -1.0, 2.0), "beta": g.choose(1.0, 3.0, -0.5, 0.0)}
    operands = [v.name, g.weight(*((width, v.width) if turn else (v.width, width)))]
    rows = v.dims[0]
    shapes = [None, None, (width,), (width,), (1, width), (1,), (), "computed", "value"]
    shape = g.choose(*shapes, *([(rows, width), (rows, 1)] if isinstance(rows, int) else []))
    if shape == "computed":
        operands.append(_computed(g, g.choose((), (1,), (width,), (1, width))))
    elif shape == "value":
        other = g.value(lambda u: u.dims in ((v.dims[0], width), (width,)))
        operands += [other.name] if other is not None else []
    elif shape is not None:
        operands.append(g.weight(*shape))
    return g.add("Gemm", operands, (rows, width), **attributes)


def _flat(g: Graph, v: Value) -> Value | None:
    if v.rank < 2 or not isinstance(v.width, int):
        return None
    return g.add("Reshape", [v.name, g.ints(-1, v.width)], (None, v.width))


def _computed(g: Graph, shape: tuple[int, ...]) -> str:
    """A constant that is computed in a way that is not seen through."""
    name = g.weight(*shape)
    return g.add(g.choose("Abs", "Neg"), [name], shape).name


def gemm_left(g: Graph, v: Value) -> Value | None:
    """The weight as A."""
    if v.rank != 2 or not isinstance(v.dims[0], int):
        return None
    width = _out(g)
    return g.add("Gemm", [g.weight(width, v.dims[0]), v.name], (width, v.dims[1]))


def einsum(g: Graph, v: Value) -> Value | None:
    if v.rank != 3 or not isinstance(v.width, int):
        return None
    width = _out(g)
    b, s, d = v.dims
    equation, shape, dims = g.choose(
        ("bsd,df->bsf", (d, width), (b, s, width)),
        ("bsd,fd->bsf", (width, d), (b, s, width)),
        ("bsd,df->bfs", (d, width), (b, width, s)),
        ("bsd,dhk->bshk", (d, 2, 3), (b, s, 2, 3)),
        ("bsd,edf->besf", (2, d, width), (b, 2, s, width)),
        ("...d,df->...f", (d, width), (b, s, width)),
        ("bsd,df->sbf", (d, width), (s, b, width)),
    )
    operands = [v.name, g.weight(*shape)]
    if g.chance(0.3):
        terms, result = equation.split("->")
        equation, operands = f"{','.join(terms.split(',')[::-1])}->{result}", operands[::-1]
    return g.add("Einsum", operands, dims, equation=equation)


def conv(g: Graph, v: Value) -> Value | None:
    """Channels in the second axis: as they are, or brought there."""
    if g.dtype != np.float32 or v.rank not in (3, 4):
        return None
    if not isinstance(v.dims[1], int):
        if not isinstance(v.width, int):
            return None
        order = [0, v.rank - 1, *range(1, v.rank - 1)]
        v = g.add("Transpose", [v.name], tuple(v.dims[i] for i in order), perm=order)
    spatial, channels = v.rank - 2, v.dims[1]
    size = g.choose(1, 1, 1, 1, 2, 3)
    attributes = {}
    if g.chance(0.35):
        pads = g.choose(1, 2)
        attributes["pads"] = [pads] * spatial + [g.choose(pads, 0)] * spatial
    elif g.chance(0.2):
        attributes["auto_pad"] = g.choose("SAME_UPPER", "SAME_LOWER", "VALID")
    if g.chance(0.2):
        attributes["strides"] = [2] * spatial
    if g.chance(0.1) and size > 1:
        attributes["dilations"] = [2] * spatial
    width, group = _out(g), 1
    if g.chance(0.15) and channels % 2 == 0 and width % 2 == 0:
        group = attributes["group"] = 2
    if g.chance(0.3):
        attributes["kernel_shape"] = [size] * spatial
    operands = [v.name, g.weight(width, channels // group, *[size] * spatial)]
    if g.chance(0.6):
        operands.append(_computed(g, (width,)) if g.chance(0.3) else g.weight(width))
    is_plain = size == 1 and not attributes.keys() & {"pads", "strides"}
    dims = v.dims[2:] if is_plain else (None,) * spatial
    return g.add("Conv", operands, (v.dims[0], width, *dims), **attributes)


def fused_matmul(g: Graph, v: Value) -> Value | None:
    if g.dtype != np.float32 or v.rank < 2 or not isinstance(v.width, int):
        return None
    turn, width = int(g.chance()), _out(g)
    name = g.weight(*((width, v.width) if turn else (v.width, width)))
    attributes = {"transB": turn, "alpha": g.choose(1.0, -0.5)}
    dims = (*v.dims[:-1], width)
    return g.add("FusedMatMul", [v.name, name], dims, domain="com.microsoft", **attributes)


def experts(g: Graph, v: Value) -> Value | None:
    """One of several matrices is picked for each row, or for all."""
    if v.rank != 3 or not isinstance(v.width, int):
        return None
    width = _out(g)
    table = g.weight(g.choose(3, 3, 1), v.width, width)
    b, s, _ = v.dims
    kind = g.choose("rows", "one", "first")
    if kind == "one":
        index = g.hold(np.array(0, np.int64))
        picked = g.add("Gather", [table, index], (v.width, width))
        return g.add("MatMul", [v.name, picked.name], (b, s, width))
    ids = _ids(g, b)
    if ids is None or b == 1:
        return None
    if kind == "first" or g.chance(0.3):
        index = g.add("Unsqueeze", [ids, g.ints(1)], (b, 1))
        picked = g.add("GatherND", [table, index.name], (b, v.width, width))
    else:
        picked = g.add("Gather", [table, ids], (b, v.width, width), axis=g.choose(0, -3))
    return g.add("MatMul", [v.name, picked.name], (b, s, width))


def _ids(g: Graph, size: int | str | None) -> str | None:
    """A vector of indices as long as the free dim ``size``, all of them 0."""
    if not isinstance(size, str):
        return None
    g.input(f"ids_{size}", (size,), TensorProto.INT64)
    return f"ids_{size}"


def embedding(g: Graph, v: Value) -> Value | None:
    """Rows of a table; ``v`` only says where the batch comes from."""
    size = v.dims[0] if v.dims and isinstance(v.dims[0], str) else "B"
    ids = _ids(g, size)
    width = g.choose(WIDTH, WIDTH, 8)
    table = g.weight(g.choose(5, 5, 1), width)
    found = g.add("Gather", [table, ids], (size, width))
    if g.chance(0.3):
        return g.add("Unsqueeze", [found.name, g.ints(1)], (size, 1, width))
    return found


LAYERS = (
    *(matmul,) * 6,
    *(left_matmul, left_matmul, vector, gemm, gemm, gemm, gemm_left, einsum),
    *(conv, conv, conv, fused_matmul, experts, embedding),
)
