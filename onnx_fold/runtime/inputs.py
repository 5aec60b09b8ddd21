"""Inputs for any signature, and which output of a decoder is the next step's cache."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from rich.filesize import decimal

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import is_float
from onnx_fold.base.memory import available_memory
from onnx_fold.errors import UsageError
from onnx_fold.graph.inline import inline_all
from onnx_fold.runtime.npz import read_npz, refuse_unknown

__all__ = [
    "IMAGE",
    "Arrays",
    "Ranges",
    "cache_inputs",
    "cache_links",
    "given_inputs",
    "has_cache",
    "index_limits",
    "input_shapes",
    "input_symbols",
    "make_inputs",
    "model_inputs",
    "symbol_sizes",
    "token_counts",
]

IMAGE = 64
"""Pixels along the side of an image: most networks take multiples of 32."""

Arrays: TypeAlias = dict[str, Array]
"""Inputs or outputs of a model by their names."""

Ranges: TypeAlias = Mapping[str, tuple[float, float]]
"""The lowest and the highest value of random inputs, by their names."""


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that must be fed: those that no initializer gives a default."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def cache_inputs(model: ir.Model) -> list[str]:
    """Return the names of the inputs that take keys and values of earlier tokens."""
    return [_name(value) for value in model_inputs(model) if _is_cache(value)]


def has_cache(model: ir.Model) -> bool:
    """Whether the model takes keys and values of earlier tokens."""
    return bool(cache_inputs(model))


def cache_links(model: ir.Model) -> dict[str, str]:
    """Return which output each cache input takes its next value from, by their names.

    ``past_key_values.0.key`` and ``present.0.key`` belong together by what is left of their names
    without the words for time; if not all outputs find their input so, they do in order. Empty if
    neither tells. Inputs that no output updates, such as the keys of an encoder, have no link.
    """
    past = cache_inputs(model)
    present = [_name(value) for value in model.graph.outputs if _is_present(value)]
    by_name = {_timeless(name): name for name in past}
    if present and all(_timeless(name) in by_name for name in present):
        return {by_name[_timeless(name)]: name for name in present}
    return dict(zip(past, present, strict=True)) if len(past) == len(present) else {}


def _is_present(value: ir.Value) -> bool:
    words = "present", "past", "cache"
    return _has_depth(value) and any(word in _name(value).lower() for word in words)


def _timeless(name: str) -> str:
    return re.sub(
        r"past|present|key_values|cache|new|old|out(put)?|in(put)?|[^a-z0-9]", "", name.lower()
    )


def make_inputs(
    model: ir.Model,
    *,
    batch: int = 1,
    seq: int = 8,
    past: int = 0,
    image: int = IMAGE,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    without: Collection[str] = (),
    given: Mapping[str, Array] | None = None,
    ranges: Ranges | None = None,
) -> Arrays:
    """Return random inputs that fit the signature of ``model``.

    Symbolic dimensions get their size from their name (``batch``, ``past``, ``seq``, the sum of two
    of them), else from the input that they belong to (``input_ids`` is ``[batch, seq]``, floats of
    rank 4 are an image, of rank 5 several), else 3; a symbol has one size everywhere. Fixed
    dimensions stay as they are.

    Indices are in the range of the smallest constant table that they are looked up in, and look up
    all of its rows before they repeat one. Masks are 1
    except for the last row of a batch, where a few keys are hidden: the first ones of the cache, or
    without a cache the last ones, so that no query is left without a key (its softmax would have no
    defined value). Additive float masks are 0. Positions count from ``past``. Floats, and so the
    cache, are standard normal, in the input's own type.

    Args:
        model: The model; it is not changed.
        batch: Rows.
        seq: New tokens of a row.
        past: Tokens in the cache, if the model has one.
        image: Pixels along each side of an image.
        seed: Seed of all random numbers.
        sizes: Sizes of further symbolic dimensions by their name, such as ``{"height": 224}``.
        without: Names of inputs to leave out.
        given: Inputs that are known already; their symbolic dimensions have the sizes seen there.
        ranges: Inputs that are drawn between two values, both included, evenly.

    Raises:
        UsageError: A range is empty, of no input, or of one that holds no numbers; an input is not
            a tensor, has an unknown rank, a dimension is impossible, or all of them do not fit in
            memory.
    """
    inputs, given = model_inputs(model), given or {}
    limited = _checked(inputs, ranges or {})
    seen = {**_seen_sizes(inputs, given), **(sizes or {})}
    shapes = input_shapes(model, batch=batch, seq=seq, past=past, image=image, sizes=seen)
    _, tokens, past = token_counts(model, shapes)
    seq = tokens or seq
    _check_memory(shapes.values())
    limits = index_limits(model)
    rng = np.random.default_rng(seed)
    made = {
        name: _between(value, shapes[name], limited[name], rng)
        if name in limited
        else _fill(value, shapes[name], (seq, past), limits.get(name), rng)
        for value in inputs
        if (name := _name(value)) not in given and name not in without
    }
    return {**made, **given}


def _checked(inputs: Sequence[ir.Value], ranges: Ranges) -> Ranges:
    """Return ``ranges``, those of integers from and to whole numbers."""
    checked, known = {}, {_name(value): value for value in inputs}
    refuse_unknown(ranges, known)
    for name, (low, high) in ranges.items():
        dtype = known[name].dtype
        if not math.isfinite(high - low):
            raise UsageError(f"the range of input '{name}' has no end: {low} to {high}")
        if dtype is None or not (dtype.is_floating_point() or dtype.is_integer()):
            raise UsageError(f"input '{name}' holds no numbers, and has no range")
        if dtype.is_integer():
            low, high = math.ceil(low), math.floor(high)
        if not low <= high:
            raise UsageError(f"the range of input '{name}' is empty: {low} to {high}")
        checked[name] = low, high
    return checked


def _between(
    value: ir.Value, shape: tuple[int, ...], limits: tuple[float, float], rng: np.random.Generator
) -> Array:
    """Return numbers between ``limits``, both included."""
    assert value.dtype is not None
    if value.dtype.is_integer():
        low, high = map(int, limits)
        whole = rng.integers(low, high, shape, endpoint=True)
        return np.asarray(whole).astype(value.dtype.numpy())
    return np.asarray(rng.uniform(*limits, shape)).astype(value.dtype.numpy())


def _check_memory(shapes: Iterable[Sequence[int]]) -> None:
    total = sum(8 * math.prod(shape) for shape in shapes)  # they are drawn in float64
    if total > available_memory() // 2:
        raise UsageError(f"the inputs of the model take {decimal(total)}: too much for the memory")


def _seen_sizes(inputs: Sequence[ir.Value], given: Mapping[str, Array]) -> dict[str, int]:
    """Return the sizes that the given arrays show for symbolic dimensions."""
    known = [value for value in inputs if value.name in given]
    return {
        dim.value: given[_name(value)].shape[axis]
        for value, axis, dim in _symbols(known)
        if dim.value is not None and _is_plain(dim.value)
    }


def given_inputs(
    model: ir.Model,
    inputs: str | os.PathLike[str] | Mapping[str, Array],
    needed: Iterable[str] | None = None,
) -> Arrays:
    """Read the inputs of ``model`` from arrays or an ``.npz`` file, in the types it takes.

    Args:
        model: The model.
        inputs: Arrays by name, or an ``.npz`` file.
        needed: Names that must be given; None for all inputs without a default.

    Raises:
        UsageError: An input is unknown, missing, or does not fit.
    """
    known = {str(value.name): value for value in model.graph.inputs}
    arrays = dict(inputs) if isinstance(inputs, Mapping) else read_npz(inputs, known.values())
    names = [_name(value) for value in model_inputs(model)] if needed is None else needed
    refuse_unknown(arrays, known)
    if missing := sorted(set(names) - set(arrays)):
        raise UsageError(f"input '{missing[0]}' is missing from the given inputs")
    return {name: _fitted(known[name], array) for name, array in arrays.items()}


def _fitted(value: ir.Value, array: Array) -> Array:
    """Return ``array`` in the type of ``value``; npz files know no bfloat16 and hold raw bytes."""
    array = np.asarray(array)
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        return array
    wanted = value.dtype.numpy()
    if array.dtype.kind == "V" and array.itemsize == wanted.itemsize:
        array = array.view(wanted)
    if value.shape is not None and array.ndim != len(value.shape):
        raise UsageError(f"input '{value.name}' has rank {len(value.shape)}, not {array.ndim}")
    if is_float(array) != value.dtype.is_floating_point():
        raise UsageError(f"input '{value.name}' is {value.dtype.name}, not {array.dtype}")
    return array.astype(wanted)


def input_shapes(
    model: ir.Model,
    *,
    batch: int = 1,
    seq: int = 8,
    past: int = 0,
    image: int = IMAGE,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input that must be fed; see :func:`make_inputs`.

    Raises:
        UsageError: An input is not a tensor, has an unknown rank, or a dimension is impossible.
    """
    wanted = {"batch": batch, "seq": seq, "past": past if has_cache(model) else 0, "image": image}
    return _resolve(model_inputs(model), wanted, sizes or {})


def input_symbols(model: ir.Model) -> list[str]:
    """Return the names of the symbolic dimensions of the inputs that must be fed, in their order.

    Raises:
        UsageError: An input is not a tensor, or has an unknown rank.
    """
    dims = (dim.value for _, _, dim in _symbols(model_inputs(model)))
    return list(dict.fromkeys(name for name in dims if name is not None and _is_plain(name)))


def symbol_sizes(model: ir.Model, *, batch: int = 1, seq: int = 8) -> dict[str, int]:
    """Return the size that :func:`make_inputs` gives to each symbolic dimension, by its name."""
    shapes = input_shapes(model, batch=batch, seq=seq)
    return {
        dim.value: shapes[_name(value)][axis]
        for value, axis, dim in _symbols(model_inputs(model))
        if dim.value is not None and _is_plain(dim.value)
    }


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _is_cache(value: ir.Value) -> bool:
    name = _name(value).lower()
    return _has_depth(value) and "mask" not in name and ("past" in name or "cache" in name)


def _has_depth(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.rank() >= 3


def _is_tokens(value: ir.Value) -> bool:
    name, shape = _name(value).lower(), value.shape
    if shape is None or "mask" in name or _is_cache(value):
        return False
    if shape.rank() == 3:
        return not _is_sound(name, shape)
    return shape.rank() == 2 and name.endswith("ids")


def _is_sound(name: str, shape: ir.Shape) -> bool:
    """Whether ``[batch, channels, time]``, or its other order, is of a spectrum or a wave."""
    words = "input_features", "mel", "audio", "wave", "spec", "speech", "sound", "fbank"
    return any(word in name for word in words) or (
        isinstance(shape[1], int) and not isinstance(shape[2], int)
    )


def token_counts(
    model: ir.Model, shapes: Mapping[str, Sequence[int]]
) -> tuple[int | None, int | None, int]:
    """Return rows, new tokens and cached tokens of inputs with these shapes; None where unknown."""
    values = model_inputs(model)
    # The cache of an encoder, which has no link, does not count the tokens of a decoder.
    caches = [*cache_links(model), *cache_inputs(model)]
    past = shapes[caches[0]][-2] if caches else 0
    tokens = next((shapes[_name(v)] for v in values if _is_tokens(v)), None)
    return (None, None, past) if tokens is None else (tokens[0], tokens[1], past)


def _resolve(
    inputs: Sequence[ir.Value], wanted: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input, in numbers."""
    bound = dict(sizes)
    for rule in (_size_by_symbol, _size_by_input, _size_by_axis):
        for value, axis, dim in _symbols(inputs):
            if dim.value is not None and _is_plain(dim.value) and dim.value not in bound:
                size = rule(value, axis, dim.value, wanted)
                if size is not None:
                    bound[dim.value] = size
    return {_name(value): _numbers(value, bound, wanted) for value in inputs}


def _symbols(inputs: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, int, ir.SymbolicDim]]:
    for value in inputs:
        for axis, dim in enumerate(_shape(value)):
            if isinstance(dim, ir.SymbolicDim):
                yield value, axis, dim


def _shape(value: ir.Value) -> ir.Shape:
    if not isinstance(value.type, ir.TensorType):
        raise UsageError(f"input '{value.name}' is not a tensor: pass inputs=")
    if value.shape is None:
        raise UsageError(f"input '{value.name}' has no known rank: pass inputs=")
    return ir.Shape([None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape])


def _is_plain(symbol: str) -> bool:
    """Whether ``symbol`` is one name, not a formula such as ``past + seq``."""
    return re.fullmatch(r"[^-+*/() ,]+", symbol) is not None


def _numbers(
    value: ir.Value, bound: Mapping[str, int], wanted: Mapping[str, int]
) -> tuple[int, ...]:
    dims = []
    for axis, dim in enumerate(_shape(value)):
        size = dim if isinstance(dim, int) else _size(value, axis, dim, bound, wanted)
        if size < 0:
            raise UsageError(f"input '{value.name}': dimension {dim} would be {size}")
        dims.append(size)
    return tuple(dims)


def _size(
    value: ir.Value,
    axis: int,
    dim: ir.SymbolicDim,
    bound: Mapping[str, int],
    wanted: Mapping[str, int],
) -> int:
    symbol = dim.value or ""
    if symbol in bound:
        return bound[symbol]
    with contextlib.suppress(ValueError):
        size = symbol and dim.evaluate(
            {
                name: bound.get(name, _size_by_symbol(value, axis, name, wanted) or 3)
                for name in dim.free_symbols()
            }
        )
        if isinstance(size, int):
            return size
    by_name = _size_by_symbol(value, axis, symbol, wanted)
    return by_name if by_name is not None else _size_by_axis(value, axis, symbol, wanted)


def _size_by_symbol(
    value: ir.Value, axis: int, symbol: str, wanted: Mapping[str, int]
) -> int | None:
    """Return the size that the name of the dimension tells."""
    words = symbol.lower()
    if "batch" in words:
        return wanted["batch"]
    if "total" in words or words.startswith("kv_") or ("past" in words and "plus" in words):
        return wanted["past"] + wanted["seq"]
    if "past" in words or "cache" in words:
        return wanted["past"]
    if any(word in words for word in ("seq", "len", "time", "token")):
        return wanted["seq"]
    return 3 if "channel" in words else None


def _size_by_input(
    value: ir.Value, axis: int, symbol: str, wanted: Mapping[str, int]
) -> int | None:
    """Return the size that is known from what the input is."""
    batch, seq, past = wanted["batch"], wanted["seq"], wanted["past"]
    name, rank = _name(value).lower(), len(_shape(value))
    layouts: list[tuple[bool, dict[int, int]]] = [
        (_is_cache(value) and rank == 4, {0: batch, 2: past}),
        ("mask" in name and rank == 2, {0: batch, 1: past + seq}),
        ("mask" in name and rank == 4, {0: batch, 2: seq, 3: past + seq}),
        ("position" in name and rank == 1, {0: seq}),
        (name.endswith("ids") and rank == 2, {0: batch, 1: seq}),
        (name.endswith(("embeds", "states")) and rank == 3, {0: batch, 1: seq}),
    ]
    return next((layout.get(axis) for applies, layout in layouts if applies), None)


def _size_by_axis(value: ir.Value, axis: int, symbol: str, wanted: Mapping[str, int]) -> int:
    """Return a size for a dimension of which nothing is known; from its place in the shape."""
    known = _size_by_input(value, axis, symbol, wanted)
    if known is not None:
        return known
    is_index = value.dtype is not None and value.dtype.is_integer()
    if axis == 0:
        return wanted["batch"]
    if _is_side(value, axis):
        return wanted["image"]
    if axis == 1 and (is_index or len(_shape(value)) == 3):
        return wanted["seq"]
    return 3


def _is_side(value: ir.Value, axis: int) -> bool:
    """Whether ``axis`` is the height or width of images, their channels in front or behind."""
    shape = _shape(value)
    rank = len(shape)
    if rank not in (4, 5) or value.dtype is None or not value.dtype.is_floating_point():
        return False
    is_last = shape[-1] in (1, 3, 4) and not isinstance(shape[1], int)
    return axis - rank in ((-3, -2) if is_last else (-2, -1))


def _fill(
    value: ir.Value,
    shape: tuple[int, ...],
    tokens: tuple[int, int],
    limit: int | None,
    rng: np.random.Generator,
) -> Array:
    """Return the values of one input, by what its name and type say that it is."""
    assert value.dtype is not None
    name, dtype = _name(value).lower(), value.dtype
    if "mask" in name:
        return _mask(shape, tokens[1], dtype)
    if dtype == ir.DataType.STRING:
        return np.full(shape, "text", dtype=object)
    if dtype == ir.DataType.BOOL:
        cached = np.full(shape, tokens[1] > 0)
        return cached if "use_cache" in name else np.asarray(rng.random(shape) < 0.5)
    if dtype.is_integer():
        counted = _counted(name, shape, tokens, limit)
        drawn = _drawn(shape, limit, rng) if counted is None else counted
        return np.array(np.broadcast_to(drawn, shape).astype(dtype.numpy()))
    return np.asarray(rng.standard_normal(shape)).astype(dtype.numpy())


def _drawn(shape: tuple[int, ...], limit: int | None, rng: np.random.Generator) -> Array:
    """Return indices in random order, none twice before each was there once: 0 and 1 at random."""
    if limit is None:
        return rng.integers(0, 2, shape)
    size = math.prod(shape)
    rounds = [rng.permutation(limit) for _ in range(math.ceil(size / max(1, limit)))]
    return np.concatenate([*rounds, np.empty(0, np.int64)])[:size].reshape(shape)


def _counted(
    name: str, shape: tuple[int, ...], tokens: tuple[int, int], limit: int | None
) -> Array | int | None:
    """Return positions and lengths, which are counted and not drawn; None for anything else."""
    seq, past = tokens
    if "position" in name and shape:
        positions = np.arange(past, past + shape[-1])
        return positions if limit is None else positions % limit
    lengths = {"seqlens_k": past + seq - 1, "total_seq": past + seq, "past_": past, "length": seq}
    if len(shape) > 2:
        return None
    return next((length for word, length in lengths.items() if word in name), None)


def _mask(shape: tuple[int, ...], past: int, dtype: ir.DataType) -> Array:
    additive = dtype.is_floating_point() and len(shape) > 2
    mask = np.full(shape, 0 if additive else 1).astype(dtype.numpy())
    if len(shape) == 2 and shape[0] > 1 and shape[1] > 1:
        hidden = max(1, min(shape[1] // 4, past or shape[1]))
        mask[-1, slice(hidden) if past else slice(-hidden, None)] = 0
    return mask


_SAME_INDICES = frozenset(
    {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Transpose"}
    | {"Slice", "Split", "Concat", "Where", "Clip", "GatherElements"}
)
"""Operators whose results are indices out of those that they were given."""


def index_limits(model: ir.Model) -> dict[str, int]:
    """Return the rows of the smallest constant table that an input indexes, by the input's name."""
    if model.functions:
        model = model.clone()
        inline_all(model)
    limits = {_name(value): list(_table_rows(value)) for value in model.graph.inputs}
    return {name: min(rows) for name, rows in limits.items() if rows}


def _table_rows(value: ir.Value) -> Iterator[int]:
    seen: set[ir.Value] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if index == 1 and node.op_type.startswith("Gather"):
                yield from _rows(node)
            elif node.op_type in _SAME_INDICES:
                todo.extend(node.outputs)


def _rows(node: ir.Node) -> Iterator[int]:
    table = node.inputs[0]
    shape = None if table is None else table.shape
    if table is not None and shape is None:
        tensor = ir.convenience.get_const_tensor(table)
        shape = None if tensor is None else ir.Shape(tensor.shape.numpy())
    axis = node.attributes.get_int("axis", node.attributes.get_int("gather_axis", 0))
    if shape is not None and shape.rank() and isinstance(shape[axis], int):
        yield int(shape[axis])  # type: ignore[arg-type]
