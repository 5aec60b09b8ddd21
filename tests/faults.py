"""Faults planted into the weights of a folded model, for the check to find.

python tests/faults.py --seeds 20       # the score of many seeds, and right models refused
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import onnx_fold
from onnx_fold.models.export import export
from onnx_fold.models.presets import PRESETS

DTYPES = ("float32", "float16", "bfloat16")
TINY = sorted(n for n in PRESETS if n.startswith("tiny-") and "norms" not in n)
MODELS = ("tiny-gqa", "tiny-parallel")


@dataclass(frozen=True)
class Fault:
    """A change of one weight of a model."""

    kind: str
    weight: str
    model: ir.Model


def plant(model: ir.Model, seed: int, weights: int = 5) -> Iterator[Fault]:
    """Yield ``model`` with one fault, of each kind in each of some weights drawn at random."""
    generator = np.random.default_rng(seed)
    held = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value.dtype.is_floating_point()
    }
    matrices = [name for name, array in held.items() if array.ndim == 2 and min(array.shape) > 1]
    biases = [name for name, array in held.items() if array.ndim == 1 and array.size > 4]
    for name in generator.permutation(matrices)[:weights]:
        for kind, array in _of_matrix(held[name], generator):
            yield Fault(kind, str(name), _with(model, str(name), array))
    for name in generator.permutation(biases)[:weights]:
        array = held[name].copy()
        array[np.abs(array.astype(np.float32)).argmax()] *= -1
        yield Fault("a sign of a bias", str(name), _with(model, str(name), array))


def _of_matrix(
    held: np.ndarray, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    i, j = generator.choice(held.shape[0], 2, replace=False)
    k = generator.integers(held.shape[1])
    zeroed, swapped, doubled = held.copy(), held.copy(), held.copy()
    zeroed[:, k] = 0
    swapped[[i, j]] = swapped[[j, i]]
    doubled[i] *= held.dtype.type(2)
    yield "a column zeroed", zeroed
    yield "two rows swapped", swapped
    yield "a row doubled", doubled
    yield "3 % larger", (held.astype(np.float64) * 1.03).astype(held.dtype)
    yield "a sign of an element", _negated(held)
    if held.shape[0] == held.shape[1]:
        yield "transposed", held.T.copy()


def _negated(held: np.ndarray) -> np.ndarray:
    """The largest element of the weight with the other sign."""
    array = held.copy()
    place = np.unravel_index(np.abs(held.astype(np.float32)).argmax(), held.shape)
    array[place] *= held.dtype.type(-1)
    return array


def _with(model: ir.Model, name: str, array: np.ndarray) -> ir.Model:
    copy = model.clone()
    copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy


@functools.cache
def folded(preset: str, dtype: str, cache: bool, seed: int) -> tuple[ir.Model, ir.Model]:
    """A preset, and what it becomes, as they would be read from files."""
    with tempfile.TemporaryDirectory() as folder:
        path = export(
            preset,
            Path(folder, "m.onnx"),
            dtype=dtype,
            exporter="torchscript",  # the quicker one
            kv_cache=cache,
            seed=seed,
        )
        original = ir.from_proto(ir.to_proto(ir.load(path)))
    result = onnx_fold.fold(original, objective="size", verify=False)
    assert result.report.folded
    return original, ir.from_proto(ir.to_proto(result.model))


def score(
    preset: str, dtype: str, cache: bool, seed: int, weights: int = 5
) -> tuple[list[Fault], list[Fault]]:
    """The faults planted in one model, and those that were not noticed."""
    original, right = folded(preset, dtype, cache, seed)
    planted = list(plant(right, seed, weights))
    return planted, [f for f in planted if onnx_fold.verify(original, f.model)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--only", choices=("right", "wrong"))
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {dtype: Counter() for dtype in options.dtypes}
    for seed in range(options.first, options.first + options.seeds):
        for dtype in options.dtypes:
            count, cache = counts[dtype], seed % 2 == 0
            for preset in () if options.only == "wrong" else TINY:
                report = onnx_fold.verify(*folded(preset, dtype, cache, seed))
                count["right"] += 1
                if not report:
                    count["refused"] += 1
                    print(f"refused: {preset} {dtype} seed {seed}: {report.reason}", flush=True)
            for preset in () if options.only == "right" else MODELS:
                faults, missed = score(preset, dtype, cache, seed)
                count["planted"] += len(faults)
                count["missed"] += len(missed)
                for fault in missed:
                    where = f"{preset} {dtype} seed {seed}"
                    print(f"missed: {where}: {fault.kind} in {fault.weight}", flush=True)
            folded.cache_clear()
            print(
                f"{dtype} to seed {seed}: {count['planted'] - count['missed']} of"
                f" {count['planted']} faults noticed, {count['refused']} of {count['right']} right"
                " models refused",
                flush=True,
            )


if __name__ == "__main__":
    main()
