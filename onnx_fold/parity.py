"""The parity check: do two models compute the same function?

Both models run on the same inputs, one after another, the original also in a wider type, and
:mod:`onnx_fold.judge` says by its rule whether the outputs differ by more than rounding errors.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_fold import runtime
from onnx_fold.arguments import several
from onnx_fold.basis import MAX_RATIO
from onnx_fold.environment import environment
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.files import ModelSource, blames_models, load, weight_bytes
from onnx_fold.generate import Decoder, Function, GreedyCheck, GreedyParity
from onnx_fold.inputs import Arrays, given_inputs, has_cache, make_inputs
from onnx_fold.judge import Feed, Judge, OutputParity, Run
from onnx_fold.report import figures_table
from onnx_fold.runtime import Array, MissingKernelError, RunFailedError
from onnx_fold.widen import SIXTEEN_BITS, is_float, precision, widen

__all__ = ["ParityReport", "signature_difference", "verify"]

logger = logging.getLogger(__name__)

REFERENCE_LIMIT = 8 * 2**30
"""Bytes of widened weights up to which a reference is computed."""

EVALUATOR_LIMIT = 2 * 2**30
"""The same for ``onnx.reference``, which holds every weight twice."""


@dataclass
class ParityReport:
    """Whether two models compute the same function.

    Attributes:
        ok: Whether every output passes, and the greedy text if there is one.
        reason: Why not.
        provider: The execution provider that both models ran on.
        dtype: The float type of the original's weights.
        outputs: One entry for each output.
        shapes: The inputs that were run, in words.
        notes: What a reader must know to judge the numbers.
        scope: What was run; empty if it was both models whole.
        greedy: Whether both models write the same tokens, if that was asked.
        environment: Machine and versions, see :func:`onnx_fold.environment.environment`.
    """

    ok: bool
    reason: str = ""
    provider: str = "cpu"
    dtype: str = ""
    outputs: list[OutputParity] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scope: str = ""
    greedy: GreedyParity | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; infinity and NaN become None."""
        report: dict[str, Any] = _finite(asdict(self))
        return report

    def __rich__(self) -> RenderableType:
        """Return a table of the outputs, the verdict, and the notes."""
        verdict = Text("same function", "bold green") if self.ok else Text("differs", "bold red")
        if self.scope:
            verdict.append(f" in {self.scope}", "default")
        if self.reason:
            verdict.append(f": {self.reason}", "default")
        notes = [Text(f"- {note}", "dim") for note in self.notes]
        table = [_table(self)] if self.outputs else []
        text = [Text(str(self.greedy))] if self.greedy and self.greedy.ok else []
        return Group(*table, *text, verdict, *notes)


@blames_models
def verify(
    original: ModelSource,
    folded: ModelSource,
    *,
    provider: str = "cpu",
    samples: int = 1,
    shapes: Mapping[str, int] | Iterable[Mapping[str, int]] | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    tolerance: float | None = None,
    max_ratio: float = MAX_RATIO,
    reference: bool = True,
    emulate: bool | None = None,
    greedy: int | None = None,
    seed: int = 0,
) -> ParityReport:
    """Run both models on the same inputs and judge the differences, see :mod:`onnx_fold.judge`.

    Models are run one after another, each loaded once.

    Args:
        original: The model before the fold.
        folded: The model after it.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        samples: Random inputs of each shape.
        shapes: Sizes of the inputs: ``batch``, ``seq``, ``past``, or the name of any symbolic
            dimension. By default ``batch=1, seq=8`` (``past=5`` if the model has a cache), then
            ``batch=2, seq=16`` with an empty cache.
        inputs: The inputs to run instead of random ones: arrays by name, or an ``.npz`` file.
        tolerance: See the rule; by default by the type of the weights.
        max_ratio: See the rule.
        reference: Run the original in a wider type too; without it the tolerance decides.
        emulate: Run 16-bit models in float32, each operator's result rounded to 16 bits (which is
            what 16-bit hardware computes). By default where the provider cannot run the type
            itself: bfloat16 on the CPU, or a missing kernel.
        greedy: Tokens that the models write greedily, too, by the rule of
            :mod:`onnx_fold.generate`. The prompt is a few random tokens, or that among ``inputs``,
            which may then lack whatever follows from it.
        seed: Seed of the random inputs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The provider, the inputs or the shapes do not fit, or the original cannot run
            or generate.
        InvalidModelError: One of the models cannot be read, or the original cannot be loaded. A
            folded model that ONNX Runtime does not load or run is a failed report.
    """
    before, after = load(original), load(folded)
    provider = runtime.resolve_provider(provider)
    report = ParityReport(False, provider=provider, dtype=precision(before).name)
    report.environment = environment(provider)
    report.reason = signature_difference(before, after)
    if report.reason:
        return report
    check = None
    if greedy is not None:
        decoder = Decoder.of(before)
        check = GreedyCheck(decoder, decoder.start(inputs, seed), greedy)
        inputs = None if inputs is None else check.start
    sizes = None if shapes is None else several(shapes)
    feeds = _feeds(before, inputs, sizes, samples, seed)
    run = _Runner(provider, emulate, report.notes, check)
    try:
        runs = run.pair((original, before), (folded, after), feeds)
    except _FoldedFailedError as error:
        report.reason = f"the folded model does not run where the original does: {error}"
        return report
    if reference:
        run.reference(before, runs)
    report.shapes = [pair.feed.label for pair in runs]
    judge = Judge(before, tolerance, max_ratio, report.notes)
    report.outputs = [judge.output(name, runs) for name in runs[0].original]
    failed = [
        f"output '{output.name}': {output.reason}" for output in report.outputs if output.reason
    ]
    if check is not None:
        limits = {output.name: output.limit for output in report.outputs}
        report.greedy = check.judge(limits[check.decoder.logits] or 0.0)
        if not report.greedy.ok:
            failed.insert(0, str(report.greedy))
    report.ok = not failed
    report.reason = "; ".join(failed[:3])
    return report


# --- Before the run: signatures and inputs -------------------------------------------------------


def signature_difference(before: ir.Model, after: ir.Model) -> str:
    """Return the first difference of the two signatures in words, or an empty string."""
    ends = (
        ("inputs", before.graph.inputs, after.graph.inputs),
        ("outputs", before.graph.outputs, after.graph.outputs),
    )
    for kind, old, new in ends:
        names = [value.name for value in old], [value.name for value in new]
        if names[0] != names[1]:
            return f"the {kind} differ: {_listed(names[0])} became {_listed(names[1])}"
        for x, y in zip(old, new, strict=True):
            if _described(x) != _described(y) and None not in (_described(x), _described(y)):
                return f"{kind[:-1]} '{x.name}' was {_described(x)} and became {_described(y)}"
            if x.shape is not None and y.shape is not None and not _shapes_agree(x.shape, y.shape):
                return f"{kind[:-1]} '{x.name}' was {x.shape} and became {y.shape}"
    return ""


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(str(name) for name in names) or "none"


def _described(value: ir.Value) -> str | None:
    return None if value.type is None else str(value.type)


def _shapes_agree(x: ir.Shape, y: ir.Shape) -> bool:
    """Whether the ranks are equal, and all sizes that both shapes fix."""
    return len(x) == len(y) and all(
        a == b for a, b in zip(x, y, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def _feeds(
    model: ir.Model,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None,
    shapes: Sequence[Mapping[str, int]] | None,
    samples: int,
    seed: int,
) -> list[Feed]:
    if inputs is not None:
        if shapes is not None:
            raise UsageError("pass either inputs or shapes, not both")
        return [Feed("given inputs", given_inputs(model, inputs))]
    if samples < 1 or (shapes is not None and not shapes):
        raise UsageError("nothing to run: at least one sample and one shape are needed")
    defaults: list[dict[str, int]] = [{"batch": 1, "seq": 8}, {"batch": 2, "seq": 16}]
    if has_cache(model):
        defaults[0]["past"], defaults[1]["past"] = 5, 0
    feeds: list[Feed] = []
    for sizes in shapes or defaults:
        _check_sizes(model, sizes)
        known: Any = {name: sizes[name] for name in ("batch", "seq", "past") if name in sizes}
        label = " ".join(f"{name}={size}" for name, size in sizes.items())
        for _ in range(samples):
            arrays = make_inputs(model, **known, sizes=sizes, seed=seed + len(feeds))
            feeds.append(Feed(label, arrays, optional=shapes is None))
    return feeds


def _check_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    dims = (dim for value in model.graph.inputs for dim in value.shape or ())
    symbols = {str(dim) for dim in dims if isinstance(dim, ir.SymbolicDim)}
    unknown = sorted(set(sizes) - symbols - {"batch", "seq", "past"})
    if unknown:
        raise UsageError(
            f"unknown dimension '{unknown[0]}': expected batch, seq, past or one of the model's own"
            f" ({_listed(sorted(symbols))})"
        )


# --- Running -------------------------------------------------------------------------------------


class _FoldedFailedError(Exception):
    """The folded model cannot run inputs that the original ran."""


@dataclass
class _Runner:
    """Runs models one after another, each in a session that is dropped before the next is made."""

    provider: str
    emulate: bool | None
    notes: list[str]
    greedy: GreedyCheck | None = None

    def pair(
        self,
        original: tuple[ModelSource, ir.Model],
        folded: tuple[ModelSource, ir.Model],
        feeds: list[Feed],
    ) -> list[Run]:
        """Run both models in the same way: as they are, emulated, or by onnx.reference."""
        if self.emulate:
            return self._emulated(original[1], folded[1], feeds)
        try:
            return self._both(self._session, original[0], folded[0], feeds)
        except MissingKernelError as error:
            if self.emulate is False:
                raise
            logger.debug("no kernel: %s", error)
            self.notes.clear()
            if _has_sixteen_bits(original[1]):
                return self._emulated(original[1], folded[1], feeds)
            if max(weight_bytes(model) for model in (original[1], folded[1])) > EVALUATOR_LIMIT:
                raise
            self.notes.append(f"both models ran in onnx.reference: {error}")
            return self._both(evaluator, original[1], folded[1], feeds)

    def _emulated(self, original: ir.Model, folded: ir.Model, feeds: list[Feed]) -> list[Run]:
        if _has_sixteen_bits(original):
            self.notes.append(
                f"both models ran in float32 with every operator's result rounded to"
                f" {precision(original).name}, on the {self.provider} provider"
            )
        to = ir.DataType.FLOAT
        wide = [widen(model, to, rounded=True) for model in (original, folded)]
        return self._both(self._session, wide[0], wide[1], feeds, to)

    def _session(self, model: ModelSource) -> Function:
        return functools.partial(runtime.run, runtime.session(model, self.provider))

    def _both(
        self,
        engine: Callable[[Any], Function],
        original: ModelSource,
        folded: ModelSource,
        feeds: list[Feed],
        to: ir.DataType | None = None,
    ) -> list[Run]:
        """Run both models, on floats widened ``to`` the type that they expect."""
        function = _widening(engine(original), to)
        runs = [run for feed in feeds if (run := self._try(function, feed))]
        if not runs:
            raise UsageError(f"{self.notes.pop()}; pass shapes or inputs that fit the model")
        if self.greedy is not None:
            self.greedy.run_original(function)
        try:
            function = _widening(engine(folded), to)
            for run in runs:
                run.folded = function(run.feed.arrays)
            if self.greedy is not None:
                self.greedy.run_folded(function)
        except (InvalidModelError, RunFailedError) as error:
            raise _FoldedFailedError(str(error)) from error
        return runs

    def _try(self, function: Function, feed: Feed) -> Run | None:
        try:
            return Run(feed, function(feed.arrays))
        except RunFailedError as error:
            if not feed.optional:
                raise
            self.notes.append(f"{feed.label} was skipped, the original does not run it: {error}")
            return None

    def reference(self, model: ir.Model, runs: list[Run]) -> None:
        """Run ``model`` in a wider type where that can be done, else say why not."""
        dtype = precision(model)
        to = ir.DataType.FLOAT if dtype in SIXTEEN_BITS else ir.DataType.DOUBLE
        size = weight_bytes(model) * to.itemsize / dtype.itemsize
        if dtype == ir.DataType.DOUBLE or size > REFERENCE_LIMIT:
            why = (
                "no wider type" if dtype == to else f"its weights would take {size / 2**30:.0f} GiB"
            )
            self.notes.append(f"no reference ({why}): the tolerance decides")
            return
        try:
            wide = widen(model, to)
            outputs = self._wide_outputs(wide, [run.feed.arrays for run in runs], to, size)
        except (InvalidModelError, UsageError) as error:
            logger.debug("no reference", exc_info=True)
            self.notes.append(f"no reference in {to.name} ({error}): the tolerance decides")
            return
        for run, reference in zip(runs, outputs, strict=True):
            run.reference = reference

    def _wide_outputs(
        self, wide: ir.Model, feeds: list[Arrays], to: ir.DataType, size: float
    ) -> list[Arrays]:
        for provider in dict.fromkeys((self.provider, "cpu")):
            try:
                function = functools.partial(runtime.run, runtime.session(wide, provider))
                return [*map(_widening(function, to), feeds)]
            except (InvalidModelError, RunFailedError) as error:
                if provider == "cpu" and size > EVALUATOR_LIMIT:
                    raise
                logger.debug("no reference on %s: %s", provider, error)
        outputs = [*map(_widening(evaluator(wide), to), feeds)]
        self.notes.append("the reference was computed by onnx.reference")
        return outputs


def _has_sixteen_bits(model: ir.Model) -> bool:
    values = (v for node in model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v)
    return precision(model) in SIXTEEN_BITS or any(v.dtype in SIXTEEN_BITS for v in values)


def _widening(function: Function, to: ir.DataType | None) -> Function:
    """Return ``function`` with input floats that are narrower than ``to`` converted first."""
    if to is None:
        return function
    wide, width = to.numpy(), to.itemsize
    return lambda arrays: function(
        {
            name: array.astype(wide) if is_float(array) and array.itemsize < width else array
            for name, array in arrays.items()
        }
    )


def evaluator(model: ir.Model) -> Function:
    """Return ``model`` as a function, computed by ``onnx.reference`` in NumPy."""
    proto = ir.to_proto(ir.external_data.load_to_model(model.clone()))
    try:
        evaluator = ReferenceEvaluator(proto)
    except Exception as error:
        raise InvalidModelError(f"onnx.reference cannot load it: {_short(error)}") from error

    def run(inputs: Arrays) -> Arrays:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results = evaluator.run(None, inputs)
            except Exception as error:  # whatever the NumPy code of an operator raises
                raise RunFailedError(f"onnx.reference cannot run it: {_short(error)}") from error
        return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))

    return run


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


# --- Showing -------------------------------------------------------------------------------------


_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("relative", "relative_error", ".1e"),
    ("original", "error_original", ".1e"),
    ("folded", "error_folded", ".1e"),
    ("ratio", "ratio", ".3g"),
    ("limit", "limit", ".1e"),
    ("top-1", "top1_agreement", ".1%"),
    ("KL", "kl_divergence", ".1e"),
)


_ROWS = 12


def _table(report: ParityReport) -> Table:
    """Return a row for each output, of many only those nearest their limit; no empty columns."""
    columns = [c for c in _COLUMNS if any(getattr(o, c[1]) is not None for o in report.outputs)]
    rows = report.outputs
    captions = []
    if any(name == "error_original" for _, name, _ in columns):
        captions.append("original, folded: relative error against a wider reference")
    if len(rows) > _ROWS:
        captions.append(f"{len(rows) - _ROWS} further outputs lie deeper within their limits")
        rows = sorted(rows, key=_margin)[:_ROWS]
    table = figures_table(
        f"Parity in {report.dtype.lower()} on {report.provider}: {_inputs(report.shapes)}",
        "; ".join(captions) or None,
    )
    table.add_column("output", overflow="fold")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for output in rows:
        cells = [_cell(getattr(output, name), form) for _, name, form in columns]
        table.add_row(output.name, *cells, style=None if output.ok else "red")
    return table


def _margin(output: OutputParity) -> tuple[bool, float]:
    error = output.relative_error if output.error_folded is None else output.error_folded
    return output.ok, -error / output.limit if output.limit else 0.0


def _inputs(shapes: Sequence[str]) -> str:
    times = {shape: shapes.count(shape) for shape in shapes}
    return ", ".join(f"{shape} ({n}x)" if n > 1 else shape for shape, n in times.items())


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form) if value else "0"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
