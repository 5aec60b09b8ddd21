"""The speed check: paired runs of two models, prefill and decode apart, beside the bytes ratio.

**Prefill** runs a prompt with an empty cache; its time is the time to the first token. **Decode**
is a loop from a cache of a given length: every step takes one token and the keys and values that
the step before it left on the device; its times are those between two tokens. Nothing is copied to
the host, and no token is picked: the times are those of the model.

After warm-up the models run in the order A B, B A, A B, ..., so that a drift of the machine's speed
meets both alike. Both are loaded several times, in alternating order: where in memory a model comes
to lie made one of two copies of the same file up to 4 % faster. Each pair gives one ratio
``time(A) / time(B)``; the median of the ratios is the speed-up. Its spread is the 95 % percentile
interval of a bootstrap that is hierarchical, as pairs of one load have its luck in common: it draws
as many loads as there were, with replacement, and from each as many of its pairs (seeded; Davison &
Hinkley, Bootstrap Methods and their Application, 3.8). Decode at batch 1 reads every weight once
for each token, so what the fold can gain there is about the ratio of the bytes read; tables that
are looked up by row are not.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from onnx_fold.base.arguments import Provider, several
from onnx_fold.base.schema import SCHEMA_VERSION
from onnx_fold.base.tables import ORIGINAL_AND_FOLDED, Shown, figures_table, headings
from onnx_fold.engine.cost import bytes_read
from onnx_fold.errors import UsageError
from onnx_fold.files.load import ModelSource, blames_models, load, weight_bytes
from onnx_fold.runtime import sessions
from onnx_fold.runtime.environment import environment
from onnx_fold.runtime.inputs import (
    IMAGE,
    Ranges,
    cache_links,
    has_cache,
    input_shapes,
    token_counts,
)
from onnx_fold.runtime.pair import signature_difference
from onnx_fold.runtime.sessions import RunFailedError
from onnx_fold.speed.operator_times import (
    OperatorTime,
    operator_times,
    operators_table,
    side_by_side,
)
from onnx_fold.speed.steps import Decode, Fixed, Step, cache_values, step_values

__all__ = ["BenchReport", "Phase", "Timing", "bench"]

RESAMPLES = 2000
"""Bootstrap samples of the spread of a ratio."""

LEAST_PAIRS = 3
"""Pairs of a load that run however long they take: 12 in the four loads of the default."""

RUN = "run"
"""The one phase of a model that takes no tokens, such as one of images or of sound."""

_STOP_SPINNING = {"session.force_spinning_stop": "1"}
"""Else the threads of one session wait busily while the other is timed."""


@dataclass
class Timing:
    """Times of one model: to the first token in prefill, between two tokens in decode.

    Attributes:
        median_ms: Median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds.
        p99_ms: 99th percentile, in milliseconds.
        tokens_per_second: Tokens of all rows over the time of all runs; rows, where a phase is a
            run.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    tokens_per_second: float


@dataclass
class Phase:
    """Prefill or decode, for one batch and one length.

    Attributes:
        name: ``prefill`` or ``decode``; :data:`RUN` of a model that takes no tokens.
        batch: Rows.
        seq: New tokens of a row in one run, or the length that other inputs have.
        past: Tokens in the cache, in decode before its first step.
        pairs: Runs of each model.
        original: Times of the original model.
        folded: Times of the folded model.
        speedup: Median of ``time(original) / time(folded)`` over the pairs.
        low: Lower end of the 95 % bootstrap interval of ``speedup``.
        high: Its upper end.
        loads: How often both models were loaded for these pairs; 2 in reports that do not say it.
    """

    name: str
    batch: int
    seq: int
    past: int
    pairs: int
    original: Timing
    folded: Timing
    speedup: float
    low: float
    high: float
    loads: int = 2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        """Return the phase that ``dataclasses.asdict`` made ``data`` of."""
        timings = {name: Timing(**data[name]) for name in ("original", "folded")}
        return cls(**{**data, **timings})


@dataclass
class BenchReport(Shown):
    """What a fold gains in time, beside what it gains in bytes.

    Attributes:
        provider: Execution provider.
        repeats: Pairs of prefill runs.
        tokens: Pairs of decode steps.
        threads: Threads of one operator, None for ONNX Runtime's choice.
        cuda_graph: Whether each phase was captured as a CUDA graph.
        bytes_original: Bytes of all initializers of the original model.
        bytes_folded: The same of the folded model.
        bytes_ratio: ``bytes_original / bytes_folded``.
        read_ratio: The same without tables that are looked up by row: the limit of the speed-up of
            decode at batch 1.
        phases: The measurements.
        operators: Where the time goes, in the first prefill and decode, if that was asked.
        notes: What a reader must know to judge the numbers.
        environment: Machine, versions, and the state of the GPU right after the runs, see
            :func:`onnx_fold.runtime.environment.environment`.
        names: What the two models are called in tables: their files, where these names are short.
    """

    provider: Provider
    repeats: int
    tokens: int
    threads: int | None
    cuda_graph: bool
    bytes_original: int
    bytes_folded: int
    bytes_ratio: float
    read_ratio: float
    phases: list[Phase] = field(default_factory=list)
    operators: list[OperatorTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, str] = ORIGINAL_AND_FOLDED

    @property
    def has_tokens(self) -> bool:
        """Whether the models take tokens: else a phase is a run."""
        return all(phase.name != RUN for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchReport:
        """Return the report that :meth:`to_dict` made ``data`` of."""
        phases = [Phase.from_dict(phase) for phase in data["phases"]]
        operators = [OperatorTime(**each) for each in data["operators"]]
        names = tuple(data.get("names", ORIGINAL_AND_FOLDED))
        known = {name: value for name, value in data.items() if name != "schema_version"}
        return cls(**{**known, "phases": phases, "operators": operators, "names": names})

    def __repr__(self) -> str:
        phases = ", ".join(f"{each.name} {each.speedup:.2f}x" for each in self.phases)
        return f"<BenchReport on {self.provider}: {phases}>"

    def __rich__(self) -> RenderableType:
        """Return a table of the phases, the bytes, and the notes."""
        item = "token" if self.has_tokens else "run"
        size = Text(
            f"weights {decimal(self.bytes_original)} → {decimal(self.bytes_folded)}, bytes ratio"
            f" {self.bytes_ratio:.3f}x; of those that a {item} reads"
            f" {self.read_ratio:.3f}x"
        )
        parts: list[RenderableType] = [_table(self), size]
        names = dict.fromkeys(each.phase for each in self.operators)
        for name in names:
            operators = [each for each in self.operators if each.phase == name]
            parts.append(operators_table(name, operators, self.names[1]))
        return Group(*parts, *(Text(f"- {note}", "dim") for note in self.notes))


@blames_models
def bench(
    original: ModelSource,
    folded: ModelSource,
    *,
    provider: Provider = "auto",
    batch: int | Iterable[int] = 1,
    prefill: int | Iterable[int] = 128,
    past: int | None = None,
    tokens: int = 64,
    repeats: int = 30,
    loads: int = 4,
    warmup: int = 5,
    seconds: float | None = None,
    threads: int | None = None,
    cuda_graph: bool = False,
    profile: bool = False,
    image: int = IMAGE,
    ranges: Ranges | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Time both models side by side: a prefill, and a loop that decodes token after token.

    A phase that the original cannot run (such as prefill with a decode-only export) is left out,
    with a note.

    Args:
        original: The model before the fold.
        folded: The model after it.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        batch: Rows; each of several is run with each length.
        prefill: Tokens of a row in prefill, with an empty cache; several are run one by one.
        past: Tokens in the cache when decode starts, by default ``prefill``. Without a cache decode
            runs a single token.
        tokens: Pairs of decode steps; the cache grows by one token with each, and starts again with
            each load.
        repeats: Pairs of prefill runs.
        loads: How often both models are loaded, at least 2; each load has its share of the pairs,
            rounded up.
        warmup: Pairs before these, after each load.
        seconds: Stop a phase after this time, with at least :data:`LEAST_PAIRS` of each load; None
            runs all.
        threads: Threads of one operator; None lets ONNX Runtime decide.
        cuda_graph: Capture each phase as a CUDA graph, which takes launch overhead out of decode. A
            graph has fixed shapes, so the cache does not grow.
        profile: Also say where the time goes, by operator, see
            :mod:`onnx_fold.speed.operator_times`.
        image: Pixels along each side of an image whose size is free.
        ranges: The lowest and highest value of random inputs, by their names, both included.
        seed: Seed of the inputs and of the bootstrap.
        progress: Is told what is being timed.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: A number makes no sense, the provider cannot be used, no phase can be run, or
            the folded model cannot run one that the original runs.
        InvalidModelError: One of the models cannot be loaded.
    """
    batches, lengths = (tuple(dict.fromkeys(several(each))) for each in (batch, prefill))
    if min(repeats, tokens, image, *batches, *lengths) < 1 or min(warmup, past or 0) < 0:
        raise UsageError(
            "batch, prefill, tokens, image and repeats must be at least 1, past and warmup at"
            " least 0"
        )
    if loads < 2:
        raise UsageError("loads must be at least 2: one alone does not show what they differ by")
    provider = sessions.resolve_provider(provider)
    if cuda_graph and provider != "cuda":
        raise UsageError("cuda_graph needs the provider cuda")
    models = load(original), load(folded)
    if difference := signature_difference(*models):
        raise UsageError(f"these are not two versions of one model: {difference}")
    sizes = weight_bytes(models[0]), weight_bytes(models[1])
    report = BenchReport(
        *(provider, repeats, tokens, threads, cuda_graph, *sizes),
        bytes_ratio=sizes[0] / max(sizes[1], 1),
        read_ratio=bytes_read(models[0]) / max(bytes_read(models[1]), 1),
        names=headings(original, folded),
    )
    pairs = loads, warmup, seconds or np.inf
    bed = _TestBed((original, folded), models[0], report, *pairs, seed, image, ranges)
    for number in range(loads):
        now = f"load {number + 1} of {loads}"
        progress(now)
        bed.load((0, 1) if number % 2 == 0 else (1, 0))
        for rows in batches:
            for length in lengths:
                if not takes_tokens(models[0]):
                    progress(f"{now}, batch {rows}")
                    bed.measure(RUN, rows, length, 0)
                    continue
                progress(f"{now}, batch {rows}, {length} tokens")
                bed.measure("prefill", rows, length, 0)
                bed.measure("decode", rows, 1, length if past is None else past)
    report.phases = bed.phases()
    report.environment = environment(provider)
    if profile:
        report.operators = bed.operators(progress)
    report.notes = list(dict.fromkeys(report.notes))
    if not report.phases:
        raise UsageError("; ".join(report.notes))
    return report


def takes_tokens(model: ir.Model) -> bool:
    """Whether there are tokens among its inputs, or a cache of them."""
    return has_cache(model) or token_counts(model, input_shapes(model))[1] is not None


_Times: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
"""Seconds of the runs of both models, ``[2, n]``."""

_Shape: TypeAlias = tuple[int, int, int]
"""Rows, new tokens and tokens in the cache."""


@dataclass
class _TestBed:
    """Both models, loaded, and what was measured with them."""

    sources: tuple[ModelSource, ModelSource]
    model: ir.Model
    report: BenchReport
    loads: int
    warmup: int
    seconds: float
    seed: int
    image: int
    ranges: Ranges | None
    sessions: dict[int, Any] = field(default_factory=dict)
    times: dict[tuple[str, _Shape], list[_Times]] = field(default_factory=dict)
    tried: set[_Shape] = field(default_factory=set)

    def load(self, order: Sequence[int]) -> None:
        """Load both models anew, the original (0) and the folded one (1) in this order."""
        self.sessions.clear()
        self.tried.clear()
        gc.collect()
        options = {"enable_cuda_graph": 1} if self.report.cuda_graph else None
        for which in order:
            self.sessions[which] = sessions.session(
                self.sources[which],
                self.report.provider,
                threads=self.report.threads,
                provider_options=options,
                config=_STOP_SPINNING,
            )

    def phases(self) -> list[Phase]:
        """What was measured, all loads together."""
        return [
            _phase(name, shape, times, self.seed) for (name, shape), times in self.times.items()
        ]

    def operators(self, progress: Callable[[str], None]) -> list[OperatorTime]:
        """Profile the first prefill and the first decode of both models, one after the other."""
        self.sessions.clear()
        found = []
        for name in dict.fromkeys(name for name, _ in self.times):
            progress(f"where the time of {name} goes")
            values = self.values(next(shape for each, shape in self.times if each == name))
            provider, threads = self.report.provider, self.report.threads
            times = [operator_times(s, provider, values, threads=threads) for s in self.sources]
            found += side_by_side(name, *times)
        return found

    def measure(self, name: str, batch: int, seq: int, past: int) -> None:
        """Time the runs of one phase of both models in this load, or note why not."""
        report = self.report
        if not has_cache(self.model):
            past = 0
        if name == "decode" and not has_cache(self.model):
            report.notes.append("the model has no cache: decode is a run of one token")
        shape = self._really(batch, seq, past)
        if shape in self.tried:
            report.notes.append(f"{name} was left out: the shape of the inputs is fixed")
            return
        self.tried.add(shape)
        pairs = self._share(report.tokens if name == "decode" else report.repeats)
        make = self._decode(shape) if name == "decode" else self._fixed(shape)
        try:
            first = make(self.sessions[0])
        except RunFailedError as error:
            report.notes.append(f"{name} was left out: {error}")
            return
        second = make(self.sessions[1])
        try:
            times = _paired(first, second, pairs, self.warmup, self.seconds / self.loads)
        except RunFailedError as error:  # a cache that outgrows the model
            report.notes.append(f"{name} of {pairs} tokens was left out: {error}")
            return
        self.times.setdefault((name, shape), []).append(times)

    def _share(self, runs: int) -> int:
        """How many of ``runs`` each load has."""
        return -(-runs // self.loads)

    def _really(self, batch: int, seq: int, past: int) -> _Shape:
        """Return the batch, new tokens and past that will run: what is wanted, or what is fixed."""
        sizes: dict[str, Any] = {"batch": batch, "past": past, "image": self.image}
        shapes = input_shapes(self.model, **sizes, seq=seq)
        rows, tokens, cached = token_counts(self.model, shapes)
        if not takes_tokens(self.model):
            rows = next((shape[0] for shape in shapes.values() if shape), 1)
            is_fixed = shapes == input_shapes(self.model, **sizes, seq=seq + 1)
            tokens = 1 if is_fixed else seq
        return batch if rows is None else rows, seq if tokens is None else tokens, cached

    def values(self, shape: _Shape) -> dict[str, Any]:
        """All inputs on the device, for a batch, new tokens and past."""
        return self._cache(shape) | self._step(shape)

    def _fixed(self, shape: _Shape) -> Callable[[Any], Step]:
        values = self.values(shape)
        provider, cuda_graph = self.report.provider, self.report.cuda_graph
        return lambda session: Fixed(session, values, provider, cuda_graph=cuda_graph)

    def _decode(self, shape: _Shape) -> Callable[[Any], Step]:
        links = cache_links(self.model)
        if why := self._does_not_grow(shape, links):
            self.report.notes.append(f"decode: the cache does not grow, because {why}")
        if why or not has_cache(self.model):
            return self._fixed(shape)
        batch, seq, past = shape
        cache = self._cache(shape)
        count = max(self._share(self.report.tokens), self.warmup)
        steps = [self._step((batch, seq, past + i * seq)) for i in range(count)]
        return lambda session: Decode(session, cache, steps, links, self.report.provider)

    def _does_not_grow(self, shape: _Shape, links: Mapping[str, str]) -> str:
        batch, seq, past = shape
        if not has_cache(self.model):
            return ""
        if self.report.cuda_graph:
            return "a CUDA graph has fixed shapes"
        if self._really(batch, seq, past + seq) == shape:
            return "its length is fixed"
        return "" if links else "the names of the outputs do not tell which of them are the next"

    def _cache(self, shape: _Shape) -> dict[str, Any]:
        return cache_values(self.model, shape[0], shape[2], self.report.provider, self.seed)

    def _step(self, shape: _Shape) -> dict[str, Any]:
        how = self.report.provider, self.seed, self.image, self.ranges
        return step_values(self.model, shape, *how)


def _paired(
    first: Step, second: Step, repeats: int, warmup: int, seconds: float = np.inf
) -> _Times:
    """Return the seconds of ``repeats`` runs of both, ``[2, n]``, in the order AB, BA, AB, ...

    After ``seconds`` the warm-up ends, and the runs do after :data:`LEAST_PAIRS`.
    """
    end = time.perf_counter() + seconds
    for i in range(-warmup, 0):
        _pair(first, second, i)
        if time.perf_counter() > end:
            break
    first.reset()
    second.reset()
    times: list[tuple[float, float]] = []
    for i in range(repeats):
        if len(times) >= LEAST_PAIRS and time.perf_counter() > end:
            break
        times.append(_pair(first, second, i))
    return np.array(times).T


def _pair(first: Step, second: Step, i: int) -> tuple[float, float]:
    """Run both, the second one first if ``i`` is odd; return the seconds of each."""
    times = {}
    for step in (first, second) if i % 2 == 0 else (second, first):
        step.prepare()
        start = time.perf_counter()
        step.run()
        times[step] = time.perf_counter() - start
    return times[first], times[second]


def _phase(name: str, shape: _Shape, loads: Sequence[_Times], seed: int) -> Phase:
    """What was measured in one phase, in each of the loads."""
    times = np.concatenate(loads, axis=1)
    ratios = times[0] / times[1]
    low, high = _spread([each[0] / each[1] for each in loads], seed)
    items = shape[0] * (1 if name == RUN else shape[1])
    original, folded = (_timing(each, items) for each in times)
    speedup, pairs = float(np.median(ratios)), len(ratios)
    return Phase(name, *shape, pairs, original, folded, speedup, low, high, len(loads))


def _timing(times: Any, tokens: int) -> Timing:
    median, p90, p99 = (1e3 * np.quantile(times, (0.5, 0.9, 0.99))).tolist()
    return Timing(median, p90, p99, tokens * len(times) / float(times.sum()))


def _spread(loads: Sequence[Any], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median over bootstrap samples.

    Args:
        loads: The ratios of each load. A sample draws as many loads, and of each as many ratios.
        seed: Seed of what is drawn.
        resamples: How many samples.
    """
    rng = np.random.default_rng(seed)

    def sample() -> Any:
        drawn = (loads[index] for index in rng.integers(len(loads), size=len(loads)))
        return np.median(np.concatenate([rng.choice(each, len(each)) for each in drawn]))

    low, high = np.quantile([sample() for _ in range(resamples)], (0.025, 0.975))
    return float(low), float(high)


_READING = {
    True: "median / 90th / 99th percentile in ms, to the first token (prefill) or between two"
    " (decode);\nspeed-up with its 95 % interval; tokens a second of the second model",
    False: "median / 90th / 99th percentile in ms; speed-up with its 95 % interval; rows a second"
    " of the second model",
}
"""How to read the table, of models that take tokens and of others."""


def _table(report: BenchReport) -> Table:
    what = f"{report.repeats} prefills and {report.tokens} decode steps"
    details = [f"{what if report.has_tokens else f'{report.repeats} runs'} of each"]
    if report.threads is not None:
        details.append(f"{report.threads} threads")
    if report.cuda_graph:
        details.append("CUDA graphs")
    table = figures_table(
        f"Speed on {report.provider}: {', '.join(details)}",
        "\n".join([_READING[report.has_tokens], "; ".join(_counts(report.phases))]),
    )
    table.add_column("phase", no_wrap=True)
    sizes: tuple[str, ...] = ("batch", "tokens", "past")
    ratios = ("tokens/s", "speed-up", "95 %")
    if not report.has_tokens:
        sizes, ratios = ("batch", "length"), ("rows/s", "speed-up", "95 %")
    for heading in (*sizes, *report.names, *ratios):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase in report.phases:
        table.add_row(
            phase.name,
            *(str(size) for size in (phase.batch, phase.seq, phase.past)[: len(sizes)]),
            *(_quantiles(timing) for timing in (phase.original, phase.folded)),
            f"{phase.folded.tokens_per_second:,.0f}",
            f"{phase.speedup:.3f}x",
            f"{phase.low:.2f}-{phase.high:.2f}",
        )
    return table


def _counts(phases: Sequence[Phase]) -> Iterator[str]:
    """Yield how many pairs and loads there were of each kind of phase, and how few at the least."""
    for name in dict.fromkeys(phase.name for phase in phases):
        pairs = sorted({phase.pairs for phase in phases if phase.name == name})
        loads = sorted({phase.loads for phase in phases if phase.name == name})
        counts = ("-".join(map(str, dict.fromkeys((each[0], each[-1])))) for each in (pairs, loads))
        yield "{}: {} pairs in {} loads".format(name, *counts)


def _quantiles(timing: Timing) -> str:
    times = timing.median_ms, timing.p90_ms, timing.p99_ms
    return " / ".join(f"{each:.{decimals(timing.median_ms)}f}" for each in times)


def decimals(milliseconds: float) -> int:
    """Digits to show behind the point of a time: three in all, of less than 1 ms three behind."""
    return max(0, 3 - len(str(int(milliseconds)))) if milliseconds >= 1 else 3
