"""The parity check: do two models compute the same function?

Both models run on the same inputs, and every output ``a`` of the original is compared with ``b`` of
the folded model:

    max abs error    max |a - b|
    relative error   ||a - b||_2 / ||a||_2
    cosine           <a, b> / (||a||_2 ||b||_2)

Two equal functions differ by their rounding errors, so the question is how large these may be. The
yardstick is the original's own: it also runs in a wider type (float32 for 16 bits, float64 for
float32), with the same weights, which gives the reference ``r``, and

    error of the original  e_o = ||a - r||_2 / ||r||_2
    error of the folded    e_f = ||b - r||_2 / ||r||_2.

**The rule.** A float output passes if ``e_f`` is at most the limit

    max(tolerance, min(max_ratio * (e_o + u), 4 * sqrt(u))),

where ``u`` is the unit roundoff of the type (2^-24 for float32). The tolerance is an error that is
small whatever the original's is; the ratio allows for models that amplify rounding errors; and
nothing passes by its ratio once half of the digits are lost (``sqrt(u)``, and two bits).
Without a reference, or if ``e_o`` itself is beyond that point, ``e_o`` counts as 0 and the relative
error stands for ``e_f``. ``tolerance=0`` leaves the ratio
alone to decide, ``max_ratio=0`` the tolerance. Integers, booleans and strings must be equal, and
NaN and infinity must be at the same places.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.special import log_softmax

from onnx_fold import runtime
from onnx_fold.basis import MAX_RATIO
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.files import ModelSource, load, weight_bytes
from onnx_fold.inputs import has_cache, index_limits, make_inputs, model_inputs
from onnx_fold.runtime import Array, MissingKernelError, RunFailedError
from onnx_fold.widen import SIXTEEN_BITS, precision, unit_roundoff, widen

__all__ = ["MAX_RATIO", "TOLERANCE", "OutputParity", "ParityReport", "verify"]

logger = logging.getLogger(__name__)

Arrays: TypeAlias = dict[str, Array]
_Function: TypeAlias = Callable[[Arrays], Arrays]

TOLERANCE = {
    ir.DataType.DOUBLE: 1e-10,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 5e-2,
}
"""The relative error that always passes, by the float type of the weights."""

REFERENCE_LIMIT = 8 * 2**30
"""Bytes of widened weights up to which a reference is computed."""

EVALUATOR_LIMIT = 2 * 2**30
"""The same for ``onnx.reference``, which holds every weight twice."""


@dataclass
class OutputParity:
    """How one output differs, at its worst over all inputs.

    Attributes:
        name: Name of the output.
        dtype: Its type in the original, such as ``FLOAT16``.
        ok: Whether it passes.
        reason: Why it does not.
        max_abs_error: ``max |a - b|``.
        relative_error: ``||a - b||_2 / ||a||_2``.
        cosine: ``<a, b> / (||a||_2 ||b||_2)``.
        error_original: ``||a - r||_2 / ||r||_2``, None without a reference.
        error_folded: ``||b - r||_2 / ||r||_2``, None without a reference.
        ratio: ``error_folded / error_original``, None if the latter is None or 0.
        limit: The error up to which the output passes, None for exact types.
        top1_agreement: For logits, the share of rows with the same largest element.
        kl_divergence: For logits, mean of ``KL(softmax(a) || softmax(b))`` in nats.
    """

    name: str
    dtype: str
    ok: bool = True
    reason: str = ""
    max_abs_error: float = 0.0
    relative_error: float = 0.0
    cosine: float = 1.0
    error_original: float | None = None
    error_folded: float | None = None
    ratio: float | None = None
    limit: float | None = None
    top1_agreement: float | None = None
    kl_divergence: float | None = None


@dataclass
class ParityReport:
    """Whether two models compute the same function.

    Attributes:
        ok: Whether every output passes.
        reason: Why not.
        provider: The execution provider that both models ran on.
        dtype: The float type of the original's weights.
        outputs: One entry for each output.
        shapes: The inputs that were run, in words.
        notes: What a reader must know to judge the numbers.
        scope: What was run; empty if it was both models whole.
    """

    ok: bool
    reason: str = ""
    provider: str = "cpu"
    dtype: str = ""
    outputs: list[OutputParity] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scope: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; infinity and NaN become None."""
        report: dict[str, Any] = _finite(asdict(self))
        return report

    def __rich__(self) -> RenderableType:
        """Return the verdict, a table of the outputs, and the notes."""
        verdict = Text("same function", "bold green") if self.ok else Text("differs", "bold red")
        if self.scope:
            verdict.append(f" in {self.scope}", "default")
        if self.reason:
            verdict.append(f": {self.reason}", "default")
        notes = [Text(f"- {note}", "dim") for note in self.notes]
        return Group(*([_table(self)] if self.outputs else []), verdict, *notes)


def verify(
    original: ModelSource,
    folded: ModelSource,
    *,
    provider: str = "cpu",
    samples: int = 1,
    shapes: Sequence[Mapping[str, int]] | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    tolerance: float | None = None,
    max_ratio: float = MAX_RATIO,
    reference: bool = True,
    emulate: bool | None = None,
    seed: int = 0,
) -> ParityReport:
    """Run both models on the same inputs and judge the differences by the rule of this module.

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
        tolerance: See the rule; by default by the type of the weights, ``TOLERANCE``.
        max_ratio: See the rule.
        reference: Run the original in a wider type too; without it the tolerance decides.
        emulate: Run 16-bit models in float32, each operator's result rounded to 16 bits (which is
            what 16-bit hardware computes). By default where the provider cannot run the type
            itself: bfloat16 on the CPU, or a missing kernel.
        seed: Seed of the random inputs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The provider, the inputs or the shapes do not fit, or the original cannot run.
        InvalidModelError: One of the models cannot be read, or the original cannot be loaded. A
            folded model that ONNX Runtime does not load or run is a failed report.
    """
    before, after = load(original), load(folded)
    provider = runtime.resolve_provider(provider)
    report = ParityReport(False, provider=provider, dtype=precision(before).name)
    report.reason = _signature_difference(before, after)
    if report.reason:
        return report
    feeds = _feeds(before, inputs, shapes, samples, seed)
    run = _Runner(provider, emulate, report.notes)
    try:
        runs = run.pair((original, before), (folded, after), feeds)
    except _FoldedFailedError as error:
        report.reason = f"the folded model does not run where the original does: {error}"
        return report
    if reference:
        run.reference(before, runs)
    report.shapes = [pair.feed.label for pair in runs]
    judge = _Judge(before, tolerance, max_ratio, report.notes)
    report.outputs = [judge.output(name, runs) for name in runs[0].original]
    failed = [
        f"output '{output.name}': {output.reason}" for output in report.outputs if output.reason
    ]
    report.ok = not failed
    report.reason = "; ".join(failed[:3])
    return report


# --- Before the run: signatures and inputs -------------------------------------------------------


def _signature_difference(before: ir.Model, after: ir.Model) -> str:
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


@dataclass
class _Feed:
    """Inputs by name; ``optional`` ones may be skipped if the original cannot run them."""

    label: str
    arrays: Arrays
    optional: bool = False


def _feeds(
    model: ir.Model,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None,
    shapes: Sequence[Mapping[str, int]] | None,
    samples: int,
    seed: int,
) -> list[_Feed]:
    if inputs is not None:
        if shapes is not None:
            raise UsageError("pass either inputs or shapes, not both")
        return [_Feed("given inputs", given_inputs(model, inputs))]
    if samples < 1 or (shapes is not None and not shapes):
        raise UsageError("nothing to run: at least one sample and one shape are needed")
    defaults: list[dict[str, int]] = [{"batch": 1, "seq": 8}, {"batch": 2, "seq": 16}]
    if has_cache(model):
        defaults[0]["past"], defaults[1]["past"] = 5, 0
    feeds: list[_Feed] = []
    for sizes in shapes or defaults:
        _check_sizes(model, sizes)
        known: Any = {name: sizes[name] for name in ("batch", "seq", "past") if name in sizes}
        label = " ".join(f"{name}={size}" for name, size in sizes.items())
        for _ in range(samples):
            arrays = make_inputs(model, **known, sizes=sizes, seed=seed + len(feeds))
            feeds.append(_Feed(label, arrays, optional=shapes is None))
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


def given_inputs(model: ir.Model, inputs: str | os.PathLike[str] | Mapping[str, Array]) -> Arrays:
    """Read the inputs of ``model`` from arrays or an ``.npz`` file, in the types it takes.

    Raises:
        UsageError: An input is unknown, missing, or does not fit.
    """
    arrays = dict(inputs) if isinstance(inputs, Mapping) else _read_npz(inputs)
    known = {str(value.name): value for value in model.graph.inputs}
    needed = {str(value.name) for value in model_inputs(model)}
    if unknown := sorted(set(arrays) - set(known)):
        raise UsageError(f"unknown input '{unknown[0]}': the model takes {_listed(list(known))}")
    if missing := sorted(needed - set(arrays)):
        raise UsageError(f"input '{missing[0]}' is missing from the given inputs")
    return {name: _fitted(known[name], array) for name, array in arrays.items()}


def _read_npz(path: str | os.PathLike[str]) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read inputs from {os.fspath(path)}: {error}") from error


def _fitted(value: ir.Value, array: Array) -> Array:
    """Return ``array`` in the type of ``value``; npz files know no bfloat16 and hold raw bytes."""
    array = np.asarray(array)
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        return array
    wanted = value.dtype.numpy()
    if array.dtype.kind == "V" and array.itemsize == wanted.itemsize:
        array = array.view(wanted)
    if value.shape is not None and array.ndim != len(value.shape):
        raise UsageError(f"input '{value.name}' has rank {len(value.shape)}, not {array.ndim}")
    if _is_float(array) != value.dtype.is_floating_point():
        raise UsageError(f"input '{value.name}' is {value.dtype.name}, not {array.dtype}")
    return array.astype(wanted)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype in (t.numpy() for t in SIXTEEN_BITS)


# --- Running -------------------------------------------------------------------------------------


class _FoldedFailedError(Exception):
    """The folded model cannot run inputs that the original ran."""


@dataclass
class _Run:
    """The outputs of the models for one feed."""

    feed: _Feed
    original: Arrays
    folded: Arrays = field(default_factory=dict)
    reference: Arrays | None = None


@dataclass
class _Runner:
    """Runs models one after another, each in a session that is dropped before the next is made."""

    provider: str
    emulate: bool | None
    notes: list[str]

    def pair(
        self,
        original: tuple[ModelSource, ir.Model],
        folded: tuple[ModelSource, ir.Model],
        feeds: list[_Feed],
    ) -> list[_Run]:
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
            return self._both(_evaluator, original[1], folded[1], feeds)

    def _emulated(self, original: ir.Model, folded: ir.Model, feeds: list[_Feed]) -> list[_Run]:
        if _has_sixteen_bits(original):
            self.notes.append(
                f"both models ran in float32 with every operator's result rounded to"
                f" {precision(original).name}, on the {self.provider} provider"
            )
        to = ir.DataType.FLOAT
        wide = [widen(model, to, rounded=True) for model in (original, folded)]
        return self._both(self._session, wide[0], wide[1], feeds, to)

    def _session(self, model: ModelSource) -> _Function:
        return functools.partial(runtime.run, runtime.session(model, self.provider))

    def _both(
        self,
        engine: Callable[[Any], _Function],
        original: ModelSource,
        folded: ModelSource,
        feeds: list[_Feed],
        to: ir.DataType | None = None,
    ) -> list[_Run]:
        """Run both models, on floats widened ``to`` the type that they expect."""
        function = engine(original)
        runs = [run for feed in feeds if (run := self._try(function, feed, to))]
        if not runs:
            raise UsageError(f"{self.notes.pop()}; pass shapes or inputs that fit the model")
        try:
            function = engine(folded)
            for run in runs:
                run.folded = function(_widened(run.feed.arrays, to))
        except (InvalidModelError, RunFailedError) as error:
            raise _FoldedFailedError(str(error)) from error
        return runs

    def _try(self, function: _Function, feed: _Feed, to: ir.DataType | None) -> _Run | None:
        try:
            return _Run(feed, function(_widened(feed.arrays, to)))
        except RunFailedError as error:
            if not feed.optional:
                raise
            self.notes.append(f"{feed.label} was skipped, the original does not run it: {error}")
            return None

    def reference(self, model: ir.Model, runs: list[_Run]) -> None:
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
        wide = widen(model, to)
        feeds = [_widened(run.feed.arrays, to) for run in runs]
        try:
            outputs = self._wide_outputs(wide, feeds, size)
        except (InvalidModelError, RunFailedError) as error:
            logger.debug("no reference", exc_info=True)
            self.notes.append(f"no reference in {to.name} ({error}): the tolerance decides")
            return
        for run, reference in zip(runs, outputs, strict=True):
            run.reference = reference

    def _wide_outputs(self, wide: ir.Model, feeds: list[Arrays], size: float) -> list[Arrays]:
        try:
            return [*map(self._session(wide), feeds)]
        except (InvalidModelError, RunFailedError) as error:
            if size > EVALUATOR_LIMIT:
                raise
            logger.debug("reference by onnx.reference: %s", error)
        outputs = [*map(_evaluator(wide), feeds)]
        self.notes.append("the reference was computed by onnx.reference")
        return outputs


def _has_sixteen_bits(model: ir.Model) -> bool:
    values = (v for node in model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v)
    return precision(model) in SIXTEEN_BITS or any(v.dtype in SIXTEEN_BITS for v in values)


def _widened(arrays: Arrays, to: ir.DataType | None) -> Arrays:
    """Return ``arrays`` with the floats that are narrower than ``to`` converted."""
    if to is None:
        return arrays
    wide, width = to.numpy(), to.itemsize
    return {
        name: array.astype(wide) if _is_float(array) and array.itemsize < width else array
        for name, array in arrays.items()
    }


def _evaluator(model: ir.Model) -> _Function:
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


# --- Judging -------------------------------------------------------------------------------------


@dataclass
class _Judge:
    """Applies the rule of this module to the outputs of a model."""

    model: ir.Model
    tolerance: float | None
    max_ratio: float
    notes: list[str]

    def __post_init__(self) -> None:
        self.vocabularies = set(index_limits(self.model).values())

    def output(self, name: str, runs: Sequence[_Run]) -> OutputParity:
        """Compare one output over all runs."""
        whole = name.partition("[")[0]  # of a sequence y the elements are called y[0], y[1], ...
        outputs = self.model.graph.outputs
        value = next((v for v in outputs if v.name in (name, whole)), None)
        dtype = None if value is None else value.dtype
        result = OutputParity(name, "" if dtype is None else dtype.name)
        for run in runs:
            self._compare(result, run)
            if result.reason:
                break
        else:
            if _is_float(runs[0].original[name]):
                self._apply_rule(result, dtype)
        result.ok = not result.reason
        return result

    def _compare(self, result: OutputParity, run: _Run) -> None:
        """Raise the errors in ``result`` to those of ``run``, or set its reason if it fails."""
        a, b = run.original[result.name], run.folded.get(result.name)
        if b is None or a.shape != b.shape:
            shape = "missing" if b is None else list(b.shape)
            result.reason = f"shape {list(a.shape)} became {shape} ({run.feed.label})"
        elif not _is_float(a):
            if not np.array_equal(a, b):
                count = int(np.count_nonzero(a != b))
                result.max_abs_error = _exact_distance(a, b)
                result.reason = f"{count} of {a.size} elements differ ({run.feed.label})"
        else:
            reference = None if run.reference is None else run.reference.get(result.name)
            self._compare_floats(result, _wide(a), _wide(b), reference, run.feed.label)

    def _compare_floats(
        self, result: OutputParity, a: Array, b: Array, reference: Array | None, label: str
    ) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            where = "the folded model" if np.isfinite(a[~finite]).any() else "the original"
            count = a.size - int(np.count_nonzero(finite))
            result.reason = f"NaN or infinity in {where} at {count} of {a.size} elements ({label})"
            return
        if not finite.all():
            self._note(f"output '{result.name}': equal NaN or infinity in both models, left out")
        if self._is_logits(result.name, a) and finite.all():
            top1, kl = _compare_logits(a, b)
            result.top1_agreement = min(top1, _or(result.top1_agreement, top1))
            result.kl_divergence = max(kl, _or(result.kl_divergence, kl))
        x, y = a[finite], b[finite]
        result.max_abs_error = max(result.max_abs_error, float(np.abs(x - y).max(initial=0.0)))
        result.relative_error = max(result.relative_error, _relative_error(y, x))
        result.cosine = min(result.cosine, _cosine(x, y))
        if reference is None:
            return
        r = _wide(reference)[finite]
        if not np.isfinite(r).all():
            self._note(f"output '{result.name}': NaN or infinity in the reference ({label})")
            return
        result.error_original = max(_relative_error(x, r), _or(result.error_original, 0.0))
        result.error_folded = max(_relative_error(y, r), _or(result.error_folded, 0.0))

    def _apply_rule(self, result: OutputParity, dtype: ir.DataType | None) -> None:
        dtypes = [precision(self.model), *([dtype] if dtype in TOLERANCE else [])]
        coarsest = max(dtypes, key=unit_roundoff)
        u = unit_roundoff(coarsest)
        tolerance = TOLERANCE[coarsest] if self.tolerance is None else self.tolerance
        ceiling = 4 * math.sqrt(u)
        own, error = result.error_original, result.error_folded
        if own:
            result.ratio = _or(error, 0.0) / own
        if own is not None and own > ceiling:
            self._note(
                f"output '{result.name}': the original is {own:.0e} off its own reference, which is"
                " no yardstick"
            )
            own = None
        if own is None or error is None:
            own, error = 0.0, result.relative_error
        result.limit = max(tolerance, min(self.max_ratio * (own + u), ceiling))
        if not error <= result.limit:
            times = "" if result.ratio is None else f", {result.ratio:.3g}x the original's own"
            result.reason = f"error {error:.1e} is over the limit {result.limit:.1e}{times}"

    def _is_logits(self, name: str, a: Array) -> bool:
        named = "logits" in name.lower()
        return a.ndim > 0 and a.size > 0 and (named or a.shape[-1] in self.vocabularies)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _relative_error(x: Array, reference: Array) -> float:
    """Return ``||x - reference||_2 / ||reference||_2``, of two zeros 0."""
    difference, norm = float(np.linalg.norm(x - reference)), float(np.linalg.norm(reference))
    if norm == 0.0:
        return math.inf if difference else 0.0
    return difference / norm


def _cosine(x: Array, y: Array) -> float:
    norms = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    if norms == 0.0:
        return 1.0 if np.array_equal(x, y) else 0.0
    return float(np.dot(x, y)) / norms


def _exact_distance(a: Array, b: Array) -> float:
    if a.dtype.kind not in "iub":
        return math.nan
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _compare_logits(a: Array, b: Array) -> tuple[float, float]:
    """Return the share of equal top-1 and the mean ``KL(softmax(a) || softmax(b))`` in nats."""
    p, q = log_softmax(a, axis=-1), log_softmax(b, axis=-1)
    top1 = np.mean(a.argmax(axis=-1) == b.argmax(axis=-1))
    return float(top1), max(0.0, float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))))


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
    table = Table(
        title=f"Parity in {report.dtype.lower()} on {report.provider}: {_inputs(report.shapes)}",
        caption="; ".join(captions) or None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("output", overflow="fold")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for output in rows:
        cells = [_cell(getattr(output, name), form) for _, name, form in columns]
        table.add_row(output.name, *cells, style=None if output.ok else "red")
    return table


def _margin(output: OutputParity) -> tuple[bool, float]:
    error = _or(output.error_folded, output.relative_error)
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
