"""The speed check: paired runs of two models, prefill and decode apart, beside the bytes ratio.

After warm-up the models run in the order A B, B A, A B, ..., so that a drift of the machine's speed
meets both alike. Each pair gives one ratio ``time(A) / time(B)``; the median of the ratios is the
speed-up, and its spread is the 95 % percentile interval of the bootstrap (resampled pairs, seeded).
Decode at batch 1 reads every weight once for each token, so the speed-up that the fold can reach
there is the ratio of the weight bytes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from onnx_fold import runtime
from onnx_fold.errors import UsageError
from onnx_fold.files import ModelSource, load, weight_bytes
from onnx_fold.inputs import has_cache, make_inputs, token_counts
from onnx_fold.runtime import Array, RunFailedError

__all__ = ["BenchReport", "Phase", "Timing", "bench"]

Step: TypeAlias = Callable[[], None]

RESAMPLES = 2000
"""Bootstrap samples of the spread of a ratio."""

_STOP_SPINNING = {"session.force_spinning_stop": "1"}
"""Else the threads of one session wait busily while the other is timed."""

_GRAPH_IDS = itertools.count(1)


@dataclass
class Timing:
    """Times of one model.

    Attributes:
        median_ms: Median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds.
    """

    median_ms: float
    p90_ms: float


@dataclass
class Phase:
    """Prefill or decode.

    Attributes:
        name: ``prefill`` or ``decode``.
        batch: Rows.
        seq: New tokens of a row.
        past: Tokens in the cache.
        original: Times of the original model.
        folded: Times of the folded model.
        speedup: Median of ``time(original) / time(folded)`` over the pairs.
        low: Lower end of the 95 % bootstrap interval of ``speedup``.
        high: Its upper end.
    """

    name: str
    batch: int
    seq: int
    past: int
    original: Timing
    folded: Timing
    speedup: float
    low: float
    high: float


@dataclass
class BenchReport:
    """What a fold gains in time, beside what it gains in bytes.

    Attributes:
        provider: Execution provider.
        repeats: Pairs of runs of each phase.
        threads: Threads of one operator, None for ONNX Runtime's choice.
        bytes_original: Bytes of all initializers of the original model.
        bytes_folded: The same of the folded model.
        bytes_ratio: ``bytes_original / bytes_folded``.
        phases: The measurements.
        notes: What a reader must know to judge the numbers.
    """

    provider: str
    repeats: int
    threads: int | None
    bytes_original: int
    bytes_folded: int
    bytes_ratio: float
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """Return a table of the phases, the bytes, and the notes."""
        size = Text(
            f"weights {decimal(self.bytes_original)} → {decimal(self.bytes_folded)},"
            f" bytes ratio {self.bytes_ratio:.3f}x"
        )
        return Group(_table(self), size, *(Text(f"- {note}", "dim") for note in self.notes))


def bench(
    original: ModelSource,
    folded: ModelSource,
    *,
    provider: str = "cpu",
    batch: int = 1,
    prefill: int = 128,
    past: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    cuda_graph: bool = False,
    seed: int = 0,
) -> BenchReport:
    """Time both models side by side: a prefill of ``prefill`` tokens, and decode of one more.

    Inputs are bound to the device once, so that the times are those of the model. A phase that the
    original cannot run (such as prefill with a decode-only export) is left out, with a note.

    Args:
        original: The model before the fold.
        folded: The model after it.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        batch: Rows.
        prefill: Tokens of a row in prefill, with an empty cache.
        past: Tokens in the cache in decode, by default ``prefill``. Without a cache decode runs a
            single token.
        repeats: Pairs of runs of each phase.
        warmup: Pairs before these.
        threads: Threads of one operator; None lets ONNX Runtime decide.
        cuda_graph: Capture each phase as a CUDA graph, which takes launch overhead out of decode.
        seed: Seed of the inputs and of the bootstrap.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: A number makes no sense, the provider cannot be used, no phase can be run, or
            the folded model cannot run one that the original runs.
        InvalidModelError: One of the models cannot be loaded.
    """
    if repeats < 1 or warmup < 0 or batch < 1 or prefill < 1 or (past or 0) < 0:
        raise UsageError(
            "batch, prefill and repeats must be at least 1, past and warmup at least 0"
        )
    provider = runtime.resolve_provider(provider)
    if cuda_graph and provider != "cuda":
        raise UsageError("cuda_graph needs the provider cuda")
    models = load(original), load(folded)
    sizes = weight_bytes(models[0]), weight_bytes(models[1])
    report = BenchReport(provider, repeats, threads, *sizes, sizes[0] / max(sizes[1], 1))
    options = {"enable_cuda_graph": 1} if cuda_graph else None
    sessions = [
        runtime.session(
            source, provider, threads=threads, provider_options=options, config=_STOP_SPINNING
        )
        for source in (original, folded)
    ]
    cached = has_cache(models[0])
    if not cached:
        report.notes.append("the model has no cache: decode is a run of one token")
    depth = (prefill if past is None else past) if cached else 0
    for name, seq, tokens in (("prefill", prefill, 0), ("decode", 1, depth)):
        inputs = make_inputs(models[0], batch=batch, seq=seq, past=tokens, seed=seed)
        shape = _ran(models[0], inputs, (batch, seq, tokens))
        if any((phase.batch, phase.seq, phase.past) == shape for phase in report.phases):
            report.notes.append(f"{name} was left out: the shape of the inputs is fixed")
            continue
        try:
            first = _step(sessions[0], inputs, provider, cuda_graph)
        except RunFailedError as error:
            report.notes.append(f"{name} was left out: {error}")
            continue
        second = _step(sessions[1], inputs, provider, cuda_graph)
        times = _paired(first, second, repeats, warmup)
        report.phases.append(_phase(name, shape, times, seed))
    if not report.phases:
        raise UsageError("; ".join(report.notes))
    return report


def _ran(
    model: ir.Model, inputs: Mapping[str, Array], wanted: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Return the batch, new tokens and past of ``inputs``: what was wanted, or what is fixed."""
    counts = token_counts(model, {name: array.shape for name, array in inputs.items()})
    batch, seq = (w if c is None else c for c, w in zip(counts[:2], wanted[:2], strict=True))
    return batch, seq, counts[2]


def _step(session: Any, inputs: Mapping[str, Array], provider: str, cuda_graph: bool) -> Step:
    """Return a function that runs ``session`` once on inputs that lie on its device already."""
    binding = session.io_binding()
    held = {name: runtime.to_ort_value(array, provider) for name, array in inputs.items()}
    options = runtime.onnxruntime().RunOptions()
    if cuda_graph:
        options.add_run_config_entry("gpu_graph_id", "-1")

    def step() -> None:
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()

    try:
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, provider)
        step()
    except Exception as error:
        text = runtime.one_line(error)
        raise RunFailedError(f"ONNX Runtime cannot run the model: {text}") from error
    if cuda_graph:
        # A graph holds the addresses that it was captured with: one id a step, results in place.
        for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(output.name, value)
        options = runtime.onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(next(_GRAPH_IDS)))
    return step


def _paired(
    first: Step, second: Step, repeats: int, warmup: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the seconds of each of ``repeats`` runs of both, taken in the order AB, BA, AB, ..."""
    times = np.empty((2, repeats))
    for i in range(-warmup, repeats):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            if i >= 0:
                times[which, i] = time.perf_counter() - start
    return times[0], times[1]


def _phase(name: str, shape: tuple[int, int, int], times: Any, seed: int) -> Phase:
    ratios = times[0] / times[1]
    low, high = _spread(ratios, seed)
    timings = [Timing(*(float(1e3 * np.quantile(t, q)) for q in (0.5, 0.9))) for t in times]
    return Phase(name, *shape, timings[0], timings[1], float(np.median(ratios)), low, high)


def _spread(ratios: Any, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median over ``RESAMPLES`` bootstrap samples."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def _table(report: BenchReport) -> Table:
    details = [f"{report.repeats} pairs", *{f"batch {phase.batch}" for phase in report.phases}]
    if report.threads is not None:
        details.append(f"{report.threads} threads")
    table = Table(
        title=f"Speed on {report.provider}: {', '.join(details)}",
        caption="median / 90th percentile in ms; speed-up with its 95 % interval",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("phase", no_wrap=True)
    for heading in ("tokens", "past", "original", "folded", "speed-up", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase in report.phases:
        table.add_row(
            phase.name,
            str(phase.seq),
            str(phase.past),
            *(f"{t.median_ms:.3f} / {t.p90_ms:.3f}" for t in (phase.original, phase.folded)),
            f"{phase.speedup:.3f}x",
            f"{phase.low:.2f}-{phase.high:.2f}",
        )
    return table
