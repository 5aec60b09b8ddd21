"""Measure how fast a model folds, and in how much memory.

``python benchmarks/scale.py --layers 1 8 32 --dtype float16`` exports models of the shape of
Mistral-7B with so many blocks (0.5 B, 2.0 B and 7.2 B weights), folds each in a process of its own
and writes ``docs/scale.json``, and a table of all that it holds, ``docs/scale.md``.

The floor of the time is what cannot be avoided: the products, eliminations and solves of the folds
that were taken, counted in the expressions of the folded weights, at the rate of matrix products on
this machine; and reading the input and writing the output once, at the rates of this disk. The
bound of the memory is 1 GiB and four times the largest weight in float64.

With ``--processor`` all times, those of the floor too, are processor time, of all threads: what
else runs on the machine hardly counts then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import onnx_fold
from onnx_fold.algebra.completion import Completion, PartialSelection
from onnx_fold.algebra.expression import Expression, Factors, FoldedTensor, Product, Solve
from onnx_fold.algebra.selection import RowSelection, Selection
from onnx_fold.base.arguments import Objective
from onnx_fold.models.export import export
from onnx_fold.runtime.environment import environment

Clock = Callable[[], float]

CHUNK = 2**26

HEAD = """# How fast models fold, and in how much memory

`python benchmarks/scale.py --layers 1 8 32 --folder /tmp/scale --output docs/scale.json` exports
models of the shape of Mistral-7B, folds each in a process of its own, and writes this table; with
`--objective size`, `--dtype float16` and `--processor` the rows that say so. Rows that were
measured with other options stay in it.

The floor is what cannot be avoided: the products, eliminations and solves of the folds that were
taken, at this machine's rate of matrix products, and reading the input and writing the output once,
at the rates of its disk ([scale.json](scale.json) has those of the last run). What only decides is
not in it. The bound of the memory is 1 GiB and four times the largest weight in float64.

*wall* is the time that passed; *processor* (`--processor`) is processor time, which does not count
what else the machine does. {notes}

Where the time goes: `python -m cProfile -s tottime benchmarks/scale.py --fold model.onnx out.onnx`.

"""


@dataclass(frozen=True)
class Rates:
    """What this machine does, at best, in one second.

    Attributes:
        float32: Operations of a product of float32 matrices.
        float64: The same in float64.
        read: Bytes read from a file that is not cached.
        write: Bytes written to a file, and flushed.
    """

    float32: float
    float64: float
    read: float
    write: float


@dataclass(frozen=True)
class ScaleResult:
    """One fold.

    Attributes:
        preset: Name of the shape.
        layers: Number of blocks.
        dtype: Storage type.
        weights: Number of weights.
        weights_removed: How many of them went.
        seconds: Time of folding and writing.
        floor: What cannot be avoided of it.
        ratio: The first over the second.
        operations: Of the products, by type.
        read: Bytes of the input.
        written: Bytes of the output.
        peak: Peak of the resident memory, in bytes.
        bound: What it may be at most.
        objective: What the fold was for.
        clock: Whether times are of the ``wall`` or of the ``processor``.
    """

    preset: str
    layers: int | None
    dtype: str
    weights: int
    weights_removed: int
    seconds: float
    floor: float
    ratio: float
    operations: dict[str, float]
    read: int
    written: int
    peak: int
    bound: int
    objective: str = "size"
    clock: str = "wall"


# --- The fold, in a process of its own ------------------------------------------------------------


def fold_and_count(
    source: Path, target: Path, objective: Objective = "speed", clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Fold ``source`` and write ``target``: seconds, operations, sizes."""
    started = clock()
    result = onnx_fold.fold(source, objective=objective, verify=False)
    tensors = [
        value.const_value
        for value in result.ir.graph.initializers.values()
        if isinstance(value.const_value, FoldedTensor)
    ]
    expressions = [tensor.expression for tensor in tensors]
    result.save(target)
    seconds = clock() - started
    saving = result.report.saving
    held = (value.const_value for value in result.original.graph.initializers.values())
    return {
        "seconds": seconds,
        "operations": operations(expressions),
        "weights": saving.before.weights,
        "weights_removed": saving.weights,
        "largest": max(tensor.size for tensor in held if tensor is not None),
        "peak": _peak(),
    }


def _peak() -> int:
    """Peak of the resident memory of this process, in bytes.

    ``getrusage`` would count what its parent had when it forked.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def operations(expressions: Iterable[Expression]) -> dict[str, float]:
    """Floating-point operations to evaluate ``expressions``, by type; what is shared counts once.

    A product of ``[m, k]`` and ``[k, n]`` takes ``2 m k n``, a solve ``2 d² n``. An elimination of
    ``[f, d]`` takes ``f d² - d³ / 3``, and the coefficients of the other rows ``(f - d) d²`` in
    float64; where ``m`` rows of a basis are given up, what completes it takes the factors of the
    basis and two solves for ``m`` columns.
    """
    total: Counter[str] = Counter()
    queue: list[Expression | Selection | Completion] = list(expressions)
    seen: set[int] = set()
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, RowSelection):
            rows, width = node.matrix.shape
            total[node.matrix.dtype.name] += rows * width**2 - width**3 / 3
            total["float64"] += (rows - width) * width**2
            queue.append(node.matrix)
            continue
        if isinstance(node, PartialSelection):
            queue.append(node.completion)
            continue
        if isinstance(node, Completion):
            width = node.whole.kept
            total["float64"] += 2 * width**3 / 3 + 4 * width**2 * node.count
            queue.append(node.whole)
            continue
        assert isinstance(node, Expression)
        if node.operation is Product:
            total[node.dtype.name] += 2 * node.operands[0].shape[-1] * int(np.prod(node.shape))
        elif node.operation is Factors:
            total[node.dtype.name] += 2 * node.shape[0] ** 3 / 3
        elif node.operation is Solve:
            total[node.dtype.name] += 2 * node.shape[0] ** 2 * node.shape[1]
        queue.extend(node.operands)
        find = getattr(node.arguments.get("source"), "find", None)
        if isinstance(selection := getattr(find, "__self__", None), Selection):
            queue.append(selection)
    return dict(total)


# --- The machine ----------------------------------------------------------------------------------


def measure_rates(
    folder: Path, clock: Clock = time.perf_counter, size: int = 4096, nbytes: int = 2**30
) -> Rates:
    """Measure products of ``size`` squared and a file of ``nbytes``."""
    path = folder / "rate.tmp"
    try:
        write = _write_rate(path, nbytes, clock)
        products = (_product_rate(dtype, size, clock) for dtype in ("f4", "f8"))
        return Rates(*products, _read_rate(path, clock), write)
    finally:
        path.unlink(missing_ok=True)


def _product_rate(dtype: str, size: int, clock: Clock) -> float:
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype(dtype)
    times = []
    for _ in range(4):
        started = clock()
        matrix @ matrix
        times.append(clock() - started)
    return float(2 * size**3 / min(times))


def _write_rate(path: Path, nbytes: int, clock: Clock) -> float:
    chunk = np.random.default_rng(0).bytes(min(CHUNK, nbytes))
    started = clock()
    with path.open("wb") as file:
        for _ in range(nbytes // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size / (clock() - started)


def _read_rate(path: Path, clock: Clock) -> float:
    forget(path)
    started = clock()
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass
    return path.stat().st_size / (clock() - started)


def forget(path: Path) -> None:
    """Take a file out of the cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- Measuring ------------------------------------------------------------------------------------


def measure(
    preset: str,
    layers: int | None,
    dtype: Any,
    folder: Path,
    rates: Rates,
    objective: str = "speed",
    clock: str = "wall",
) -> ScaleResult:
    """Export a model unless it is there, fold it, and compare with the floor."""
    source = folder / f"{preset}-{layers}-{dtype}.onnx"
    target = folder / f"{source.stem}-folded.onnx"
    if not source.exists():
        export(preset, source, layers=layers, dtype=dtype)
        if not _data(source):  # small weights lie in the graph: fold what is streamed
            ir.save(ir.load(source), source, external_data=f"{source.name}.data")
    for path in (source, *_data(source)):
        forget(path)
    command = [sys.executable, __file__, "--fold", str(source), str(target)]
    command += ["--objective", objective, *(["--processor"] if clock == "processor" else [])]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    done = json.loads(output)
    read = sum(path.stat().st_size for path in (source, *_data(source)))
    written = sum(path.stat().st_size for path in (target, *_data(target)))
    floor = read / rates.read + written / rates.write
    floor += sum(count / getattr(rates, kind) for kind, count in done["operations"].items())
    for path in (target, *_data(target)):
        path.unlink()
    return ScaleResult(
        preset,
        layers,
        dtype,
        done["weights"],
        done["weights_removed"],
        done["seconds"],
        floor,
        done["seconds"] / floor,
        done["operations"],
        read,
        written,
        done["peak"],
        2**30 + 4 * 8 * done["largest"],
        objective,
        clock,
    )


def _data(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}*.data"))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fold", nargs=2, type=Path, metavar=("MODEL", "OUTPUT"))
    parser.add_argument("--preset", default="mistral-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"])
    parser.add_argument("--folder", type=Path, default=Path(), help="where models are kept")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--objective", default="speed", choices=("speed", "size"))
    parser.add_argument("--processor", action="store_true", help="measure processor time")
    parser.add_argument("--quick", action="store_true", help="measure the machine roughly")
    given = parser.parse_args()
    clock = time.process_time if given.processor else time.perf_counter
    if given.fold is not None:
        print(json.dumps(fold_and_count(*given.fold, given.objective, clock)))
        return
    rates = measure_rates(given.folder, clock, *((512, 2**20) if given.quick else ()))
    how = given.objective, "processor" if given.processor else "wall"
    results = []
    for dtype in given.dtype:
        for layers in given.layers:
            result = measure(given.preset, layers, dtype, given.folder, rates, *how)
            results.append(result)
            print(
                f"{result.weights / 1e9:.2f} B {dtype}: {result.seconds:.1f} s,"
                f" {result.ratio:.2f}x of the floor ({result.floor:.1f} s);"
                f" {result.peak / 2**30:.2f} GiB of at most {result.bound / 2**30:.2f}"
            )
    if given.output is not None:
        save(given.output, results, rates)


KEY = ("preset", "layers", "dtype", "objective", "clock")
"""What tells one row of the table from another."""


def save(path: Path, results: list[ScaleResult], rates: Rates) -> None:
    """Add ``results`` to those in ``path``, and write all of them as a table beside it."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    old, notes = held.get("results", []), held.get("notes", "")
    new = [asdict(result) for result in results]
    known = {tuple(each.get(name) for name in KEY): each for each in [*old, *new]}
    rows = sorted(known.values(), key=lambda each: (each["dtype"], each["weights"]))
    data = {"rates": asdict(rates), "environment": environment("cpu"), "notes": notes}
    data["results"] = rows
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table([ScaleResult(**row) for row in rows], notes), "utf-8")


def table(results: Iterable[ScaleResult], notes: str) -> str:
    """The results as Markdown; ``notes`` say what a reader must know of their machine."""
    lines = [
        "| shape | blocks | type | objective | time | weights | removed | fold | floor | ratio |"
        " peak RSS | bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.preset} | {r.layers} | {r.dtype} | {r.objective} | {r.clock} |"
        f" {r.weights / 1e9:.2f} B | {r.weights_removed / r.weights:.0%} |"
        f" {r.seconds:.0f} s | {r.floor:.0f} s | {r.ratio:.2f}x |"
        f" {r.peak / 2**30:.2f} GiB | {r.bound / 2**30:.2f} GiB |"
        for r in results
    ]
    return HEAD.format(notes=notes) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
