"""The parity check: do two models compute the same function?

Both models run on the same inputs, one after another, the original also in a wider type, and
:mod:`onnx_fold.check.judge` says by its rule whether the outputs differ by more than rounding
errors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_fold.algebra import basis
from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import is_float
from onnx_fold.base.arguments import Provider, several
from onnx_fold.base.progress import Report, ignore
from onnx_fold.base.schema import SCHEMA_VERSION
from onnx_fold.base.tables import ORIGINAL_AND_FOLDED, Shown, figures_table, headings
from onnx_fold.check.feeds import frozen_feeds, make_feeds
from onnx_fold.check.judge import Feed, Judge, OutputParity
from onnx_fold.check.runner import FoldedFailedError, Runner, converted
from onnx_fold.check.stored import StoredParity
from onnx_fold.errors import UsageError
from onnx_fold.files.load import ModelSource, blames_models
from onnx_fold.graph.widen import precision
from onnx_fold.runtime import sessions
from onnx_fold.runtime.environment import environment
from onnx_fold.runtime.generate import Decoder, GreedyCheck, GreedyParity
from onnx_fold.runtime.inputs import Ranges, input_symbols
from onnx_fold.runtime.module import ModuleFunction, is_module
from onnx_fold.runtime.pair import Pair

if TYPE_CHECKING:
    import torch

__all__ = ["ParityReport", "verify"]


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
        table = [_table(self)] if self.outputs else []
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
        pair = pair.opened()
    run = Runner(pair, provider, emulate, report.notes, check, more, progress)
    try:
        runs = run.both(feeds)
    except FoldedFailedError as error:
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
    known = pair.inner, pair.squashed, pair.picked
    judge = Judge(pair.before, tolerance, max_ratio, report.notes, other, close, *known, run.anew)
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
            narrow = converted(types, feed.arrays)
        for name, array in feed.arrays.items():
            if is_float(array) and (np.isfinite(narrow[name]) != np.isfinite(array)).any():
                raise UsageError(f"input '{name}' has numbers that {types[name].name} cannot hold")
        arrays = {name: narrow[name].astype(array.dtype) for name, array in feed.arrays.items()}
        yield replace(feed, arrays=arrays)


# --- The table ------------------------------------------------------------------------------------

_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("relative", "relative_error", ".1e"),
    ("original", "error_original", ".1e"),
    ("folded", "error_folded", ".1e"),
    ("ratio", "ratio", ".3g"),
    ("row", "row_ratio", ".3g"),
    ("channel", "channel_ratio", ".3g"),
    ("top-1", "top1_agreement", ".1%"),
    ("KL", "kl_divergence", ".1e"),
    ("limit", "limit", ".1e"),
)


_ROWS = 12


def _table(report: ParityReport) -> Table:
    """Return a row for each output, of many only those nearest their limit; no empty columns."""
    columns = [c for c in _COLUMNS if any(getattr(o, c[1]) is not None for o in report.outputs)]
    rows = report.outputs
    called = dict(zip(ORIGINAL_AND_FOLDED, report.names, strict=True))
    captions = []
    if any(name == "error_original" for _, name, _ in columns):
        captions.append(
            f"{', '.join(report.names)}: relative error against a wider reference; ratio of the"
            " two, and of the worst row and channel"
        )
    if len(rows) > _ROWS:
        captions.append(f"{len(rows) - _ROWS} further outputs lie deeper within their limits")
        rows = sorted(rows, key=_margin)[:_ROWS]
    sources = {output.limit_from for output in rows if output.judged}
    if len(sources) == 1:
        captions.append(f"limit: {next(iter(sources))}, for what is nearest to it")
    against = f" with {report.against}" if report.against else ""
    table = figures_table(
        f"Parity{against} in {report.dtype.lower()} on {report.provider}: {_inputs(report.shapes)}",
        "; ".join(captions) or None,
    )
    table.add_column("output", overflow="fold")
    for heading, _, _ in columns:
        table.add_column(called.get(heading, heading), justify="right", no_wrap=True)
    table.add_column("of", overflow="fold")
    for output in rows:
        cells = [_cell(getattr(output, name), form) for _, name, form in columns]
        judged = output.judged
        if judged and len(sources) > 1:
            judged += f": {output.limit_from}"
        table.add_row(output.name, *cells, judged, style=None if output.ok else "red")
    return table


def _margin(output: OutputParity) -> tuple[bool, float]:
    return output.ok, -(output.margin or 0.0)


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
