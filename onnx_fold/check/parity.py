"""The parity check: do two models compute the same function?

Both models run on the same inputs, one after another, the original also in a wider type, and
:mod:`onnx_fold.check.judge` says by its rule whether the outputs differ by more than rounding
errors.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.text import Text

from onnx_fold.algebra import basis
from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import SIXTEEN_BITS, is_float
from onnx_fold.base.arguments import Provider, several
from onnx_fold.base.progress import Report, ignore
from onnx_fold.base.schema import SCHEMA_VERSION
from onnx_fold.base.tables import ORIGINAL_AND_FOLDED, Shown, headings
from onnx_fold.check import kernels
from onnx_fold.check.feeds import frozen_feeds, make_feeds
from onnx_fold.check.judge import Feed, Judge, OutputParity, Run
from onnx_fold.check.parity_table import parity_table
from onnx_fold.check.stored import StoredParity, compare_stored
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.files.load import ModelSource, blames_models, weight_bytes
from onnx_fold.graph.widen import precision, widen
from onnx_fold.runtime import sessions
from onnx_fold.runtime.environment import environment
from onnx_fold.runtime.generate import Decoder, Function, GreedyCheck, GreedyParity
from onnx_fold.runtime.inputs import Arrays, Ranges, input_symbols
from onnx_fold.runtime.module import ModuleFunction, is_module
from onnx_fold.runtime.pair import Pair
from onnx_fold.runtime.sessions import MissingKernelError, RunFailedError

if TYPE_CHECKING:
    import torch

__all__ = ["ParityReport", "verify"]

logger = logging.getLogger(__name__)

REFERENCE_LIMIT = 8 * 2**30
"""Bytes of widened weights up to which a reference is computed."""

RUN_ONCE = {"session.disable_prepacking": "1"}
"""ONNX Runtime packs a second copy of the weights, which pays off after many runs."""

STORED_LIMIT = 2**30
"""Bytes of widened weights up to which they are compared as stored."""

EVALUATOR_LIMIT = 2 * 2**30
"""The same for ``onnx.reference``, which holds every weight twice."""


@dataclass
class ParityReport(Shown):
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
        stored: How far the weights differ, as stored, if that was compared.
        greedy: Whether both models write the same tokens, if that was asked.
        environment: Machine and versions, see :func:`onnx_fold.runtime.environment.environment`.
        against: What the original is, if it is no ONNX model: ``the PyTorch module``.
        names: What the two models are called in tables: their files, where these names are short.
    """

    ok: bool
    reason: str = ""
    provider: Provider = "cpu"
    dtype: str = ""
    outputs: list[OutputParity] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scope: str = ""
    stored: StoredParity | None = None
    greedy: GreedyParity | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    against: str = ""
    names: tuple[str, str] = ORIGINAL_AND_FOLDED

    def __bool__(self) -> bool:
        """Whether the models compute the same function: ``assert verify(a, b)`` means it."""
        return self.ok

    def __repr__(self) -> str:
        verdict = "same function" if self.ok else f"differs: {self.reason}"
        return f"<ParityReport: {verdict}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; infinity and NaN become None."""
        report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **_finite(asdict(self))}
        return report

    def __rich__(self) -> RenderableType:
        """Return a table of the outputs, the verdict, and the notes."""
        verdict = Text("same function", "bold green") if self.ok else Text("differs", "bold red")
        if self.ok and (left_out := max((o.left_out for o in self.outputs), default=0.0)):
            verdict.append(
                f" but for up to {100 * left_out:.3g} % of an output, left out", "default"
            )
        if self.scope:
            verdict.append(f" in {self.scope}", "default")
        if self.reason:
            verdict.append(f": {self.reason}", "default")
        notes = [Text(f"- {note}", "dim") for note in self.notes]
        table = [parity_table(self)] if self.outputs else []
        checks = [check for check in (self.stored, self.greedy) if check is not None and check.ok]
        return Group(*table, *(Text(str(check)) for check in checks), verdict, *notes)


@blames_models
def verify(
    original: ModelSource | torch.nn.Module,
    folded: ModelSource,
    *,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    provider: Provider = "auto",
    samples: int = 1,
    shapes: Mapping[str, int] | Iterable[Mapping[str, int]] | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    ranges: Ranges | None = None,
    tolerance: float | None = None,
    max_ratio: float | None = None,
    reference: bool = True,
    emulate: bool | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    any_float: bool = False,
    map: Mapping[str, str] | None = None,  # noqa: A002
    at: str | Iterable[str] = (),
    greedy: int | None = None,
    seed: int = 0,
    progress: Report = ignore,
) -> ParityReport:
    """Run both models on the same inputs and judge by the rule of :mod:`onnx_fold.check.judge`.

    Models are run one after another, each loaded once.

    Args:
        original: The model before the fold, or the ``torch.nn.Module`` that was exported. The
            latter runs where it is, in evaluation mode, and its copy in a wider type is the
            reference.
        folded: The model after it.
        args: Arguments of the module, as ``torch.onnx.export`` takes them. It runs on these, and
            on those ``shapes`` that it takes, of the kind that the model's own inputs are.
        kwargs: Its keyword arguments.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        samples: Random inputs of each shape.
        shapes: Sizes of the inputs: ``batch``, ``seq``, ``past``, or the name of any symbolic
            dimension. By default short and long ones, one row and many, one token, and other
            sizes for dimensions of other names, see :mod:`onnx_fold.check.feeds`; where the
            original runs none of these, sizes that its graph holds. Of a module, ``()`` for its
            arguments alone.
        inputs: The inputs to run instead of random ones: arrays by name, or an ``.npz`` file.
        ranges: The lowest and highest value of random inputs, by their names, both included.
        tolerance: A relative error that no output may exceed; it only tightens the rule.
        max_ratio: See the rule; by default the largest with which ``fold`` takes anything: 8, and 6
            in 16 bits.
        reference: Run the original in a wider type too; without it the tolerance decides.
        emulate: Run 16-bit models in float32, each operator's result rounded to 16 bits (which is
            what 16-bit hardware computes). By default where the provider cannot run the type
            itself: bfloat16 on the CPU, or a missing kernel; and beside the run as they are where
            it computes another type: float16 on the CPU, in float32. False never does.
        atol: Judge by NumPy's ``allclose`` instead: ``|a - b| <= atol + rtol |a|`` everywhere,
            with ``a`` of the original; what is not given is 0. No reference is run.
        rtol: See ``atol``.
        any_float: Inputs, outputs and weights of the two may be of other float types, such as of a
            model and its float16 version. Where they are, both are given inputs that either type
            holds, and the tolerance of the coarser one decides,
            :data:`onnx_fold.check.judge.TOLERANCE`: neither has an error to measure the other by.
        map: Inputs, outputs and inner values of the original, and what the folded model calls them,
            where it calls them otherwise.
        at: Names of inner values, which are compared like outputs, in the order in which the
            original computes them, to find where two models part. Values within a folded stream may
            be in another basis, and differ for that.
        greedy: Tokens that the models write greedily, too, by the rule of
            :mod:`onnx_fold.runtime.generate`. The prompt is a few random tokens, or that among
            ``inputs``, which may then lack whatever follows from it.
        seed: Seed of the random inputs.
        progress: Is told which model runs on which inputs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The provider, the inputs or the shapes do not fit, the original cannot run or
            generate, options exclude each other, or a name in ``map`` or ``at`` is unknown.
        InvalidModelError: One of the models cannot be read, or the original cannot be loaded. A
            folded model that ONNX Runtime does not load or run is a failed report.
    """
    close = _allclose(atol, rtol, tolerance)
    if greedy is not None and (close is not None or any_float):
        raise UsageError("greedy decoding has a rule of its own: not with atol, rtol, any_float")
    if is_module(original):
        if map or at or any_float:
            raise UsageError("map, at and any_float are for two ONNX models, not for a module")
        if inputs is not None or greedy is not None:
            raise UsageError("a module runs on its args: inputs and greedy are for ONNX models")
    pair = Pair.of(original, folded, args, kwargs)
    provider = sessions.resolve_provider(provider)
    report = ParityReport(
        False,
        provider=provider,
        dtype=precision(pair.before).name,
        environment=environment(provider),
        against="" if pair.module is None else "the PyTorch module",
        names=headings(original, folded),
    )
    pair = pair.renamed(map or {})
    report.reason = pair.difference(any_float=any_float)
    if report.reason:
        return report
    if any_float:
        pair = pair.of_any_float()
    check = None
    if greedy is not None:
        decoder = Decoder.of(pair.before)
        check = GreedyCheck(decoder, decoder.start(inputs, seed), greedy)
        inputs = None if inputs is None else check.start
    feeds, more = _feeds(pair, inputs, shapes, samples, seed, ranges)
    whole, pair = pair, pair.comparing(several(at))
    if close is None and pair.module is None:
        pair = pair.unsquashed()
    run = _Runner(pair, provider, emulate, report.notes, check, more, progress)
    try:
        runs = run.both(feeds)
    except _FoldedFailedError as error:
        report.reason = f"the folded model does not run where the original does: {error}"
        return report
    report.notes += _rule(pair, close)
    reference &= close is None and not pair.types
    if reference:
        run.reference(runs)
        run.rounded(runs)
    report.shapes = [each.feed.label for each in runs]
    max_ratio = basis.max_ratio(precision(pair.before)) if max_ratio is None else max_ratio
    other = pair.after if pair.types else None
    known = pair.inner, pair.squashed
    judge = Judge(pair.before, tolerance, max_ratio, report.notes, other, close, *known)
    report.outputs = [judge.output(name, runs) for name in runs[0].original]
    failed = [
        f"output '{output.name}': {output.reason}" for output in report.outputs if output.reason
    ]
    if reference and not failed and pair.module is None:
        report.stored = run.stored(whole, runs)
        if report.stored is not None and not report.stored.ok:
            failed.append(str(report.stored))
    if check is not None:
        report.greedy = judge.greedy(check)
        if not report.greedy.ok:
            failed.insert(0, str(report.greedy))
    report.ok = not failed
    report.reason = "; ".join(failed[:3])
    return report


def _rule(pair: Pair, close: tuple[float, float] | None) -> Iterator[str]:
    """Say which rule holds where it is not the one of the ratio."""
    if pair.types:
        yield (
            "the models are of different float types: both were given inputs that either type holds"
        )
    if close is not None:
        yield (
            "the rule is NumPy's allclose: |a - b| <= atol + rtol |a| for every element,"
            f" with atol {close[0]:g} and rtol {close[1]:g}"
        )
    elif pair.types:
        yield "the rule is the tolerance of the coarser type"


# --- Inputs --------------------------------------------------------------------------------------


def _feeds(
    pair: Pair,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None,
    shapes: Mapping[str, int] | Iterable[Mapping[str, int]] | None,
    samples: int,
    seed: int,
    ranges: Ranges | None,
) -> tuple[list[Feed], Iterable[Feed]]:
    """What to run on, and of what to run the first that goes, where nothing of that does."""
    sizes = None if shapes is None else several(shapes)
    if pair.module is not None:
        return _module_feeds(pair.module, pair.after, sizes, samples, seed, ranges), ()
    feeds = make_feeds(pair.before, inputs, sizes, samples, seed, ranges)
    more = frozen_feeds(pair.before, seed, ranges) if inputs is None and shapes is None else ()
    if pair.types:
        return list(_held_by(pair.types, feeds)), _held_by(pair.types, more)
    return feeds, more


def _module_feeds(
    module: ModuleFunction,
    model: ir.Model,
    shapes: Sequence[Mapping[str, int]] | None,
    samples: int,
    seed: int,
    ranges: Ranges | None,
) -> list[Feed]:
    """Return the module's arguments, and others of the given shapes, or of the default ones."""
    feeds = [Feed("the given arguments", module.arrays(model))]
    if shapes or (shapes is None and input_symbols(model)):
        feeds += make_feeds(model, None, shapes, samples, seed, ranges)
    return feeds


def _allclose(
    atol: float | None, rtol: float | None, tolerance: float | None
) -> tuple[float, float] | None:
    """``atol`` and ``rtol`` if either is given.

    Raises:
        UsageError: One is negative or no number, or there is a tolerance, too.
    """
    if atol is None and rtol is None:
        return None
    close = atol or 0.0, rtol or 0.0
    if not all(0 <= each < math.inf for each in close):
        raise UsageError("atol and rtol must be numbers of at least 0")
    if tolerance is not None:
        raise UsageError("a tolerance is for the rule of the ratio, which atol and rtol replace")
    return close


def _held_by(types: Mapping[str, ir.DataType], feeds: Iterable[Feed]) -> Iterator[Feed]:
    """Yield ``feeds``, with floats rounded to what ``types`` hold, but in the types that they have.

    Raises:
        UsageError: A number is too large for that.
    """
    for feed in feeds:
        with np.errstate(over="ignore"):
            narrow = _converted(types, feed.arrays)
        for name, array in feed.arrays.items():
            if is_float(array) and (np.isfinite(narrow[name]) != np.isfinite(array)).any():
                raise UsageError(f"input '{name}' has numbers that {types[name].name} cannot hold")
        arrays = {name: narrow[name].astype(array.dtype) for name, array in feed.arrays.items()}
        yield replace(feed, arrays=arrays)


def _converted(types: Mapping[str, ir.DataType], arrays: Arrays) -> Arrays:
    """``arrays`` with floats in these ``types``."""
    return {
        name: array.astype(types[name].numpy()) if name in types and is_float(array) else array
        for name, array in arrays.items()
    }


# --- Running -------------------------------------------------------------------------------------


class _FoldedFailedError(Exception):
    """The folded model cannot run inputs that the original ran."""


@dataclass
class _Runner:
    """Runs models one after another, each in a session that is dropped before the next is made."""

    pair: Pair
    provider: Provider
    emulate: bool | None
    notes: list[str]
    greedy: GreedyCheck | None = None
    more: Iterable[Feed] = ()
    progress: Report = ignore

    def _tell(self, which: str, feed: Feed | None = None) -> None:
        """Say which model is loaded, or runs on what."""
        self.progress(f"checking {'' if feed is None else f'{feed.label}, '}{which}", 0, 0)

    @property
    def _all(self) -> str:
        return "both models" if self.pair.module is None else "the folded model"

    def both(self, feeds: list[Feed]) -> list[Run]:
        """Run both models in the same way: as they are, emulated, or by onnx.reference."""
        pair, models = self.pair, (self.pair.before, self.pair.after)
        if self.emulate:
            return self._emulated(*models, feeds)
        try:
            return self._both(self._session, pair.original, pair.folded, feeds)
        except MissingKernelError as error:
            if self.emulate is False:
                raise
            logger.debug("no kernel: %s", error)
            self.notes.clear()
            if any(map(_has_sixteen_bits, models if pair.types else models[:1])):
                return self._emulated(*models, feeds)
            if max(map(weight_bytes, models)) > EVALUATOR_LIMIT:
                raise
            self.notes.append(f"{self._all} ran in onnx.reference: {error}")
            return self._both(evaluator, *models, feeds)

    def _emulated(self, original: ir.Model, folded: ir.Model, feeds: list[Feed]) -> list[Run]:
        self.emulate = True
        narrow = next((m for m in (original, folded) if _has_sixteen_bits(m)), None)
        if narrow is not None:
            self.notes.append(
                f"{self._all} ran in float32 with every operator's result rounded to"
                f" {precision(narrow).name}, on the {self.provider} provider"
            )
        to = ir.DataType.FLOAT
        wide = [widen(model, to, rounded=True) for model in (original, folded)]
        return self._both(self._session, wide[0], wide[1], feeds, to)

    def _session(self, model: ModelSource) -> Function:
        return functools.partial(
            sessions.run, sessions.session(model, self.provider, config=RUN_ONCE)
        )

    def _both(
        self,
        engine: Callable[[Any], Function],
        original: ModelSource,
        folded: ModelSource,
        feeds: list[Feed],
        to: ir.DataType | None = None,
    ) -> list[Run]:
        """Run both models, on floats widened ``to`` the type that they expect."""
        self._tell("the original")
        function = self.pair.module or _widening(engine(original), to)
        runs = self._original(function, feeds)
        if self.greedy is not None:
            self._tell("the text that the original writes")
            self.greedy.run_original(function)
        del function  # one model at a time
        try:
            self._tell("the folded model")
            function = _converting(_widening(engine(folded), to), self.pair.types)
            for run in runs:
                self._tell("the folded model", run.feed)
                run.folded = function(run.feed.arrays)
            if self.greedy is not None:
                self._tell("the text that the folded model writes")
                self.greedy.run_folded(function)
        except (InvalidModelError, RunFailedError) as error:
            is_alike = self.pair.module is None and not self.pair.types
            if isinstance(error, MissingKernelError) and not is_alike:
                raise  # of an original that is alike it would have been raised above
            raise _FoldedFailedError(str(error)) from error
        return runs

    def _original(self, function: Function, feeds: list[Feed]) -> list[Run]:
        """Run the original on ``feeds``; if it runs none of them, on the first of more it does."""
        runs: list[Run] = []
        failed: list[str] = []
        for feed in itertools.chain(feeds, self.more):
            if feed.group and feed.group in (run.feed.group for run in runs):
                continue
            if feed.group == "frozen" and runs:
                break
            self._tell("the original", feed)
            try:
                runs.append(Run(feed, function(feed.arrays)))
            except RunFailedError as error:
                if not feed.optional:
                    raise
                if not feed.group:
                    failed.append(
                        f"{feed.label} was skipped, the original does not run it: {error}"
                    )
        if not runs:
            raise UsageError(f"{failed[-1]}; pass shapes or inputs that fit the model")
        self.notes += failed
        return runs

    def reference(self, runs: list[Run]) -> None:
        """Run the original in a wider type where that can be done, else say why not."""
        to, size = _wider(self.pair.before)
        if to is None or size > REFERENCE_LIMIT:
            why = (
                "no wider type" if to is None else f"its weights would take {size / 2**30:.0f} GiB"
            )
            self.notes.append(f"no reference ({why}): the tolerance decides")
            return
        feeds = [run.feed for run in runs]
        self._tell(f"the reference in {to.name.lower()}")
        try:
            if self.pair.module is not None:
                outputs = self._run_wide(self.pair.module.widened(to), feeds, to)
            else:
                outputs = self._wide_outputs(widen(self.pair.before, to), feeds, to, size)
        except (InvalidModelError, UsageError) as error:
            logger.debug("no reference", exc_info=True)
            self.notes.append(f"no reference in {to.name} ({error}): the tolerance decides")
            return
        for run, reference in zip(runs, outputs, strict=True):
            run.reference = reference

    def rounded(self, runs: Sequence[Run]) -> None:
        """Run both with every result rounded, where a CPU has run float16 in float32."""
        is_wide = self.provider == "cpu" and self.emulate is None and self.pair.module is None
        known = [run for run in runs if run.reference is not None]
        if not (is_wide and known and _has_sixteen_bits(self.pair.before)):
            return
        again = replace(self, emulate=True, greedy=None, more=(), notes=[])
        try:
            found = {id(each.feed): each for each in again.both([run.feed for run in known])}
        except (InvalidModelError, RunFailedError, UsageError, _FoldedFailedError) as error:
            logger.debug("not run with every result rounded: %s", error)
            return
        for run in known:
            run.rounded = found.get(id(run.feed))
        self.notes.append(
            "float16 runs in float32 here: errors are the larger of this and of every operator's"
            " result rounded"
        )

    def stored(self, whole: Pair, runs: Sequence[Run]) -> StoredParity | None:
        """Compare the weights as stored, where that can be done in time and in memory."""
        original, folded = whole.before, whole.after
        to, size = _wider(original)
        if to is None or precision(original) == to:
            return None
        if size > STORED_LIMIT:
            self.notes.append(
                f"weights were not compared as stored, which would take {size / 2**30:.0f} GiB"
            )
            return None

        def engine(model: ir.Model) -> Function:
            return _widening(functools.partial(sessions.run, sessions.session(model)), to)

        self._tell("the weights as stored")
        feeds = [run.feed.arrays for run in runs]
        try:
            return compare_stored(original, folded, feeds, to, precision(original), engine)
        except UsageError as error:
            self.notes.append(f"weights were not compared as stored: {error}")
        except InvalidModelError as error:
            logger.debug("weights were not compared as stored: %s", error)
        return None

    def _wide_outputs(
        self, wide: ir.Model, feeds: list[Feed], to: ir.DataType, size: float
    ) -> list[Arrays | None]:
        for provider in dict.fromkeys((self.provider, "cpu")):
            try:
                session = sessions.session(wide, provider, config=RUN_ONCE)
                return self._run_wide(functools.partial(sessions.run, session), feeds, to)
            except (InvalidModelError, RunFailedError) as error:
                if provider == "cpu" and size > EVALUATOR_LIMIT:
                    raise
                logger.debug("no reference on %s: %s", provider, error)
        outputs = self._run_wide(evaluator(wide), feeds, to)
        self.notes.append("the reference was computed by onnx.reference")
        return outputs

    def _run_wide(
        self, engine: Function, feeds: list[Feed], to: ir.DataType
    ) -> list[Arrays | None]:
        function = _widening(engine, to)
        outputs: list[Arrays | None] = []
        for feed in feeds:
            self._tell(f"the reference in {to.name.lower()}", feed)
            try:
                outputs.append(function(feed.arrays))
            except RunFailedError as error:
                if not feed.optional or feed is feeds[0]:
                    raise
                self.notes.append(f"no reference ({feed.label}: {error}): the tolerance decides")
                outputs.append(None)
        if self.greedy is not None:
            self.greedy.run_reference(function)
        return outputs


def _wider(model: ir.Model) -> tuple[ir.DataType | None, float]:
    """Return the type in which a reference is computed, and the bytes of the weights in it."""
    dtype = precision(model)
    to = ir.DataType.FLOAT if dtype in SIXTEEN_BITS else ir.DataType.DOUBLE
    narrow = {ir.DataType.FLOAT, *SIXTEEN_BITS}
    if dtype == to and not any(value.dtype in narrow for value in _values(model)):
        return None, 0.0
    return to, weight_bytes(model) * to.itemsize / dtype.itemsize


def _has_sixteen_bits(model: ir.Model) -> bool:
    return precision(model) in SIXTEEN_BITS or any(v.dtype in SIXTEEN_BITS for v in _values(model))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    return (v for node in model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v)


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


def _converting(function: Function, types: Mapping[str, ir.DataType]) -> Function:
    """Return ``function`` with floats converted to its own ``types`` first."""
    return (lambda arrays: function(_converted(types, arrays))) if types else function


def evaluator(model: ir.Model) -> Function:
    """Return ``model`` as a function, computed by ``onnx.reference`` in NumPy."""
    proto = ir.to_proto(ir.external_data.load_to_model(model.clone()))
    try:
        evaluator = kernels.evaluator(proto)
    except Exception as error:
        raise InvalidModelError(f"onnx.reference cannot load it: {_short(error)}") from error

    def run(inputs: Arrays) -> Arrays:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results = kernels.run(evaluator, inputs)
            except Exception as error:  # whatever the NumPy code of an operator raises
                raise RunFailedError(f"onnx.reference cannot run it: {_short(error)}") from error
        return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))

    return run


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
