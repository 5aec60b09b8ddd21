"""Measure what `rotate` brings where norms stay: weights, bytes, error, and time on the processor.

``python benchmarks/norms.py`` exports skipless models of two blocks with RMSNorm (GQA, a gated FFN)
and with LayerNorm (MHA, an MLP, biases), folds them with the defaults, and times them in pairs,
against their folds and against copies of themselves (A/A). It writes ``docs/norms.json`` and
tables of it, ``docs/norms.md``. Rows of other shapes stay.

``python benchmarks/norms.py --errors --widths 512 1024`` times nothing, and tells the errors in
each type, and what rounding the weights has of them.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from twin import twin

import onnx_fold
from onnx_fold.check.judge import OutputParity
from onnx_fold.graph.widen import widen
from onnx_fold.models.config import SkiplessConfig
from onnx_fold.models.export import export
from onnx_fold.runtime.environment import environment

ROOT = Path(__file__).parents[1]
WIDTHS = 512, 1024, 2048, 4096
DTYPES = "float32", "float16", "bfloat16"
LENGTH = 128

KEY = ("norm", "width", "dtype", "objective")
"""What tells one row from another."""

ERRORS_KEY = ("norm", "width", "dtype", "emulated")
"""The same of the errors."""

TOKENS = {"batch": 1, "sequence_length": LENGTH, "past_sequence_length": 0}
"""What errors are measured on."""

OUTPUTS = ("present.0.value", "logits")
"""Outputs whose errors are told: what lies behind one stream, and behind all."""

NAMES = {"rms": "RMSNorm", "layer": "LayerNorm"}

HEAD = """# What norms that stay leave to gain

`benchmarks/norms.py` exports skipless models of two blocks that keep their norms, folds them
(strategy `rotate`), and times them in pairs on one thread: {length} tokens in prefill, decode at
batch 1 behind {length} others. *for* is the objective: speed, the default, or size. *d²* is what
each stream loses, in the mean: (1 - 1/b)/2 in b panels, 0.375 in four, 0.438 in eight. *error* is
the folded model's own over the original's, of whole outputs, the worst of them; blank where streams
were checked alone, as both models did not fit in memory. *read* is the ratio of the bytes that a
token reads: what decode can gain. In brackets is the 95 % interval, resampled by load; *pairs* are
those of each of the four, in so many loads of both models. *A/A* is the model against a copy of
itself, with the same options: a speed-up within that interval is none.

{made}

| norm | d | type | for | streams | d² | error | bytes | read | prefill | A/A | decode | A/A \
| pairs |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


ERRORS = """
## Errors by type

All five streams folded in four panels (`--strategy rotate --force`), on {length} tokens: the
relative error of the original / of the folded model where only its weights are rounded / of the
folded model as it is. *ratio* is the last over the first, and *by weights* what it
would be if the folded model rounded its weights and, beside that, what the original rounds. V is
that of the first block, behind one stream; the logits are behind five. *worst* is the largest ratio
of an output. *rounded* is every operator's result, or what ONNX Runtime rounds as it runs the model
on a processor; what comes of that is told in [accuracy](accuracy.md).

{made}

| norm | d | type | rounded | V | by weights | ratio | logits | by weights | ratio | worst |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def shape(norm: str, width: int) -> SkiplessConfig:
    """Two blocks, with heads of 64 channels."""
    heads = width // 64
    common: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": 64,
        "init": "gaussian",
        "norm": norm,
        "max_position_embeddings": 8 * LENGTH,
    }
    if norm == "rms":
        kv_heads = max(1, heads // 4)
        own = {"num_key_value_heads": kv_heads, "intermediate_size": 7 * width // 2}
        return SkiplessConfig(**common, **own)
    own = {"num_key_value_heads": heads, "intermediate_size": 4 * width}
    mlp = {"ffn": "mlp", "activation": "gelu", "bias": True, "positions": "learned"}
    return SkiplessConfig(**common, **own, **mlp)


def measure(norm: str, width: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "folded.onnx"
        export(shape(norm, width), source, dtype=dtype, kv_cache=True)
        report = onnx_fold.fold(
            source, output=target, provider="cpu", objective=args.objective
        ).report
        assert report.verification is not None
        outputs = report.verification.outputs
        options = {"tokens": args.tokens, "repeats": args.repeats, "seconds": args.seconds}
        options |= {"threads": 1, "provider": "cpu", "prefill": LENGTH}
        times = onnx_fold.bench(source, target, **options)
        copied = onnx_fold.bench(source, twin(source), **options)
    return {
        "norm": norm,
        "width": width,
        "dtype": dtype,
        "objective": args.objective,
        "streams": len(report.folded),
        "weights": report.saving.weights,
        "error": max(filter(None, (each.ratio for each in outputs)), default=None),
        "bytes": times.bytes_ratio,
        "read": times.read_ratio,
        "command": command(),
        "phases": phases(times),
        "twin": phases(copied),
    }


def errors(norm: str, width: int, dtype: str) -> list[dict[str, Any]]:
    """The rows of errors of one model: as ONNX Runtime runs it, and with every result rounded."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "folded.onnx"
        export(shape(norm, width), source, dtype=dtype, kv_cache=True)
        onnx_fold.fold(
            source, output=target, strategy="rotate", force=True, verify=False, provider="cpu"
        )
        to = ir.DataType.DOUBLE if dtype == "float32" else ir.DataType.FLOAT
        models = [widen(ir.load(path), to) for path in (source, target)]
        stored = compared(*models, reference=False)
        rows = []
        for emulated in {"float32": [False], "bfloat16": [True]}.get(dtype, [False, True]):
            found = compared(source, target, emulate=emulated)
            rows.append(
                {
                    "norm": norm,
                    "width": width,
                    "dtype": dtype,
                    "emulated": emulated,
                    "outputs": {
                        name: [
                            found[name].error_original,
                            stored[name].relative_error,
                            found[name].error_folded,
                        ]
                        for name in OUTPUTS
                    },
                    "worst": max(each.ratio or 0.0 for each in found.values()),
                    "command": command(),
                }
            )
        return rows


def compared(original: Any, folded: Any, **options: Any) -> dict[str, OutputParity]:
    """How far each output of ``folded`` is from that of ``original``, by name."""
    report = onnx_fold.verify(original, folded, provider="cpu", shapes=TOKENS, **options)
    return {each.name: each for each in report.outputs}


def command() -> str:
    """The command that runs."""
    return shlex.join(["python", "benchmarks/norms.py", *sys.argv[1:]])


def phases(report: onnx_fold.BenchReport) -> dict[str, list[float]]:
    """What was measured, by the name of the phase."""
    return {
        each.name: [each.speedup, each.low, each.high, each.pairs, each.loads]
        for each in report.phases
    }


def row(each: dict[str, Any]) -> str:
    """A line of the table."""
    squares = each["weights"] / max(1, each["streams"]) / each["width"] ** 2
    names = [(phase, kind) for phase in ("prefill", "decode") for kind in ("phases", "twin")]
    times = [each[kind][phase] for phase, kind in names]
    cells = (NAMES[each["norm"]], each["width"], each["dtype"], each["objective"], each["streams"])
    cells += (f"{squares:.3f}",)
    cells += ("" if each["error"] is None else f"{each['error']:.2f}",)
    cells += (f"{each['bytes']:.3f}x", f"{each['read']:.3f}x")
    cells += tuple(f"{speedup:.3f}x ({low:.2f}-{high:.2f})" for speedup, low, high, *_ in times)
    pairs = ", ".join(str(pairs) for *_, pairs, _ in times)
    return line((*cells, f"{pairs} in {times[0][-1]}"))


def errors_row(each: dict[str, Any]) -> str:
    """A line of the table of errors."""
    cells: list[Any] = [NAMES[each["norm"]], each["width"], each["dtype"]]
    cells.append("every result" if each["emulated"] else "as run")
    for name in OUTPUTS:
        original, stored, folded = each["outputs"][name]
        cells.append(f"{original:.1e} / {stored:.1e} / {folded:.1e}")
        cells.append(f"{math.hypot(original, stored) / original:.2f}")
        cells.append(f"{folded / original:.2f}")
    return line([*cells, f"{each['worst']:.2f}"])


def line(cells: Iterable[Any]) -> str:
    """``cells`` as a line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |\n"


def made(rows: Iterable[dict[str, Any]], found: dict[str, Any]) -> str:
    """The machine of the last run, and the commands that made these rows."""
    versions = f"ONNX Runtime {found['versions']['onnxruntime']}, {found['date'][:10]}"
    machine = f"{found['machine']['cpu']}, {versions}"
    return f"{machine}.\n\n{commands(rows)}"


def commands(rows: Iterable[dict[str, Any]]) -> str:
    """The commands that made ``rows``."""
    return "\n".join(f"- `{each}`" for each in dict.fromkeys(each["command"] for each in rows))


def main() -> None:
    """Measure, and write what there is after each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norms", nargs="+", default=["rms", "layer"])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--errors", action="store_true", help="errors in each type, no times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--objective", choices=["speed", "size"], default="speed")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    path = ROOT / "docs" / "norms.json"
    held: dict[str, Any] = {"rows": [], "errors": [], "environment": environment("cpu")}
    if path.is_file():
        held |= json.loads(path.read_text())
    for norm in args.norms:
        for width in args.widths:
            if args.errors:
                rows = [row for dtype in DTYPES for row in errors(norm, width, dtype)]
                held["errors"] = merged(held["errors"], rows, ERRORS_KEY)
                print(*map(errors_row, rows), sep="", end="", flush=True)
            else:
                rows = [measure(norm, width, args.dtype, args)]
                held["rows"] = merged(held["rows"], rows, KEY)
                held["environment"] = environment("cpu")
                print(*map(row, rows), sep="", end="", flush=True)
            write(path, held)


def merged(
    held: list[dict[str, Any]], rows: list[dict[str, Any]], key: tuple[str, ...]
) -> list[dict[str, Any]]:
    """``held`` with ``rows`` in the place of those of the same ``key``, RMSNorm first."""
    found = {tuple(each[name] for name in key): each for each in [*held, *rows]}
    return [found[each] for each in sorted(found, key=lambda key: (key[0] != "rms", *key[1:]))]


def write(path: Path, held: dict[str, Any]) -> None:
    """Write what there is, and the page."""
    path.write_text(json.dumps(held, indent=1))
    text = HEAD.format(length=LENGTH, made=made(held["rows"], held["environment"]))
    text += "".join(map(row, held["rows"]))
    if held["errors"]:
        text += ERRORS.format(length=LENGTH, made=commands(held["errors"]))
        text += "".join(map(errors_row, held["errors"]))
    path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
