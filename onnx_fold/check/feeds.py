"""What the parity check runs: inputs of several shapes, each of which can show another mistake.

Short and long, one row and many, one token with a cache, and the dimensions of different names at
different sizes, 1 among them, because what broadcasts by mistake is seen at no other size.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.check.judge import Feed
from onnx_fold.errors import UsageError
from onnx_fold.runtime.inputs import (
    IMAGE,
    Ranges,
    given_inputs,
    has_cache,
    index_limits,
    input_shapes,
    input_symbols,
    make_inputs,
    symbol_sizes,
)

__all__ = ["frozen_feeds", "make_feeds"]

LONGEST = 256
"""Tokens of the longest input, if the model takes so many."""

ROWS = 8
"""Rows of the input that fills the batch."""

MULTIPLICATIONS = 2e10
"""What a run of a long or wide input may take: a second or so."""

Sizes = dict[str, int]

_KNOWN = ("batch", "seq", "past", "image")
"""The sizes that every model may be given."""

_IMAGES = (32, 48, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
"""Sides of images to try, where a network does not take the usual ones."""


def make_feeds(
    model: ir.Model,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None,
    shapes: Sequence[Mapping[str, int]] | None,
    samples: int,
    seed: int,
    ranges: Ranges | None = None,
) -> list[Feed]:
    """Return the given inputs, or random ones of the given shapes, or of the default ones.

    Raises:
        UsageError: Inputs are given beside shapes or ranges, there is nothing to run, or they do
            not fit.
    """
    if inputs is not None:
        if shapes is not None:
            raise UsageError("pass either inputs or shapes, not both")
        if ranges:
            raise UsageError("ranges are for random inputs, not for those that are given")
        return [Feed("given inputs", given_inputs(model, inputs))]
    if samples < 1 or (shapes is not None and not shapes):
        raise UsageError("nothing to run: at least one sample and one shape are needed")
    if shapes is not None:
        for sizes in shapes:
            _check_sizes(model, sizes)
        return [
            _feed(model, dict(sizes), seed + number, ranges)
            for number, sizes in enumerate(itertools.chain(*([s] * samples for s in shapes)))
        ]
    feeds: list[Feed] = []
    for sizes, group in _defaults(model):
        for _ in range(1 if group else samples):
            options: Any = {"optional": True, "group": group}
            feeds.append(_feed(model, sizes, seed + len(feeds), ranges, **options))
    return feeds


def frozen_feeds(model: ir.Model, seed: int, ranges: Ranges | None = None) -> Iterator[Feed]:
    """Yield inputs of sizes that the graph itself holds, for one that runs at no other size."""
    held = sorted({*_held_sizes(model), *range(1, 17)} - {0})
    for image in _IMAGES if _has_image(model) else ():
        yield _feed(
            model, {"batch": 1, "image": image}, seed, ranges, optional=True, group="frozen"
        )
    pairs = sorted(itertools.product(held, held), key=lambda pair: (pair[0] * pair[1], pair))
    for batch, seq in pairs:
        if batch <= 4 and seq <= LONGEST:
            sizes = {"batch": batch, "seq": seq}
            yield _feed(model, sizes, seed, ranges, optional=True, group="frozen")


def _feed(model: ir.Model, sizes: Sizes, seed: int, ranges: Ranges | None, **options: Any) -> Feed:
    known: Any = {name: sizes[name] for name in _KNOWN if name in sizes}
    arrays = make_inputs(model, **known, sizes=sizes, seed=seed, ranges=ranges)
    return Feed(_label(model, sizes, arrays), arrays, **options)


def _label(model: ir.Model, sizes: Sizes, arrays: Mapping[str, Array]) -> str:
    """The sizes of an input in the words of the model: tokens, its own dimensions, or shapes."""
    has_tokens = any(array.ndim == 2 and array.dtype.kind == "i" for array in arrays.values())
    if not has_tokens and not has_cache(model) and set(sizes) == {"batch", "seq"}:
        sizes = symbol_sizes(model, batch=sizes["batch"], seq=sizes["seq"])
    if sizes:
        return " ".join(f"{name}={size}" for name, size in sizes.items())
    return ", ".join(f"{name} {'x'.join(map(str, a.shape))}" for name, a in arrays.items())


def _defaults(model: ir.Model) -> Iterator[tuple[Sizes, str]]:
    """Yield shapes, and the group of those of which the first that runs is enough."""
    cache = has_cache(model)

    def sizes(batch: int, seq: int, past: int) -> Sizes:
        return {"batch": batch, "seq": seq, **({"past": past} if cache else {})}

    yield sizes(1, 8, 5), ""
    if not input_symbols(model):
        return
    yield sizes(2, 16, 0), ""
    yield sizes(3, 1, 7), "single"
    for number, other in enumerate(_unlike(model)):
        yield other, f"unlike {number}"
    tokens = MULTIPLICATIONS / max(1, _weights(model))
    for length in _lengths(model):
        if 16 < length <= tokens:
            yield sizes(1, length, 0), "long"
    for length in (32, 16, 8):
        if length * ROWS <= tokens:
            yield sizes(ROWS, length, 0), "wide"


def _lengths(model: ir.Model) -> list[int]:
    """Lengths to try, longest first: those of the tables that are looked up, and powers of two."""
    limits = index_limits(model)
    positions = [rows for name, rows in limits.items() if "position" in name.lower()]
    rows = {
        size
        for node in model.graph
        if node.op_type.startswith(("Gather", "Slice")) and node.inputs[0] is not None
        for size in (node.inputs[0].shape or ())
        if isinstance(size, int) and node.inputs[0].is_initializer()
    }
    lengths = {32, 64, 128, LONGEST, *rows}
    return sorted((n for n in lengths if n <= min((LONGEST, *positions))), reverse=True)


def _unlike(model: ir.Model) -> Iterator[Sizes]:
    """Yield sizes for inputs where two dimensions of different names would have the same size."""
    usual = symbol_sizes(model, batch=2, seq=3)
    first = {size: name for name, size in reversed(usual.items())}
    repeated = [name for name, size in usual.items() if first[size] != name]
    if not repeated:
        return
    leading = {first[usual[name]] for name in repeated}
    one = {name: 32 if size == IMAGE else 1 for name, size in usual.items()}
    yield {name: (2 + number) * one[name] for number, name in enumerate(usual)}
    yield {name: one[name] if name in repeated else size for name, size in usual.items()}
    yield {name: one[name] if name in leading else size for name, size in usual.items()}


def _has_image(model: ir.Model) -> bool:
    return input_shapes(model) != input_shapes(model, image=2 * IMAGE)


def _weights(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(t.size for t in tensors if t is not None and t.dtype.is_floating_point())


def _held_sizes(model: ir.Model) -> Iterator[int]:
    """Sizes in the shapes that nodes are told, and those of values that are known."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            yield from (dim for dim in value.shape or () if isinstance(dim, int))
        if node.op_type in ("Reshape", "Expand") and len(node.inputs) > 1 and node.inputs[1]:
            told = ir.convenience.get_const_tensor(node.inputs[1])
            if told is not None:
                yield from (int(size) for size in told.numpy().reshape(-1) if size > 0)


def _check_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    dims = (dim for value in model.graph.inputs for dim in value.shape or ())
    symbols = {str(dim) for dim in dims if isinstance(dim, ir.SymbolicDim)}
    unknown = sorted(set(sizes) - symbols - {*_KNOWN})
    if unknown:
        listed = ", ".join(sorted(symbols)) or "none"
        raise UsageError(
            f"unknown dimension '{unknown[0]}': expected {', '.join(_KNOWN)} or one of the model's"
            f" own ({listed})"
        )
