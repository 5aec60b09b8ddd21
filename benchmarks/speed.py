"""Check a machine from end to end: export, fold, verify and time models on CUDA, or on the CPU.

From a bare machine with an NVIDIA driver::

    pip install '.[cuda,torch,bench]'
    python benchmarks/speed.py --minutes 25

and on the processor, with ``.[cpu,torch,bench]`` and ``--provider cpu``. Each model is exported
with a KV cache, folded, verified and timed there, on CUDA with and without CUDA graphs: against its
fold, and with the same options against a copy of itself (A/A), which shows what the machine makes
of no difference. Every step runs in a process beside this one: a step that fails, hangs or brings
its process down is noted with its error, and the next one goes on. ``docs/speed-cuda.json`` is
written after every step, with tables of all that it holds (``.md``) and pictures (``.svg``), so
that a run that is killed keeps what it has; steps for which no time is left are noted as skipped.
What the file has of other models and types stays, so that a check can be made in parts.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from twin import remove, twin

import onnx_fold
from onnx_fold import BenchReport
from onnx_fold.algebra.device import HOST, find_device
from onnx_fold.base.arguments import several
from onnx_fold.errors import MissingExtraError, UsageError
from onnx_fold.models import presets
from onnx_fold.models.export import export
from onnx_fold.runtime import sessions
from onnx_fold.runtime.environment import environment, gpu_memory_used
from onnx_fold.speed.plot import plot
from onnx_fold.speed.timing import decimals

TRAINED = "char-gqa"
"""The model that the package brings along, trained, in float32."""

LARGE = ("mistral-7b", "pythia-6.9b", "tinyllama-1.1b", "pythia-1.4b")
"""The models that are drawn, and run with each length; the others with the first one."""

ALSO_ON_CPU = ("tinyllama-1.1b", "float16")
"""The model that is also folded by the processor, to compare the time."""

KNOWN = (*LARGE, *(name for name in presets.PRESETS if name not in LARGE), TRAINED)
"""All models, in the order in which they are measured and listed."""

DEFAULTS: dict[str, dict[str, list[Any]]] = {
    "dtypes": {"cuda": ["float32", "float16", "bfloat16"], "cpu": ["float32"]},
    "batch": {"cuda": [1, 8, 64], "cpu": [1, 2]},
    "prefill": {"cuda": [128, 2048], "cpu": [128]},
}

ROOT = Path(__file__).parents[1]

HEAD = """# How fast folded models are on {title}

`benchmarks/speed.py` exports models with a KV cache, folds them (with `--target {provider}`),
verifies them and times them in pairs, as `onnx-fold bench` does: a prefill, and a loop of decode
steps from a cache of that length, which stays on the device. [{name}.json]({name}.json) has the
whole reports. Times are medians; in brackets is the 95 % interval of the speed-up, from so many
*pairs* in so many *loads* of both models, resampled by load. *A/A* is the original against a copy
of itself, a second file of the same bytes, with the same options: a speed-up within that interval
is none; rows without it are older than this column. *bytes* is the ratio of the bytes of all
weights; *read* that of the bytes that a token reads, without the table of the embedding: about what
decode at batch 1 can gain. It may be more, as a product that goes takes its overhead along. Where
no time of a fold is given, other work was done beside it.

"""

TWIN = "bench twin"
"""The step that times a model against its own copy."""


@dataclass(frozen=True)
class Case:
    """A model of the check.

    Attributes:
        preset: Name of the shape, or ``TRAINED``.
        layers: Number of blocks, None for all that the trained model has.
        dtype: Storage type.
        folder: Where its files are.
    """

    preset: str
    layers: int | None
    dtype: str
    folder: Path

    @property
    def source(self) -> Path:
        """The model."""
        return self.folder / f"{self.preset}-{self.layers}-{self.dtype}.onnx"

    @property
    def target(self) -> Path:
        """The folded model."""
        return self.folder / f"{self.preset}-{self.layers}-{self.dtype}-folded.onnx"

    def remove(self) -> None:
        """Delete the files."""
        for path in self.folder.glob(f"{self.preset}-{self.layers}-{self.dtype}*"):
            path.unlink()
        remove(self.source)


# --- The steps ------------------------------------------------------------------------------------


def start(case: Case, provider: str, device: str) -> dict[str, Any]:
    """See whether sessions run on ``provider``, and torch on ``device``: else nothing will."""
    if device != "cpu" and find_device(device) is HOST:
        raise UsageError(f"torch cannot use {device}; --device cpu folds on the processor")
    with resources.as_file(resources.files("onnx_fold.models") / f"{TRAINED}.onnx") as path:
        return {"placement": sessions.placement(sessions.session(path, provider))}


def export_model(case: Case) -> dict[str, Any]:
    """Write the model, unless it is there."""
    if not case.source.exists() and case.preset == TRAINED:
        data = resources.files("onnx_fold.models") / f"{TRAINED}.onnx"
        case.source.write_bytes(data.read_bytes())
    elif not case.source.exists():
        dtype: Any = case.dtype
        export(case.preset, case.source, layers=case.layers, dtype=dtype, kv_cache=True)
    return {"bytes": sum(path.stat().st_size for path in case.folder.glob(f"{case.source.name}*"))}


def fold_model(case: Case, device: str, target: str) -> dict[str, Any]:
    """Fold the model on ``device`` and write it; ``seconds`` leave out what starts the device."""
    find_device(device)
    started = time.perf_counter()
    result = onnx_fold.fold(
        case.source, output=case.target, device=device, target=target, verify=False
    )
    seconds = time.perf_counter() - started
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    return {"device": device, "seconds": seconds, **result.report.to_dict()}


def place_nodes(case: Case, provider: str) -> dict[str, Any]:
    """Say which provider runs what."""
    return {
        "original": sessions.placement(sessions.session(case.source, provider)),
        "folded": sessions.placement(sessions.session(case.target, provider)),
    }


def verify_models(case: Case, provider: str) -> dict[str, Any]:
    """Compare the folded model with the original."""
    return onnx_fold.verify(case.source, case.target, provider=provider).to_dict()


def bench_models(case: Case, options: Mapping[str, Any]) -> dict[str, Any]:
    """Time both models."""
    return onnx_fold.bench(case.source, case.target, **options).to_dict()


def bench_twins(case: Case, options: Mapping[str, Any]) -> dict[str, Any]:
    """Time the model against a copy of itself."""
    try:
        return onnx_fold.bench(case.source, twin(case.source), **options).to_dict()
    finally:
        remove(case.source)


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "start": start,
    "export": export_model,
    "fold": fold_model,
    "fold on cpu": fold_model,
    "placement": place_nodes,
    "verify": verify_models,
    "bench": bench_models,
    TWIN: bench_twins,
}


def plan(case: Case, given: argparse.Namespace) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The steps of one model, with their arguments; what is most telling comes first."""
    yield "export", ()
    if given.device != "cpu" and (case.preset, case.dtype) == ALSO_ON_CPU:
        yield "fold on cpu", ("cpu", given.provider)
    yield "fold", (given.device, given.provider)
    yield "placement", (given.provider,)
    yield "verify", (given.provider,)
    lengths = lengths_of(case.preset, given)
    options = {
        "provider": given.provider,
        "batch": given.batch,
        "prefill": lengths,
        "tokens": given.tokens,
        "repeats": given.repeats,
        "seconds": given.seconds,
    }
    asked = [options]
    if given.provider == "cuda":
        asked += [{**options, "prefill": [min(lengths)], "cuda_graph": True}]
    for each in asked:
        yield "bench", (each,)
        yield TWIN, (each,)


def lengths_of(preset: str, given: argparse.Namespace) -> list[int]:
    """The prompts to time; a table of positions must have room for them and what is decoded."""
    wanted = given.prefill if preset in LARGE else given.prefill[:1]
    shape = None if preset == TRAINED else presets.config(preset)
    if shape is not None and shape.positions == "learned":
        room = max(1, shape.max_position_embeddings - given.tokens)
        wanted = [min(length, room) for length in wanted]
    return list(dict.fromkeys(wanted))


# --- The process that runs them -------------------------------------------------------------------


class Worker:
    """A process that runs steps, and that is replaced when one of them goes wrong."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def run(self, step: str, case: Case, arguments: Sequence[Any], seconds: float) -> Any:
        """Return what the step returns.

        Raises:
            TimeoutError: It took longer than ``seconds``.
            RuntimeError: It raised an error, whose text this is, or its process died.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((step, case, arguments))
            if not self._pipe.poll(seconds):
                self._process.kill()
                raise TimeoutError(f"stopped after {seconds:.0f} s")
            result, error = self._pipe.recv()
        except (EOFError, ConnectionError):
            process = self._process
            self.stop()
            raise RuntimeError(f"the process died, exit code {process.exitcode}") from None
        except BaseException:
            self.stop()
            raise
        if error:
            self.stop()  # an error of CUDA stays with the process
            raise RuntimeError(error)
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(10)
            self._process.kill()
            self._process.join()
            self._process = None


def serve(pipe: Connection) -> None:
    """Run the steps that come through ``pipe``, and send back a result or an error's text."""
    while True:
        try:
            step, case, arguments = pipe.recv()
        except EOFError:
            return
        result, text = None, ""
        try:
            result = STEPS[step](case, *arguments)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".replace(f"{case.folder}/", "")
        gc.collect()  # sessions hold memory of the GPU
        pipe.send((result, text))


# --- The run --------------------------------------------------------------------------------------


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Run all steps of all models, and write ``given.output`` after each.

    Where CUDA does not start at all, nothing else is tried.

    Returns:
        The environment, the options, and a list of results.
    """
    deadline = time.monotonic() + 60 * given.minutes
    options = {
        name: value for name, value in vars(given).items() if name not in ("output", "folder")
    }
    data: dict[str, Any] = {
        "environment": environment(given.provider),
        "options": options,
        "results": [],
    }
    kept = others(given)
    worker = Worker()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(given.folder or temporary)
            trained = Case(TRAINED, None, "float32", folder)
            plans = [(trained, [("start", (given.provider, given.device))])]
            plans += [(case, [*plan(case, given)]) for case in cases(given, folder)]
            for case, steps in plans:
                chosen = [each for each in steps if each[0] in given.steps]
                for result in run_case(case, chosen, given, worker, deadline):
                    data["results"].append(result)
                    save(given.output, {**data, "results": [*data["results"], *kept]})
                if given.folder is None:
                    case.remove()
                if any("error" in each for each in data["results"] if each["step"] == "start"):
                    break
    finally:
        worker.stop()
    return data


def cases(given: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """The models, at most so deep as asked for."""
    for preset in given.presets:
        if preset == TRAINED:
            yield Case(preset, None, "float32", folder)
            continue
        layers = min(given.layers, presets.config(preset).num_hidden_layers)
        for dtype in given.dtypes:
            yield Case(preset, layers, dtype, folder)


def run_case(
    case: Case,
    steps: Sequence[tuple[str, tuple[Any, ...]]],
    given: argparse.Namespace,
    worker: Worker,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """Run ``steps`` of one model; without an export or a fold the rest is skipped."""
    missing = ""
    for step, arguments in steps:
        seconds = min(deadline - time.monotonic(), 60 * given.step_minutes)
        name = {"preset": case.preset, "layers": case.layers, "dtype": case.dtype, "step": step}
        if step in ("bench", TWIN):
            name |= {"asked": arguments[0]}
        outcome = (
            {"skipped": missing} if missing else attempt(worker, step, case, arguments, seconds)
        )
        if step in ("export", "fold") and "result" not in outcome:
            missing = missing or f"there is no {step}"
        result = {**name, **outcome}
        print(describe(result), flush=True)
        yield result


def attempt(
    worker: Worker, step: str, case: Case, arguments: Sequence[Any], seconds: float
) -> dict[str, Any]:
    """Run one step in ``seconds``: what it took, and its result or its error, or why it was not."""
    if seconds <= 0:
        return {"skipped": "no time was left"}
    started = time.monotonic()
    outcome: dict[str, Any] = {}
    try:
        outcome["result"] = worker.run(step, case, arguments, seconds)
        if not outcome["result"].get("ok", True):
            outcome["error"] = outcome["result"]["reason"]
    except (RuntimeError, TimeoutError) as error:
        outcome["error"] = str(error)
    took = time.monotonic() - started
    return {**outcome, "step_seconds": took, "gpu_memory_used_mib": gpu_memory_used()}


def others(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What the file has of models, and of steps, that are not measured now."""
    if not given.output.exists():
        return []
    results = json.loads(given.output.read_text(encoding="utf-8"))["results"]
    now = {(case.preset, case.layers, case.dtype) for case in cases(given, Path())}
    return [
        each
        for each in results
        if each["step"] not in given.steps
        or (each["step"] != "start" and (each["preset"], each["layers"], each["dtype"]) not in now)
    ]


def save(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` to ``path`` at once, and its table beside it."""
    data["results"].sort(key=lambda each: (each["step"] != "start", KNOWN.index(each["preset"])))
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
    path.with_suffix(".md").write_text(page(data, path.stem, draw(data, path)), encoding="utf-8")


def draw(data: Mapping[str, Any], path: Path) -> list[str]:
    """Draw the large models beside ``path``, and return the names of the pictures."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in data["results"]:
        if each["step"] == "bench" and "result" in each and each["preset"] in LARGE:
            graph = "-graph" if each["asked"].get("cuda_graph") else ""
            name = f"{path.stem}-{each['preset']}-{each['layers']}-{each['dtype']}{graph}.svg"
            groups.setdefault(name, []).append(each["result"])
    try:
        for name, reports in groups.items():
            phases = [phase for report in reports for phase in report["phases"]]
            plot(BenchReport.from_dict({**reports[0], "phases": phases}), path.with_name(name))
    except MissingExtraError as error:
        print(f"no pictures: {error}")
        return []
    return list(groups)


# --- The page -------------------------------------------------------------------------------------


def describe(result: Mapping[str, Any]) -> str:
    """A line for the terminal and for the list of what did not work."""
    asked = result.get("asked", {})
    which = [result["preset"], result["dtype"], result["step"]]
    for name in (name for name in ("batch", "prefill") if name in asked):
        which += [f"{name} {' '.join(map(str, asked[name]))}"]
    which += ["CUDA graph"] if asked.get("cuda_graph") else []
    for kind in ("error", "skipped"):
        if kind in result:
            return f"{', '.join(which)}: {kind}: {' '.join(result[kind].split())[:300]}"
    return f"{', '.join(which)}: {result['step_seconds']:.1f} s"


def page(data: Mapping[str, Any], name: str, pictures: Sequence[str]) -> str:
    """All results as Markdown."""
    results, provider = data["results"], data["environment"]["provider"]
    title = {"cpu": "a CPU", "cuda": "a GPU"}[provider]
    head = HEAD.format(title=title, provider=provider, name=name)
    left = [f"- {describe(each)}" for each in results if "error" in each or "skipped" in each]
    parts = [head, machine(data["environment"]), folds(results), speeds(results)]
    parts += ["\nWhat timed them:\n\n", *(f"- `{each}`\n" for each in commands(results, provider))]
    parts += [f"\n![{picture}]({picture})\n" for picture in pictures]
    parts += ["\nWhat did not work:\n\n" + "\n".join(left) + "\n"] if left else []
    return "".join(parts)


def machine(found: Mapping[str, Any]) -> str:
    """The environment in two lines."""
    versions, gpu = found["versions"], found["gpu"] or {}
    name = gpu.get("name") or found["machine"]["cpu"]
    driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
    built_for = versions["onnxruntime_built_for_cuda"]
    cuda = f" for CUDA {built_for}" if built_for else ""
    return (
        f"{name}{driver}, ONNX Runtime {versions['onnxruntime']}{cuda}, no TensorFloat-32;"
        f" {found['date'][:10]}.\n\n"
    )


def commands(results: Sequence[Mapping[str, Any]], provider: str) -> Iterator[str]:
    """The command lines that measure again what ``results`` hold, with all that decides on it."""
    found: dict[str, list[str]] = {}
    for each in results:
        if each["step"] != "bench" or each["asked"].get("cuda_graph"):
            continue
        options = f"--layers {each['layers']} --dtypes {each['dtype']} " if each["layers"] else ""
        names = "batch", "prefill", "tokens", "repeats", "seconds"
        asked = (" ".join(map(str, several(each["asked"][name]))) for name in names)
        options += " ".join(f"--{name} {it}" for name, it in zip(names, asked, strict=True))
        found.setdefault(options, []).append(each["preset"])
    for options, names in found.items():
        presets = " ".join(dict.fromkeys(names))
        yield f"python benchmarks/speed.py --provider {provider} --presets {presets} {options}"


def folds(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of what was folded, with its time, and the errors at the worst output.

    ``seconds`` are None where other work was done beside the fold.
    """
    lines = [
        "| shape | blocks | type | weights | removed | fold | on the CPU | difference |"
        " error before | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    models: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in (each for each in results if each["step"] != "start"):
        done = models.setdefault((each["preset"], each["layers"], each["dtype"]), {})
        done[each["step"]] = each.get("result")
    for (preset, layers, dtype), done in models.items():
        if (fold := done.get("fold")) is None:
            continue
        alone, on_cpu = (
            f"{each['seconds']:.1f} s" if each and each["seconds"] is not None else ""
            for each in (fold, done.get("fold on cpu"))
        )
        outputs = (done.get("verify") or {}).get("outputs", [])
        lines.append(
            f"| {preset} | {layers or 'all'} | {dtype} | {fold['before']['weights'] / 1e6:.1f} M |"
            f" {fold['weights_removed_share']:.0%} | {alone} |"
            f" {on_cpu} | {worst(outputs, 'relative_error')} |"
            f" {worst(outputs, 'error_original')} | {worst(outputs, 'error_folded')} |"
        )
    return "\n".join(lines) + "\n\n"


def worst(outputs: Sequence[Mapping[str, Any]], name: str) -> str:
    """The largest of the outputs' errors."""
    errors = [output[name] for output in outputs if output[name] is not None]
    return f"{max(errors):.1e}" if errors else ""


def speeds(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of all times."""
    timed = [each for each in results if each["step"] == "bench" and "result" in each]
    twins = {
        run_of(each, phase): phase
        for each in results
        if each["step"] == TWIN and "result" in each
        for phase in each["result"]["phases"]
    }
    has_graphs = any(each["asked"].get("cuda_graph") for each in timed)
    graphs = ["graph"] if has_graphs else []
    heads = ["shape", "blocks", "type", *graphs, "phase", "batch", "tokens", "past", "original"]
    heads += ["folded", "speed-up", "A/A", "pairs", "loads", "bytes", "read"]
    lines = [heads, ["---"] * len(heads)]
    for each in timed:
        report = each["result"]
        graph = ["yes" if each["asked"].get("cuda_graph") else "no"] if has_graphs else []
        for phase in report["phases"]:
            copied = twins.get(run_of(each, phase))
            both = [phase] if copied is None else [phase, copied]
            ratios = report["bytes_ratio"], report["read_ratio"]
            times = [phase[name]["median_ms"] for name in ("original", "folded")]
            is_decode = phase["name"] == "decode"
            lines.append(
                [
                    *(each["preset"], str(each["layers"] or "all"), each["dtype"], *graph),
                    phase["name"],
                    *(str(phase[name]) for name in ("batch", "seq", "past")),
                    *(f"{time:.{decimals(time)}f} ms" for time in times),
                    interval(phase),
                    "" if copied is None else interval(copied),
                    counts(each["pairs"] for each in both),
                    counts(each.get("loads", 2) for each in both),  # 2 before it was said
                    *(f"{ratio:.2f}x" if is_decode else "" for ratio in ratios),
                ]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run_of(result: Mapping[str, Any], phase: Mapping[str, Any]) -> tuple[Any, ...]:
    """What one phase of a model has in common with that of its twin."""
    sizes = (phase[name] for name in ("name", "batch", "seq", "past"))
    case = (result[name] for name in ("preset", "layers", "dtype"))
    return *case, bool(result["asked"].get("cuda_graph")), *sizes


def interval(phase: Mapping[str, Any]) -> str:
    """A speed-up with its interval."""
    return f"{phase['speedup']:.2f}x ({phase['low']:.2f}-{phase['high']:.2f})"


def counts(each: Iterable[int]) -> str:
    """How many there were of a fold and of a twin: one number where these are equal."""
    return ", ".join(dict.fromkeys(map(str, each)))


def main() -> None:
    """Check what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--presets", nargs="+", choices=KNOWN, metavar="PRESET", help="[all]")
    parser.add_argument("--layers", type=int, default=2, help="blocks of each model, at most")
    parser.add_argument("--dtypes", nargs="+", help="[float32 float16 bfloat16; on cpu float32]")
    parser.add_argument("--batch", type=int, nargs="+", help="[1 8 64; on cpu 1 2]")
    parser.add_argument("--prefill", type=int, nargs="+", help="[128 2048; on cpu 128]")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps")
    parser.add_argument("--repeats", type=int, default=30, help="prefill runs")
    parser.add_argument("--seconds", type=float, default=10, help="for one phase, at most")
    parser.add_argument("--minutes", type=float, default=25, help="for everything")
    parser.add_argument("--step-minutes", type=float, default=5, help="for one step, at most")
    parser.add_argument("--folder", help="where models stay; those that are there are not written")
    parser.add_argument("--steps", nargs="+", choices=STEPS, metavar="STEP", help="[all]")
    parser.add_argument("--output", type=Path, help="JSON file [docs/speed-PROVIDER.json]")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--device", help="where models are folded, as torch calls it")
    given = parser.parse_args()
    for name, by_provider in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, by_provider[given.provider])
    given.presets = given.presets or KNOWN
    given.steps = given.steps or [*STEPS]
    given.device = given.device or given.provider
    given.output = given.output or ROOT / "docs" / f"speed-{given.provider}.json"
    if given.render:
        save(given.output, json.loads(given.output.read_text(encoding="utf-8")))
        return
    data = check(given)
    sys.exit(any("error" in result for result in data["results"]))


if __name__ == "__main__":
    main()
