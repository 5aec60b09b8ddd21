"""A page to look at: any report as one HTML file that needs nothing else, on screen or on paper.

What it says is decided here and in :mod:`onnx_fold.report.alike`, where things stand in
:mod:`onnx_fold.report.blocks` and :mod:`onnx_fold.report.dots`; the templates only write it down.
Names in a model are text that somebody else wrote: the templates escape all of it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rich.filesize import decimal

from onnx_fold.algebra.exact import LIMIT
from onnx_fold.base.tables import counted
from onnx_fold.check.parity import ParityReport
from onnx_fold.engine.cost import Saving
from onnx_fold.errors import MissingExtraError
from onnx_fold.files.output import replacing
from onnx_fold.graph.linear import compact
from onnx_fold.report.alike import Repeat, alike, reasons_of, repeats
from onnx_fold.report.attention import Attention, kinds
from onnx_fold.report.blocks import WIDTH, Drawing, draw, scale_of
from onnx_fold.report.dots import parity_plot, speed_plot
from onnx_fold.report.fold import FoldReport, endings_text, slower_text, untouched_texts
from onnx_fold.report.folder import FolderReport
from onnx_fold.report.verdict import verdict
from onnx_fold.runtime.environment import environment
from onnx_fold.speed.timing import BenchReport, decimals

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["check", "page", "write_page"]

MOST_DRAWINGS, MOST_STREAMS, MOST_LISTED = 12, 40, 24
"""Blocks that are drawn, kinds of streams that are listed, names that are listed of one kind."""

LONGEST = 400
"""Characters of one text; names in a model may be of any length."""


class Inspected(Protocol):
    """What :func:`onnx_fold.inspect` returns."""

    @property
    def attention(self) -> list[Attention]:
        """The attention layers."""

    @property
    def plan(self) -> FoldReport:
        """What would be done."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Opsets, IR version and producer."""


AnyReport: TypeAlias = FoldReport | FolderReport | ParityReport | BenchReport | Inspected


@dataclass(frozen=True)
class Figure:
    """A number that comes first: what it is, the number, and a word on it."""

    name: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass
class Page:
    """What the template writes down, in this order."""

    title: str
    verdict: str
    tone: str
    reason: str = ""
    figures: list[Figure] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    undrawn: int = 0
    sections: defaultdict[str, Any] = field(default_factory=lambda: defaultdict(list))
    environment: Sequence[tuple[str, str]] = ()
    parts: list[tuple[str, Page]] = field(default_factory=list)


def check() -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    _template()


def write_page(
    report: AnyReport, path: str | os.PathLike[str], *, command: str = "", models: str = ""
) -> None:
    """Write ``report`` as one HTML file.

    Args:
        report: What ``fold`` or ``export`` (its ``report``), ``fold_folder``, ``inspect``,
            ``verify`` or ``bench`` returned.
        path: File to write; one that is there is replaced.
        command: The command that made it, to be shown.
        models: Names of the models, to be shown.

    Raises:
        MissingExtraError: jinja2 is not installed.
        CannotWriteError: The file cannot be written.
    """
    text = page(report, command=command, models=models)
    target = Path(path)
    with replacing(target) as folder:
        (folder / target.name).write_bytes(text.encode("utf-8", "backslashreplace"))


def page(report: AnyReport, *, command: str = "", models: str = "") -> str:
    """``report`` as the text of one HTML file, see :func:`write_page`."""
    if isinstance(report, BenchReport):
        content = _bench(report)
    elif isinstance(report, ParityReport):
        content = _verify(report)
    elif isinstance(report, FoldReport):
        content = _fold(report)
    elif isinstance(report, FolderReport):
        content = _folder(report)
    else:
        content = _inspect(report)
    return _template().render(
        page=content,
        models=models,
        command=command,
        version=metadata.version("onnx-fold"),
        width=WIDTH,
    )


@cache
def _template() -> Template:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "html") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnx_fold.report"),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"compact": compact, "count": counted, "amount": _amount}
    environment.filters["whole"] = jinja2.filters.FILTERS["forceescape"]
    return environment.get_template("page.html")


def _finalize(value: Any) -> Any:
    """Cut what is too long; markup that a template made is not."""
    if isinstance(value, str) and not hasattr(value, "__html__") and len(value) > LONGEST:
        return f"{value[: LONGEST - 1]}…"
    return value


def _amount(number: float) -> str:
    """``1.2 M`` for a number of weights."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


# --- fold and inspect -----------------------------------------------------------------------------


def _fold(report: FoldReport) -> Page:
    words, tone = _verdict(report)
    made = Page("Plan of a fold" if report.is_plan else "Fold", words, tone)
    if not report.folded:
        made.reason = verdict(report)
    made.figures = [*_figures(report)]
    foldable = [stream for stream in report.streams if stream.is_foldable]
    blocks = repeats(foldable)
    made.drawings, made.undrawn = _drawings(report, _cut(blocks))
    folded, left = alike(report.folded), alike(report.left_alone)
    made.sections |= {
        "folded": folded[:MOST_STREAMS],
        "left": [(each, reasons_of(each.streams)) for each in left[:MOST_STREAMS]],
        "unlisted": max(0, len(folded) - MOST_STREAMS) + max(0, len(left) - MOST_STREAMS),
        "reasons": reasons_of(report.left_alone),
        "taken_back": report.taken_back,
        "remarks": [*_remarks(report)],
        "most": MOST_LISTED,
    }
    if report.verification is not None:
        made.reason = report.verification.reason or made.reason
        made.sections |= _parity_sections(report.verification)
    if report.module is not None:
        made.reason = report.module.reason or made.reason
        made.sections["module"] = parity_plot(None, report.module, LIMIT)
        made.sections["module_shapes"] = list(dict.fromkeys(report.module.shapes))
        made.sections["notes"] = list(
            dict.fromkeys([*made.sections["notes"], *report.module.notes])
        )
    made.sections["parity"] = parity_plot(report.proof, report.verification, LIMIT)
    made.sections["unproved"] = {} if report.proof is None else report.proof.unproved
    known = {} if report.verification is None else report.verification.environment
    made.environment = [*_flat(known or environment("cpu"))]
    return made


def _folder(report: FolderReport) -> Page:
    """The numbers of all models, then what there is to say of each."""
    each = report.files.items()
    made = Page("Fold of a folder", *_verdict_of_all(report))
    made.figures = [*_sizes(report.saving)]
    others = f"{counted(len(report.copied), 'other file')} copied"
    made.figures.append(Figure("models", str(len(report.files)), others))
    made.parts = [(name, _fold(one)) for name, one in each]
    made.sections["models"] = each
    made.environment = [*_flat(environment("cpu"))]
    return made


def _verdict_of_all(report: FolderReport) -> tuple[str, str]:
    if not all(report.files.values()):
        return "not the same function", "bad"
    folded = sum(bool(each.folded) for each in report.files.values())
    if not folded:
        return "nothing folds: the models stay as they are", "neutral"
    return f"{folded} of {counted(len(report.files), 'model')} folded", "good"


def _inspect(report: Inspected) -> Page:
    made = _fold(report.plan)
    made.title = "What would fold"
    made.sections["attention"] = kinds(report.attention)
    made.sections["model"] = [*_flat(report.metadata)]
    return made


def _verdict(report: FoldReport) -> tuple[str, str]:
    count = counted(len(report.folded), "stream")
    if not report:
        return "not the same function", "bad"
    if not report.folded:
        return "nothing folds: the model stays as it is", "neutral"
    if report.is_plan:
        return f"{count} would fold", "good"
    if report.verification is None:
        return f"{count} folded, not compared", "neutral"
    return f"{count} folded, same function", "good"


def _figures(report: FoldReport) -> Iterator[Figure]:
    yield from _sizes(report.saving)
    for provider, folds in report.slower_on.items():
        detail = f"{counted(len(folds), 'fold')} for size, not for time"
        yield Figure(f"time on {provider}", "likely more", detail, "bad")
    if (proof := report.proof) is not None:
        count = len(proof.proved) + len(proof.unproved) + len(proof.failed)
        tone = "bad" if proof.failed else "good" if not proof.unproved else ""
        detail = f"folds in float64, {proof.scope}" if proof.proved else "folds in float64"
        yield Figure("proved", f"{len(proof.proved)} of {count}", detail, tone)
    if report.verification is not None:
        yield _parity_figure(report.verification)
    if report.module is not None:
        yield replace(_parity_figure(report.module), name="parity with the PyTorch module")


def _sizes(saving: Saving) -> Iterator[Figure]:
    before, after = saving.before, saving.after
    yield Figure("weights", *_change(f"{before.weights:,}", f"{after.weights:,}", saving))
    yield Figure("bytes", *_change(decimal(before.bytes), decimal(after.bytes), saving))
    nodes, share, tone = f"{before.nodes:,}", "", ""
    if before.nodes != after.nodes:
        nodes = f"{nodes} → {after.nodes:,}"
        share = f"{after.nodes / before.nodes - 1:+.1%}"
        tone = "good" if after.nodes < before.nodes else ""
    yield Figure("operators", nodes, share, tone)
    if saving.weights:
        ratio = f"{saving.speedup:.2f}x"
        yield Figure("ratio of the bytes", ratio, "about what a decoder can gain at batch 1")


def _change(before: str, after: str, saving: Saving) -> tuple[str, str, str]:
    if not saving.weights:
        return before, "unchanged", ""
    share = saving.share if "B" not in before else 1 - saving.after.bytes / saving.before.bytes
    return f"{before} → {after}", f"{-share:+.1%}", "good" if share > 0 else ""


def _parity_figure(report: ParityReport) -> Figure:
    passed = sum(output.ok for output in report.outputs)
    detail = f"outputs in {report.dtype.lower()} on {report.provider}"
    tone = "good" if report.ok else "bad"
    return Figure("parity", f"{passed} of {len(report.outputs)}", detail, tone)


def _cut(blocks: Sequence[Repeat]) -> Iterator[Repeat]:
    """Runs that come once in pieces of a size that can be looked at."""
    for block in blocks:
        if block.count > 1:
            yield block
            continue
        for start in range(0, len(block.streams), 3):
            yield Repeat(block.streams[start : start + 3], 1)


def _drawings(report: FoldReport, blocks: Iterator[Repeat]) -> tuple[list[Drawing], int]:
    scale = scale_of(stream for stream in report.streams if stream.is_foldable)
    endings = {
        layer.output: stream.ending
        for stream in report.streams
        if stream.ending is not None
        for layer in stream.layers
        if layer.role == "writer"
    }
    found = list(blocks)
    shown = found[:MOST_DRAWINGS]
    return [draw(block, scale, endings) for block in shown], len(found) - len(shown)


def _remarks(report: FoldReport) -> Iterator[str]:
    yield from untouched_texts(report)
    if report.slower_on:
        yield str(slower_text(report.slower_on))
    if report.endings:
        yield str(endings_text(report.endings))


# --- verify and bench -----------------------------------------------------------------------------


def _parity_sections(report: ParityReport) -> dict[str, Any]:
    checks = [str(each) for each in (report.stored, report.greedy) if each is not None]
    return {"shapes": list(dict.fromkeys(report.shapes)), "checks": checks, "notes": report.notes}


def _verify(report: ParityReport) -> Page:
    scope = f" in {report.scope}" if report.scope else ""
    if report.ok:
        made = Page("Parity", f"same function{scope}", "good")
    else:
        made = Page("Parity", f"differs{scope}", "bad", report.reason)
    made.figures = [_parity_figure(report)]
    margins = [output.margin for output in report.outputs if output.margin is not None]
    if margins:
        nearest = max(margins)
        share, tone = (f"{nearest:.1%}", "good") if nearest <= 1 else (f"{nearest:.3g}x", "bad")
        made.figures.append(Figure("nearest to its limit", share, "of what it may be", tone))
    agreements = [o.top1_agreement for o in report.outputs if o.top1_agreement is not None]
    if agreements:
        made.figures.append(Figure("top-1", f"{min(agreements):.1%}", "the same likeliest token"))
    if report.greedy is not None:
        made.figures.append(Figure("greedy", f"{report.greedy.tokens}", "tokens written by both"))
    made.sections |= {"parity": parity_plot(None, report, LIMIT), **_parity_sections(report)}
    made.environment = [*_flat(report.environment)]
    return made


def _bench(report: BenchReport) -> Page:
    slower = [phase for phase in report.phases if phase.high < 1]
    fastest = max(report.phases, key=lambda phase: phase.speedup, default=None)
    verdict, tone = "no difference beyond the spread", "neutral"
    if slower:
        verdict, tone = f"slower in {len(slower)} of {len(report.phases)} phases", "bad"
    elif fastest is not None and fastest.low > 1:
        verdict, tone = f"up to {fastest.speedup:.2f}x as fast", "good"
    made = Page("Speed", f"{verdict}, on {report.provider}", tone)
    sizes = f"{decimal(report.bytes_original)} → {decimal(report.bytes_folded)}"
    made.figures = [Figure("weights", sizes, f"ratio {report.bytes_ratio:.3f}x")]
    if report.has_tokens:
        read = f"{report.read_ratio:.3f}x"
        made.figures.append(Figure("bytes read a token", read, "the limit of decode at batch 1"))
    for name in dict.fromkeys(phase.name for phase in report.phases):
        phase = next(each for each in report.phases if each.name == name)
        counts = f"{phase.pairs} pairs, {phase.loads} loads"
        interval = f"{phase.low:.2f}-{phase.high:.2f}, {counts}"
        tone = "good" if phase.low > 1 else "bad" if phase.high < 1 else ""
        made.figures.append(Figure(name, f"{phase.speedup:.2f}x", interval, tone))
    names = dict.fromkeys(each.phase for each in report.operators)
    made.sections |= {
        "speed": speed_plot(report),
        "phases": report.phases,
        "has_tokens": report.has_tokens,
        "digits": decimals,
        "names": report.names,
        "operators": {
            name: [each for each in report.operators if each.phase == name] for name in names
        },
        "notes": report.notes,
    }
    made.environment = [*_flat(report.environment)]
    return made


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested data as pairs of a name and a text; what is unknown is left out."""
    for name, value in data.items():
        words = f"{prefix}{name.replace('_', ' ').replace(' mib', ' MiB')}"
        if isinstance(value, Mapping):
            leaves_out = name in ("machine", "versions")
            yield from _flat(value, "" if leaves_out else f"{words} ")
        elif value is not None and value != "":
            yield words, str(value)
