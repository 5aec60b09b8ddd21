"""Compare with the other tools that optimise ONNX models, and combine with them.

``python benchmarks/peers.py --output docs/peers.json`` exports presets with a KV cache (dynamo
exporter), rewrites each with onnxsim, onnxslim, ONNX Runtime's transformer optimizer, onnxscript's
optimizer and onnx-fold, and with onnx-fold before and after each of the others. Every file is
weighed, run against the exported model and timed against it in pairs. It writes the JSON file, and
a table of all that it holds, ``docs/peers.md``.

Each tool is called as its documentation does, with its own defaults, in a process of its own. ONNX
Runtime's optimizer has to be told a kind of model: ``gpt2``, its decoder. A tool that is not
installed or that fails gets a row with what it said.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

import onnx_fold
from onnx_fold.base.threads import processors
from onnx_fold.engine.cost import cost
from onnx_fold.errors import OnnxFoldError
from onnx_fold.files.write import write
from onnx_fold.models.export import export
from onnx_fold.speed.timing import Phase

MODELS = ("small-gqa", "tinyllama-1.1b:2")
PACKAGES = ("onnxsim", "onnxslim", "onnxruntime", "onnxscript", "onnx-fold")

HEAD = """# Next to other tools, and together with them

`python benchmarks/peers.py --output docs/peers.json` exports presets with a KV cache, rewrites them
with each tool and with onnx-fold before and after it, and writes this table.

Tools have their defaults; ONNX Runtime's is its transformer optimizer for the kind `gpt2`. All
files are run by ONNX Runtime with all its graph optimisations, so what a tool does is on top of
those. The difference is that of the logits from the exported model's, relative, at its worst over
the inputs of `onnx-fold verify`. Speed-ups are medians over paired runs against the exported model,
at batch 1; in brackets is their 95 % interval, resampled by load; *pairs* are those of prefill and
decode, in so many loads of both models. The exported model against itself shows what chance does.
"""


# --- The tools ------------------------------------------------------------------------------------


def with_onnxsim(source: Path, target: Path) -> None:
    """``onnxsim model.onnx output.onnx``."""
    from onnxsim import simplify

    simplified, is_same = simplify(onnx.load(source))
    if not is_same:
        raise ValueError("onnxsim's own check failed")
    write(ir.from_proto(simplified), target)


def with_onnxslim(source: Path, target: Path) -> None:
    """``onnxslim model.onnx output.onnx``."""
    from onnxslim import slim

    write(ir.from_proto(slim(str(source))), target)


def with_onnxruntime(source: Path, target: Path) -> None:
    """``python -m onnxruntime.transformers.optimizer --model_type gpt2``."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimized = optimize_model(str(source), model_type="gpt2")
    optimized.topological_sort()  # as its method for saving does
    write(ir.from_proto(optimized.model), target)


def with_onnxscript(source: Path, target: Path) -> None:
    """``onnxscript.optimizer.optimize(model)``."""
    from onnxscript.optimizer import optimize

    write(optimize(ir.load(source)), target)


def with_onnx_fold(source: Path, target: Path) -> None:
    """``onnx-fold fold model.onnx -o output.onnx``; the comparison here is the check."""
    onnx_fold.fold(source, verify=False, objective="size").save(target)


FOLD = "onnx-fold"
TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "onnxsim": with_onnxsim,
    "onnxslim": with_onnxslim,
    "onnxruntime": with_onnxruntime,
    "onnxscript": with_onnxscript,
    FOLD: with_onnx_fold,
}


def chains(tools: Iterable[str]) -> list[tuple[str, ...]]:
    """No tool, each of ``tools``, and onnx-fold before and after each of the others."""
    tools = list(tools)
    others = [tool for tool in tools if tool != FOLD] if FOLD in tools else []
    combined = [chain for tool in others for chain in ((FOLD, tool), (tool, FOLD))]
    return [(), *((tool,) for tool in tools), *combined]


class ToolError(Exception):
    """A tool is missing or failed; the message is one line."""


def rewrite(source: Path, chain: Sequence[str], folder: Path) -> Path:
    """Return ``source`` after each tool of ``chain``; what is there from before is used again.

    Raises:
        ToolError: One of them is missing or failed.
    """
    for tool in chain:
        target = folder / f"{source.stem}+{tool}.onnx"
        if not target.exists():
            _run(tool, source, target)
        source = target
    return source


def _run(tool: str, source: Path, target: Path) -> None:
    command = [sys.executable, __file__, "--apply", tool, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        said = done.stderr.split("\n")
        last = next((line for line in reversed(said) if line.strip()), "")
        raise ToolError(f"{tool}: {last.strip() or f'ended with {done.returncode}'}")


# --- Measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerResult:
    """One model after some tools.

    Attributes:
        model: Preset, and its number of blocks if it is not the preset's own.
        tools: The tools, in the order in which they ran; none for the exported model.
        weights: Number of weights.
        nbytes: Their bytes.
        operators: Number of nodes.
        new_operators: How many there are of the operators that the exported model has none of.
        difference: Relative difference of the logits from the exported model's.
        phases: Times next to the exported model's.
        error: What went wrong, in one line.
    """

    model: str
    tools: tuple[str, ...]
    weights: int = 0
    nbytes: int = 0
    operators: int = 0
    new_operators: dict[str, int] = field(default_factory=dict)
    difference: float = 0.0
    phases: list[Phase] = field(default_factory=list)
    error: str = ""


def measure(
    model: str, tools: Sequence[str], source: Path, folder: Path, **bench: Any
) -> PeerResult:
    """Run ``tools`` on ``source``, the export of ``model``, and compare the result with it."""
    try:
        return _compare(model, tools, source, rewrite(source, tools, folder), bench)
    except (OnnxFoldError, ToolError) as error:
        return PeerResult(model, tuple(tools), error=" ".join(str(error).split()))


def _compare(
    model: str, tools: Sequence[str], source: Path, path: Path, bench: dict[str, Any]
) -> PeerResult:
    original, rewritten = ir.load(source), ir.load(path)
    size = cost(rewritten)
    known = {node.op_type for node in original.graph.all_nodes()}
    new = Counter(node.op_type for node in rewritten.graph.all_nodes() if node.op_type not in known)
    parity = onnx_fold.verify(source, path, provider="cpu", reference=False)
    logits = [output for output in parity.outputs if output.name == "logits"]
    if not logits:
        raise ToolError(parity.reason)
    speed = onnx_fold.bench(source, path, **bench)
    return PeerResult(
        *(model, tuple(tools), size.weights, size.bytes, size.nodes),
        dict(sorted(new.items())),
        logits[0].relative_error,
        speed.phases,
    )


def exported(model: str, folder: Path) -> Path:
    """The export of ``"preset"`` or ``"preset:layers"`` with a cache, unless it is there."""
    preset, _, layers = model.partition(":")
    path = folder / f"{preset}-{layers}.onnx"
    if path.exists():
        return path
    return export(preset, path, layers=int(layers) if layers else None, kv_cache=True)


# --- The command line -----------------------------------------------------------------------------


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--apply", nargs=3, metavar=("TOOL", "MODEL", "OUTPUT"))
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets, or preset:layers")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--folder", type=Path, default=Path(), help="where models are kept")
    parser.add_argument("--prefill", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=30, help="pairs of prefill runs")
    parser.add_argument("--loads", type=int, default=4, help="loads of both models")
    parser.add_argument("--tokens", type=int, default=64, help="pairs of decode steps")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    if given.apply is not None:
        tool, source, target = given.apply
        apply(tool, Path(source), Path(target))
        return
    timing = {name: getattr(given, name) for name in ("prefill", "repeats", "tokens", "loads")}
    results = []
    for model in given.models:
        source = exported(model, given.folder)
        for tools in chains(given.tools):
            result = measure(model, tools, source, given.folder, batch=1, **timing)
            results.append(result)
            gc.collect()  # the models of the last comparison
            print(f"{model}, {row(result)}", flush=True)
            if given.output is not None:
                save(given.output, results)


def apply(tool: str, source: Path, target: Path) -> None:
    """Run one tool; end with its error in one line."""
    try:
        TOOLS[tool](source, target)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


def save(path: Path, results: Sequence[PeerResult]) -> None:
    """Add ``results`` to those in ``path``, and write all of them as tables beside it."""
    old = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    known = {(each["model"], *each["tools"]): each for each in old}
    for result in results:
        known[result.model, *result.tools] = asdict(result)
    data = {"machine": machine(), "versions": versions(), "results": list(known.values())}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    data = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(document(data), encoding="utf-8")


def machine() -> str:
    """What ran the models, as people say it."""
    count = processors()
    return f"{count} CPU core{'s' if count > 1 else ''}, {platform.machine()}"


def versions() -> dict[str, str]:
    """The version of each package that is installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def document(data: dict[str, Any]) -> str:
    """What a JSON file holds as Markdown, a table for each model."""
    parts = [HEAD, f"{data['machine']}; {', '.join(map(' '.join, data['versions'].items()))}.\n"]
    results = [_from_json(each) for each in data["results"]]
    for model in dict.fromkeys(result.model for result in results):
        parts.append(f"## {model}\n")
        parts.append(
            "| tools | weights | bytes | operators | new operators | difference | prefill | decode"
            " | pairs |\n|---|---|---|---|---|---|---|---|---|"
        )
        parts += [f"| {row(result)} |" for result in results if result.model == model]
        parts.append("")
    return "\n".join(parts)


def _from_json(each: dict[str, Any]) -> PeerResult:
    phases = [Phase.from_dict(phase) for phase in each["phases"]]
    return PeerResult(**each | {"tools": tuple(each["tools"]), "phases": phases})


def row(result: PeerResult) -> str:
    """One result as the cells of a row."""
    name = ", then ".join(result.tools) or "as exported"
    if result.error:
        return " | ".join([name, *5 * ["-"], result.error.replace("|", "/"), "-", "-"])
    new = ", ".join(f"{count} {name}" for name, count in result.new_operators.items())
    cells = [
        *(name, f"{result.weights:,}", f"{result.nbytes / 1e6:.1f} MB", str(result.operators)),
        *(new or "-", f"{result.difference:.1e}"),
        *(_speed(result, phase) for phase in ("prefill", "decode")),
        f"{', '.join(str(p.pairs) for p in result.phases)} in {result.phases[0].loads}",
    ]
    return " | ".join(cells)


def _speed(result: PeerResult, name: str) -> str:
    phases = [phase for phase in result.phases if phase.name == name]
    return ", ".join(f"{p.speedup:.3f}x ({p.low:.2f}-{p.high:.2f})" for p in phases) or "-"


if __name__ == "__main__":
    main()
