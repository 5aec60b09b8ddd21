"""Measure what `rotate` brings where norms stay: weights, bytes, error, and time on the processor.

``python benchmarks/norms.py`` exports skipless models of two blocks with RMSNorm (GQA, a gated FFN)
and with LayerNorm (MHA, an MLP, biases), folds them with the defaults, and times them in pairs,
against their folds and against copies of themselves (A/A). It writes ``docs/norms.json`` and a
table of it, ``docs/norms.md``. Rows of other shapes stay.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twin import twin

import onnx_fold
from onnx_fold.models.config import SkiplessConfig
from onnx_fold.models.export import export
from onnx_fold.runtime.environment import environment

ROOT = Path(__file__).parents[1]
WIDTHS = 512, 1024, 2048, 4096
LENGTH = 128

KEY = ("norm", "width", "dtype", "objective")
"""What tells one row from another."""

HEAD = """# What norms that stay leave to gain

`benchmarks/norms.py` exports skipless models of two blocks that keep their norms, folds them
(strategy `rotate`), and times them in pairs on one thread: {length} tokens in prefill, decode at
batch 1 behind {length} others. *for* is the objective: speed, the default, or size. *d²* is what
each stream loses, in the mean: (1 - 1/b)/2 in b panels, 0.375 in four, 0.438 in eight. *error* is
the folded model's own over the original's, of whole outputs, the worst of them; blank where streams
were checked alone, as both models did not fit in memory. *read* is the ratio of the bytes that a
token reads: what decode can gain. In brackets are the 95 % interval and the pairs and loads that it
is from, resampled by load. *A/A* is the model against a copy of itself, with the same options: a
speed-up within that interval is none.

{made}

| norm | d | type | for | streams | d² | error | bytes | read | prefill | A/A | decode | A/A |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
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
        "command": shlex.join(["python", "benchmarks/norms.py", *sys.argv[1:]]),
        "phases": phases(times),
        "twin": phases(copied),
    }


def phases(report: onnx_fold.BenchReport) -> dict[str, list[float]]:
    """What was measured, by the name of the phase."""
    return {
        each.name: [each.speedup, each.low, each.high, each.pairs, each.loads]
        for each in report.phases
    }


def row(each: dict[str, Any]) -> str:
    """A line of the table."""
    name = {"rms": "RMSNorm", "layer": "LayerNorm"}[each["norm"]]
    squares = each["weights"] / max(1, each["streams"]) / each["width"] ** 2
    names = [(phase, kind) for phase in ("prefill", "decode") for kind in ("phases", "twin")]
    times = (told(*each[kind][phase]) for phase, kind in names)
    cells = (name, each["width"], each["dtype"], each["objective"], each["streams"])
    cells += (f"{squares:.3f}",)
    cells += ("" if each["error"] is None else f"{each['error']:.2f}",)
    cells += (f"{each['bytes']:.3f}x", f"{each['read']:.3f}x", *times)
    return "| " + " | ".join(map(str, cells)) + " |\n"


def told(speedup: float, low: float, high: float, pairs: int, loads: int) -> str:
    """A speed-up with its interval, and from how many pairs and loads it is."""
    return f"{speedup:.3f}x ({low:.2f}-{high:.2f}, {pairs} pairs in {loads} loads)"


def made(rows: Iterable[dict[str, Any]], found: dict[str, Any]) -> str:
    """The machine of the last run, and the commands that made these rows."""
    commands = dict.fromkeys(each["command"] for each in rows)
    versions = f"ONNX Runtime {found['versions']['onnxruntime']}, {found['date'][:10]}"
    machine = f"{found['machine']['cpu']}, {versions}"
    return "\n".join([f"{machine}.\n", *(f"- `{each}`" for each in commands)])


def main() -> None:
    """Measure, and write what there is after each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norms", nargs="+", default=["rms", "layer"])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--objective", choices=["speed", "size"], default="speed")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    path = ROOT / "docs" / "norms.json"
    held = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    rows = {tuple(each[name] for name in KEY): each for each in held["rows"]}
    for norm in args.norms:
        for width in args.widths:
            key = norm, width, args.dtype, args.objective
            rows[key] = measure(norm, width, args.dtype, args)
            found = [rows[key] for key in sorted(rows, key=lambda key: (key[0] != "rms", *key[1:]))]
            now = environment("cpu")
            path.write_text(json.dumps({"rows": found, "environment": now}, indent=1))
            text = HEAD.format(length=LENGTH, made=made(found, now)) + "".join(map(row, found))
            path.with_suffix(".md").write_text(text)
            print(row(rows[key]), end="", flush=True)


if __name__ == "__main__":
    main()
