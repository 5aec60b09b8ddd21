"""The public functions ``fold`` and ``inspect``: load, fold a copy, check it, report."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import onnx
import onnx_ir
from rich.console import Group, RenderableType

from onnx_fold.algebra.basis import max_ratio
from onnx_fold.algebra.device import Array, find_device
from onnx_fold.base.arguments import DeviceName, Objective, Pivot, Provider, TargetName, several
from onnx_fold.base.progress import Report, ignore
from onnx_fold.base.schema import SCHEMA_VERSION
from onnx_fold.base.tables import ORIGINAL_AND_FOLDED, Shown, counted, new_table
from onnx_fold.check.parity import ParityReport
from onnx_fold.check.parity import verify as parity_check
from onnx_fold.check.sampled import fits_in_memory, verify_sampled
from onnx_fold.engine.candidate import PIVOTS, Options
from onnx_fold.engine.cost import TARGETS, Saving, cost
from onnx_fold.engine.folding import FoldPass, fold_streams
from onnx_fold.engine.protect import protected_names
from onnx_fold.errors import MissingExtraError, UsageError, WeightError
from onnx_fold.files.load import ModelSource, blames_models, external_tensors, load
from onnx_fold.files.order import put_back
from onnx_fold.files.output import clean, left_over, replacing
from onnx_fold.files.targets import check_format, check_place, check_target
from onnx_fold.files.write import data_of, evaluate, obsolete_data, read_in, saving
from onnx_fold.graph.inline import inline
from onnx_fold.graph.widen import precision
from onnx_fold.report.attention import Attention, find_attention, kinds
from onnx_fold.report.fold import CheckFailedError, FoldReport
from onnx_fold.runtime.calibrate import record
from onnx_fold.runtime.inputs import Ranges
from onnx_fold.runtime.sessions import onnxruntime, resolve_provider
from onnx_fold.strategies import OwnPass, passes_of
from onnx_fold.streams.ends import Activations
from onnx_fold.streams.stream import find_streams
from onnx_fold.streams.untouched import find_given, find_overridable, find_quantised
from onnx_fold.trust import Folded, proved, within_limits

OBJECTIVES = get_args(Objective)
"""What folds are for: never slower, as few weights as can be, or as few of them read a token."""

CHECKS = ("auto", "full", "sampled")
"""Ways to verify a fold: both models whole, some of the folded streams, or whichever fits."""


@dataclass(frozen=True)
class FoldResult:
    """A folded model and what was done to it.

    Attributes:
        ir: The result; the source is never changed.
        report: What was folded into what, what was not, and why.
        original: The model that it came from.
        source: The file that that came from, if it came from a file.
        was_proto: The source was an ``onnx.ModelProto``.
    """

    ir: onnx_ir.Model
    report: FoldReport
    original: onnx_ir.Model
    source: Path | None = None
    was_proto: bool = False

    @cached_property
    def model(self) -> onnx_ir.Model | onnx.ModelProto:
        """The result in the type that was given: :attr:`proto` for a message, else :attr:`ir`."""
        return self.proto if self.was_proto else self.ir

    @property
    def proto(self) -> onnx.ModelProto:
        """The result as one message that holds its weights; one over 2 GiB has to be saved."""
        copy = self.ir.clone()
        read_in(copy)
        return onnx_ir.to_proto(copy)

    def __repr__(self) -> str:
        return f"<FoldResult: {self.report!r}>"

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        shard_size: int | None = None,
        executor: Executor | None = None,
    ) -> None:
        """Write the model. Where nothing was folded, a single-file source is copied byte for byte.

        Weights go to ``<path>.data`` if some of the source's lie in such a file or if they exceed
        1 GiB, one after another, so that they need not fit in memory.

        Args:
            path: The file to write. A model that is there is replaced, at once or not at all; its
                data files stay.
            shard_size: Bytes at which a further data file is begun.
            executor: Evaluates and writes the weights, see :func:`fold`.

        Raises:
            CannotWriteError: ``path`` is the source or its data, or it cannot be written.
        """
        target = Path(path)
        check_format(target)
        check_target(target, _inputs(self.source, self.original, self.ir))
        with self._written(target, shard_size, executor):
            pass

    def _written(
        self,
        target: Path,
        shard_size: int | None,
        executor: Executor | None,
        in_place: bool = False,
        delete_old_data: bool = False,
        progress: Report = ignore,
    ) -> contextlib.AbstractContextManager[Path]:
        if (
            self.source is None
            or self.report.folded
            or shard_size is not None
            or self.source.suffix != target.suffix
            or any(external_tensors(self.ir))
        ):
            return saving(
                self.ir,
                target,
                in_place=in_place,
                delete_old_data=delete_old_data,
                shard_size=shard_size,
                executor=executor,
                report=progress,
            )
        return _copied(self.source, target, obsolete_data(target, in_place, delete_old_data))


@contextlib.contextmanager
def _copied(source: Path, target: Path, obsolete: Sequence[str]) -> Iterator[Path]:
    with replacing(target, obsolete) as folder:
        yield Path(shutil.copyfile(source, folder / target.name))


@blames_models
def fold(
    model: ModelSource,
    *,
    output: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    delete_old_data: bool = False,
    shard_size: int | None = None,
    pivot: Pivot = "auto",
    strategy: str | None = None,
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    passes: OwnPass | Iterable[OwnPass] = (),
    protect: str | Iterable[str] = (),
    tolerance: float | None = None,
    force: bool = False,
    calibrate: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    device: DeviceName = "cpu",
    objective: Objective = "speed",
    target: TargetName | None = None,
    verify: bool | str = True,
    strict: bool = False,
    shapes: Mapping[str, int] | Iterable[Mapping[str, int]] | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    ranges: Ranges | None = None,
    provider: Provider = "auto",
    executor: Executor | None = None,
    progress: Report = ignore,
) -> FoldResult:
    """Fold the closed streams of a model; the function it computes stays the same.

    Weights that lie in data files stay there until they are written: with ``output`` a model may be
    larger than memory.

    Args:
        model: A path, ``onnx.ModelProto``, ``onnx_ir.Model`` or ``torch.onnx.ONNXProgram``. It is
            not changed, but see ``in_place``.
        output: Write the result to this file, see :meth:`FoldResult.save`; it is verified before it
            takes that name, and a fold that fails leaves nothing.
        in_place: Write the result over the file ``model``. Data files that are named after it
            (``<model>.data``, and shards) go; others stay, and ``report.old_data`` names them.
            Where nothing folds nothing is written.
        delete_old_data: Whatever their names, the data files of the model that is replaced go. No
            data file goes that any file beside, above or below it needs.
        shard_size: Bytes at which a further data file is begun.
        pivot: Which matrix becomes the identity where there is a choice: ``"q"``, ``"k"``, ``"v"``,
            ``"p"`` (the writer of a parallel block), or ``"auto"``: the most accurate.
        strategy: Keep to one way to change a basis, ``"absorb"``, ``"interpolate"``, ``"select"``
            or ``"rotate"``. None chooses by predicted error.
        only: Names of the passes to run; empty for all (those and ``"merge"``).
        skip: Names of passes not to run.
        passes: Passes of your own beside the built-in ones: :class:`onnx_fold.engine.FoldPass`
            classes, instances, or ``"module:Class"``.
        protect: Initializers, nodes, values or layers whose streams are left alone, by their names,
            or patterns of names such as ``"layers.0.*"``, see :mod:`onnx_fold.engine.protect`.
        tolerance: Largest predicted relative error of one fold. It only tightens: the default of
            the storage type, :data:`onnx_fold.algebra.basis.TOLERANCES`, and
            :func:`onnx_fold.algebra.basis.max_ratio` times the error of the original hold in any
            case.
        force: With ``strategy``: take its folds whatever their predicted error and time. They are
            proved and judged as any other, and nothing is taken back.
        calibrate: Inputs, as arrays by name or an ``.npz`` file. The original runs on them once;
            what its layers read then stands for random rows when errors are predicted, and
            weights the rows that interpolation picks.
        device: Where to evaluate weights: ``"cpu"``, or a device of torch such as ``"cuda"``; the
            processor does it, with a logged warning, where torch or the device is missing.
        objective: What folds are for. ``"speed"`` leaves those whose operators take longer than
            reading and multiplying the weights did that they save, and in 16 bits those with more
            than 3 times the original's error; ``"size"`` takes whatever saves weights, up to 6
            times, and reports which cost time. ``"bytes-read"`` is the same, but counts the weights
            that one token reads, of a table one row: what depends on the token alone is computed
            for each row of the embedding, and the model may store up to twice the weights for it.
        target: With ``"speed"``, where no fold may cost time: ``"cpu"`` or ``"cuda"``. None is the
            ``provider`` that the fold is checked on.
        verify: Prove each fold in float64 (:mod:`onnx_fold.check.proof`), then compare the models
            in ONNX Runtime: ``"full"`` runs both, ``"sampled"`` a few of the folded streams,
            ``"auto"`` or True the latter where both models do not fit in memory. A fold that does
            not pass is taken back, and the rest is kept.
        strict: Take nothing back: one fold that does not pass fails the whole.
        shapes: Sizes of the inputs to compare with, see :func:`onnx_fold.verify`.
        inputs: The inputs to compare with, see there too.
        ranges: Where random inputs lie, see there too.
        provider: Where to verify: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        executor: Evaluates and writes the weights, in place of threads: one job a tensor, which is
            independent of the others and can be pickled. Its workers must see the same files.
        progress: Is called with what is being done, bytes written, and bytes in all.

    Returns:
        The folded model, in the type that was given (:attr:`FoldResult.model`), and the report. Its
        weights were evaluated if they were verified or written; else they are when they are read.

    Raises:
        CannotWriteError: The output cannot be written, or is an input; what was there is still
            there.
        CheckFailedError: With ``strict`` or ``force``: the folded model does not compute the same
            function.
        InvalidModelError: The model cannot be read.
        MissingExtraError: ``verify`` is asked for and onnxruntime is not installed.
        UsageError: An unknown pivot, pass, objective, device or check, or nothing is called as what
            is to be protected.
    """
    mode = "auto" if verify is True else verify
    if inputs is not None and shapes is not None:
        raise UsageError("pass either inputs or shapes, not both")
    source = Path(model) if isinstance(model, str | os.PathLike) else None
    destination = _target(source, output, in_place)
    if mode and mode not in CHECKS:
        raise UsageError(f"unknown check '{mode}'; there are {', '.join(CHECKS)}")
    if mode or calibrate is not None:
        onnxruntime()  # say at once that it is missing, not after the work
    options = Options(
        pivot=pivot,
        tolerance=tolerance,
        force=force,
        device=find_device(device),
        target=_target_of(objective, target, provider),
        by_reads=objective == "bytes-read",
    )
    _check_options(options, strategy)
    progress("reading", 0, 0)
    original = load(model)
    if destination is not None and not in_place:
        check_target(destination, _inputs(source, original, calibrate))
    options = replace(options, protect=protected_names(several(protect), original))
    chosen = passes_of(options, strategy, several(only), several(skip), several(passes))
    if calibrate is not None:
        progress("running the inputs to calibrate with", 0, 0)
    seen = None if calibrate is None else record(original, calibrate, provider)
    plan = partial(_plan, original, chosen, options, seen, progress)
    sizes = None if shapes is None else list(several(shapes))
    most = max_ratio(precision(original), for_size=options.target is None or force)
    how: dict[str, Any] = {"provider": provider, "shapes": sizes, "inputs": inputs}
    how |= {"ranges": ranges, "max_ratio": most}
    was_proto = isinstance(model, onnx.ModelProto)
    place = source, was_proto, destination, in_place, mode, how, shard_size, executor
    finish = _Finish(*place, delete_old_data, progress)
    if not mode:
        return finish(original, plan({}))
    prove = partial(proved, plan, original, progress, strict=strict or force)
    folded = prove()
    while True:
        try:
            return finish(original, folded)
        except CheckFailedError as error:
            if strict or force:
                raise
            reason = str(error)
        judge = partial(finish.judged, original)
        folded = prove(taken_back=within_limits(plan, folded, judge, reason))


def _plan(
    original: onnx_ir.Model,
    passes: Sequence[FoldPass],
    options: Options,
    seen: Activations | None,
    progress: Report,
    taken_back: Mapping[str, str],
) -> Folded:
    """Fold a copy of ``original``."""
    options = replace(options, taken_back=taken_back)
    seen = None if seen is None else replace(seen, rows=dict(seen.rows))
    before = cost(original)
    model = inline(original).clone()
    streams = fold_streams(model, passes, options, seen, progress)
    if not any(stream.folded for stream in streams):
        model = original.clone()
        put_back(model)
    finds = find_quantised, find_given, find_overridable
    quantised, given, overridable = (find(original.graph) for find in finds)
    saving = Saving(before, cost(model))
    return Folded(
        model, FoldReport(saving, streams, quantised, given, overridable, taken_back=taken_back)
    )


@dataclass(frozen=True)
class _Finish:
    """Evaluates, writes and judges a folded model."""

    source: Path | None
    was_proto: bool
    destination: Path | None
    in_place: bool
    mode: bool | str
    how: Mapping[str, Any]
    shard_size: int | None
    executor: Executor | None
    delete_old_data: bool
    progress: Report

    def __call__(self, original: onnx_ir.Model, folded: Folded) -> FoldResult:
        """The result, written if that was asked for.

        Raises:
            CheckFailedError: It does not compute the same function, and was not written.
        """
        model, report = folded.model, folded.report
        result = self._result(original, folded)
        try:
            if self.destination is None or (self.in_place and not report.folded):
                if self.mode and report.folded:
                    evaluate(model, self.executor, self.progress)
                return self._verified(result, model)
            old = data_of(self.destination)
            place = self.shard_size, self.executor, self.in_place, self.delete_old_data
            with result._written(self.destination, *place, self.progress) as path:
                result = self._verified(result, path)
        except WeightError as error:
            raise CheckFailedError(str(error), report) from error
        report = replace(result.report, old_data=left_over(self.destination, old))
        return replace(result, ir=load(self.destination), report=report)

    def judged(self, original: onnx_ir.Model, folded: Folded) -> ParityReport:
        """The parity of a model that is not written."""
        evaluate(folded.model, self.executor, self.progress)
        return self._parity(self._result(original, folded), folded.model)

    def _result(self, original: onnx_ir.Model, folded: Folded) -> FoldResult:
        return FoldResult(folded.model, folded.report, original, self.source, self.was_proto)

    def _verified(self, result: FoldResult, folded: onnx_ir.Model | Path) -> FoldResult:
        """``result`` with its verification, made with ``folded``: its model, evaluated.

        Raises:
            CheckFailedError: It does not compute the same function.
        """
        if not self.mode or not result.report.folded:
            return result
        parity = self._parity(result, folded)
        report = replace(result.report, verification=parity)
        if not parity.ok:
            message = f"the folded model is not the same function: {parity.reason}"
            limits = self.how["max_ratio"], max_ratio(precision(result.original))
            raise CheckFailedError(message + _with_size(parity, *limits), report)
        return replace(result, report=report)

    def _parity(self, result: FoldResult, folded: onnx_ir.Model | Path) -> ParityReport:
        after = load(folded)
        fits = self.mode != "auto" or fits_in_memory(result.original, after)
        if self.mode == "full" or (self.mode == "auto" and fits):
            how = {**self.how, "progress": self.progress}
            report = parity_check(result.source or result.original, folded, **how)
            return replace(report, names=ORIGINAL_AND_FOLDED)
        before = inline(result.original)
        how = {name: self.how[name] for name in ("provider", "max_ratio")}
        folds = result.report.folded
        report = verify_sampled(before, after, folds, **how, progress=self.progress)
        if not fits:
            note = "the models are not run whole: together they do not fit in memory"
            report.notes.insert(0, note)
        return report


def _with_size(parity: ParityReport, most: float, largest: float) -> str:
    """The end of the message, where all that fails would pass with the limit of another objective.

    Args:
        parity: What did not pass.
        most: How many times its own error the model was allowed.
        largest: How many times that objective allows.
    """
    margins = [output.margin or 0.0 for output in parity.outputs if not output.ok]
    if margins and all(1.0 < margin <= largest / most for margin in margins):
        return f" (--objective size takes up to {largest:g} times)"
    return ""


def _target(
    source: Path | None, output: str | os.PathLike[str] | None, in_place: bool
) -> Path | None:
    """The file to write, if any; what killed processes left beside it is removed.

    Raises:
        CannotWriteError: It cannot be written.
        UsageError: Both or neither would be overwritten.
    """
    if in_place and (output is not None or source is None):
        raise UsageError("in place is for a model in a file, and has no other output")
    if output is None and not in_place:
        return None
    target = Path(output) if output is not None else source
    assert target is not None
    check_format(target)
    check_place(target)
    clean(target.parent)
    return target


def _inputs(*sources: Path | onnx_ir.Model | str | os.PathLike[str] | object) -> Iterator[Path]:
    """The files that are read: those given, and the data files of models."""
    for source in sources:
        if isinstance(source, onnx_ir.Model):
            yield from (Path(tensor.path) for tensor in external_tensors(source))
        elif isinstance(source, str | os.PathLike):
            yield Path(source)


def _check_options(options: Options, strategy: str | None) -> None:
    if options.force and strategy is None:
        raise UsageError("to force needs a strategy: absorb, interpolate, select or rotate")
    if options.pivot not in PIVOTS:
        raise UsageError(f"unknown pivot '{options.pivot}'; there are {', '.join(PIVOTS)}")


def _target_of(
    objective: Objective, target: TargetName | None, provider: Provider
) -> TargetName | None:
    """The provider on which no fold may cost time; None if all that counts is the size."""
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective '{objective}'; there are {', '.join(OBJECTIVES)}")
    if target not in (None, *TARGETS):
        raise UsageError(f"unknown target '{target}'; there are {', '.join(TARGETS)}")
    if objective != "speed":
        if target is not None:
            raise UsageError(
                f"a target is for the objective speed; {objective} takes all that saves weights"
            )
        return None
    if target is not None:
        return target
    try:
        return "cuda" if resolve_provider(provider) == "cuda" else "cpu"
    except MissingExtraError:
        return "cpu"


@dataclass(frozen=True)
class InspectReport(Shown):
    """What is in a model and what folding would do to it.

    Attributes:
        attention: The attention layers and their heads.
        plan: What :func:`fold` would do.
        metadata: Opsets, IR version and producer.
    """

    attention: list[Attention]
    plan: FoldReport
    metadata: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<InspectReport: {self.plan!r}>"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.metadata,
            "attention": [each.to_dict() for each in self.attention],
            "plan": self.plan.to_dict(),
        }

    def __rich__(self) -> RenderableType:
        """For the terminal."""
        parts: list[RenderableType] = []
        if self.attention:
            table = new_table(f"Attention ({counted(len(self.attention), 'layer')})")
            for column in ("kind", "heads", "kv heads", "head dim", "Q, K, V"):
                table.add_column(column, overflow="fold")
            shown = [(each, 1) for each in self.attention]
            for each, count in shown if self.plan.is_long else kinds(self.attention):
                sizes = (each.num_heads, each.num_kv_heads, each.head_dim)
                more = f"\n(and {count - 1} alike)" if count > 1 else ""
                table.add_row(each.kind, *map(str, sizes), each.projections + more)
            parts.append(table)
        return Group(self.plan, *parts)


@blames_models
def inspect(
    model: ModelSource,
    *,
    pivot: Pivot = "auto",
    strategy: str | None = None,
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    passes: OwnPass | Iterable[OwnPass] = (),
    protect: str | Iterable[str] = (),
    tolerance: float | None = None,
    force: bool = False,
    calibrate: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    device: DeviceName = "cpu",
    objective: Objective = "speed",
    target: TargetName | None = None,
    progress: Report = ignore,
) -> InspectReport:
    """Show the streams of a model, what would fold, and why the rest would not.

    Takes the options of :func:`fold`, runs nothing and changes nothing.

    Raises:
        InvalidModelError: The model cannot be read.
        UsageError: An unknown pivot, pass or device.
    """
    original = load(model)
    result = fold(
        original,
        pivot=pivot,
        strategy=strategy,
        only=only,
        skip=skip,
        passes=passes,
        protect=protect,
        tolerance=tolerance,
        force=force,
        calibrate=calibrate,
        device=device,
        objective=objective,
        target=target,
        verify=False,
        progress=progress,
    )
    metadata = {
        "ir_version": original.ir_version,
        "opsets": {
            domain or "ai.onnx": version for domain, version in original.opset_imports.items()
        },
        "producer": " ".join(filter(None, (original.producer_name, original.producer_version))),
    }
    plan = replace(result.report, is_plan=True)
    return InspectReport(find_attention(find_streams(original)), plan, metadata)
