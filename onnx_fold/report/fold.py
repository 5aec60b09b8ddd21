"""What was folded, what was not, and why: dataclasses, for the terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from onnx_fold.base.schema import SCHEMA_VERSION
from onnx_fold.base.tables import Shown, counted, new_table
from onnx_fold.check.parity import ParityReport
from onnx_fold.check.proof import Proof
from onnx_fold.engine.cost import Saving
from onnx_fold.engine.outcome import CandidateReport, StreamReport
from onnx_fold.errors import OnnxFoldError
from onnx_fold.graph.linear import compact
from onnx_fold.report.alike import Alike, alike
from onnx_fold.report.verdict import verdict

MAX_REASONS = 2
"""Reasons shown for one stream where each has a line; all of them are in the JSON report."""

FREEZE = (
    " As constants they could fold: python -m onnxruntime.tools.remove_initializer_from_input"
    " --input MODEL --output CONSTANT"
)
"""What can be done about weights that a caller can override."""

GROUPS = "Group: which changes of basis pass through a stream: general, any; orthogonal, rotations."


@dataclass(frozen=True)
class FoldReport(Shown):
    """What :func:`onnx_fold.fold` did.

    Attributes:
        saving: Cost before and after.
        streams: All streams, in graph order.
        quantised: Layers that were left alone because their weights are quantised.
        given: The same because their weights are graph inputs, as those of adapters can be.
        overridable: The same because their weights are initializers that are graph inputs, too.
        proof: That each fold is right, if it was asked for.
        verification: The parity check of the result, if it was asked for.
        taken_back: Folds that did not pass, by their names, and why.
        is_plan: Nothing was written: this is what would be done.
        old_data: Data files of the model that was replaced, which are still there: why others need
            each, or nothing if it can be deleted.
        is_long: Whether the tables have a line for every stream; else streams that are alike but
            for a number in their names share one.
        module: The parity with the PyTorch module that was exported, if one was.
    """

    saving: Saving
    streams: list[StreamReport]
    quantised: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    overridable: list[str] = field(default_factory=list)
    proof: Proof | None = None
    verification: ParityReport | None = None
    taken_back: Mapping[str, str] = field(default_factory=dict)
    is_plan: bool = False
    old_data: dict[str, str] = field(default_factory=dict)
    is_long: bool = False
    module: ParityReport | None = None

    def __bool__(self) -> bool:
        """False if the result was verified and is not the same function."""
        return all(check is None or check.ok for check in (self.verification, self.module))

    def __repr__(self) -> str:
        count = counted(len(self.folded), "stream")
        what = "would fold" if self.is_plan else "folded"
        return f"<FoldReport: {count} {what}, {self.saving.share:.1%} of the weights less>"

    @property
    def folded(self) -> list[StreamReport]:
        """The streams that were folded."""
        return [stream for stream in self.streams if stream.folded]

    @property
    def left_alone(self) -> list[StreamReport]:
        """The streams that were not though they could be asked, each with its reasons."""
        return [stream for stream in self.streams if stream.is_foldable and not stream.folded]

    @property
    def slower_on(self) -> dict[str, list[CandidateReport]]:
        """The folds that cost more time than they save, by provider."""
        taken = [stream.folded for stream in self.folded if stream.folded is not None]
        names = dict.fromkeys(name for fold in taken for name in fold.slower_on)
        return {name: [fold for fold in taken if name in fold.slower_on] for name in names}

    @property
    def endings(self) -> dict[str, int]:
        """How many further streams end in attention cores, activations, graph outputs."""
        return Counter(stream.ending for stream in self.streams if stream.ending is not None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            **saving_dict(self.saving),
            "streams": [stream.to_dict() for stream in self.streams],
            "quantised": self.quantised,
            "given": self.given,
            "overridable": self.overridable,
            "proof": self.proof.to_dict() if self.proof else None,
            "taken_back": dict(self.taken_back),
            "verification": None if self.verification is None else self.verification.to_dict(),
            "old_data": self.old_data,
            "module": None if self.module is None else self.module.to_dict(),
        }

    def __rich__(self) -> RenderableType:
        """For the terminal: the verdict, what was folded, what not and why, what was gained."""
        parts: list[RenderableType] = [Text(verdict(self), "bold"), Text()]
        if self.folded:
            title = "Would fold" if self.is_plan else "Folded"
            parts.append(
                folds_table(self.folded, title, is_long=self.is_long, has_groups=self.is_plan)
            )
        if self.left_alone:
            parts.append(reasons_table(self.left_alone, is_long=self.is_long))
        if self.left_alone or (self.folded and self.is_plan):
            parts.append(Text(GROUPS, "dim"))
        parts += [Text(text) for text in untouched_texts(self)]
        if self.slower_on:
            parts.append(slower_text(self.slower_on))
        if self.endings:
            parts.append(endings_text(self.endings))
        parts.append(saving_text(self.saving, bool(self.folded)))
        if self.taken_back:
            parts.append(taken_back_table(self.taken_back))
        if self.proof is not None:
            parts.append(self.proof)
        if self.verification is not None:
            parts.append(self.verification)
        if self.module is not None:
            parts.append(self.module)
        return Group(*parts)


def saving_dict(saving: Saving) -> dict[str, Any]:
    """``saving`` as JSON-ready data."""
    return {
        "before": asdict(saving.before),
        "after": asdict(saving.after),
        "weights_removed": saving.weights,
        "weights_removed_share": saving.share,
        "bytes_ratio": saving.speedup,
        "read_ratio": saving.read_ratio,
    }


def _kinds(streams: Sequence[StreamReport], is_long: bool) -> list[Alike]:
    return [Alike([stream]) for stream in streams] if is_long else alike(streams, reasons=1)


def _and_more(kind: Alike) -> str:
    return f"\n(and {kind.count - 1} alike)" if kind.count > 1 else ""


def folds_table(
    streams: Sequence[StreamReport], title: str, *, is_long: bool = True, has_groups: bool = False
) -> Table:
    """One line for each folded stream, or for all that are alike."""
    table = new_table(f"{title} ({counted(len(streams), 'stream')})")
    table.add_column("what into what", overflow="fold")
    if has_groups:
        table.add_column("group")
    table.add_column("by")
    table.add_column("weights", justify="right")
    table.add_column("cond", justify="right")
    table.add_column("error", justify="right")
    for kind in _kinds(streams, is_long):
        folds = [stream.folded for stream in kind.streams if stream.folded is not None]
        conditions = [fold.condition for fold in folds if fold.condition is not None]
        errors = [fold.error for fold in folds if fold.error is not None]
        table.add_row(
            folds[0].text + _and_more(kind),
            *([kind.first.group] if has_groups else []),
            folds[0].strategy,
            f"{-kind.weights_removed:+,}",
            f"{max(conditions):.0e}" if conditions else "",
            f"{max(errors):.0e}" if errors else "",
        )
    return table


def reasons_table(streams: Sequence[StreamReport], *, is_long: bool = True) -> Table:
    """One line for each stream that was left alone, or for all that are alike; with the reasons."""
    table = new_table(f"Left alone ({counted(len(streams), 'stream')})")
    table.add_column("stream", overflow="fold")
    table.add_column("group")
    table.add_column("because", overflow="fold")
    most = MAX_REASONS if is_long else 1
    for kind in _kinds(streams, is_long):
        stream = kind.first
        more = len(stream.reasons) - most
        shown = [
            *stream.reasons[:most],
            *([f"and {counted(more, 'more reason')}"] if more > 0 else []),
        ]
        table.add_row(_arrow(stream) + _and_more(kind), stream.group, "\n".join(shown))
    return table


def taken_back_table(folds: Mapping[str, str]) -> Table:
    """One line for each fold that did not pass."""
    table = new_table(f"Taken back ({counted(len(folds), 'fold')})")
    table.add_column("fold", overflow="fold")
    table.add_column("because", overflow="fold")
    for name, reason in folds.items():
        table.add_row(name, reason)
    return table


def untouched_texts(report: FoldReport) -> Iterator[str]:
    """The layers that hold integers, and those whose weights are or can be given at run time."""
    for what, layers, advice in (
        ("are quantised", report.quantised, ""),
        ("are graph inputs", report.given, ""),
        ("are graph inputs, too, and a caller can override them", report.overridable, FREEZE),
    ):
        if layers:
            more = len(layers) - MAX_REASONS
            shown = [*layers[:MAX_REASONS], *([f"{more} more"] if more > 0 else [])]
            count = counted(len(layers), "layer")
            yield f"Left alone because their weights {what}: {count} ({', '.join(shown)}).{advice}"


def slower_text(folds: Mapping[str, Sequence[CandidateReport]]) -> Text:
    """The folds that save weights but no time."""
    counts = " and ".join(f"{len(each)} on {provider}" for provider, each in folds.items())
    return Text(
        f"Folds that are likely to cost time: {counts}. The operators they add take longer than"
        f" reading the weights did; --objective speed leaves them."
    )


def endings_text(endings: Mapping[str, int]) -> Text:
    """Where the streams end in which nothing could be folded by nature."""
    parts = [f"{count} in {ending}" for ending, count in endings.items()]
    return Text(f"Other streams end where a basis matters: {', '.join(parts)}.", style="dim")


def saving_text(saving: Saving, is_folded: bool) -> Text:
    """Weights, bytes and operators before and after."""
    before, after = saving.before, saving.after
    if not is_folded:
        return Text(
            f"Nothing folded: {before.weights:,} weights, {before.nodes:,} operators, unchanged."
        )
    text = Text.assemble(
        f"Weights {before.weights:,} → {after.weights:,} (",
        (f"{-saving.share:+.1%}", "bold green" if saving.share > 0 else "bold"),
        f"), {decimal(before.bytes)} → {decimal(after.bytes)}, operators {before.nodes:,} →"
        f" {after.nodes:,}; bytes ratio ",
        (f"{saving.speedup:.2f}x", "bold green" if saving.share > 0 else "bold"),
        ".",
    )
    if saving.weights < 0:
        text.append(
            f" The file grew so that one token reads less of it: {decimal(before.read)} →"
            f" {decimal(after.read)}, ratio {saving.read_ratio:.2f}x."
        )
    return text


def _arrow(stream: StreamReport) -> str:
    return f"{compact(stream.writers)} → {compact(stream.readers) or '…'}"


class CheckFailedError(OnnxFoldError):
    """Two models do not compute the same function.

    Attributes:
        report: The :class:`onnx_fold.FoldReport` of the fold that failed.
    """

    def __init__(self, message: str, report: FoldReport) -> None:
        super().__init__(message)
        self.report = report
