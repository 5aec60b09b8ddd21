"""The verdict on a fold in a sentence or two: what folds, or why nothing does and what could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx_fold.base.tables import counted
from onnx_fold.engine.cost import Saving
from onnx_fold.engine.outcome import StreamReport
from onnx_fold.report.alike import reasons_of

if TYPE_CHECKING:
    from onnx_fold.report.fold import FoldReport

__all__ = ["verdict"]


def verdict(report: FoldReport) -> str:
    """What comes first: what a reader wants to know before all tables."""
    left = report.left_alone
    if report.folded:
        what = "would fold" if report.is_plan else "folded"
        count = counted(len(report.folded), "stream")
        return f"{count} {what}: {_saved(report.saving)} less."
    if report.taken_back:
        count = counted(len(report.taken_back), "fold")
        return f"Nothing folded: {count} did not pass the checks."
    if not left and (report.quantised or report.given):
        what = "quantised" if report.quantised else "graph inputs"
        return f"Nothing folds: the weights of its layers are {what}."
    if not left and report.overridable:
        return "Nothing folds: a caller can override the weights of its layers."
    if not left:
        return "Nothing folds: no linear layer reads another without something between them."
    if all(stream.has_norms for stream in left):
        return _with_norms(left)
    most = max(reasons_of(left), key=lambda reason: reason.count, default=None)
    why = "" if most is None else f", most often because {most.text}"
    return f"Nothing folds: {_of_all(left)} could not be folded{why}."


def _saved(saving: Saving) -> str:
    operators = saving.before.nodes - saving.after.nodes
    parts = [f"{saving.share:.1%} of the weights"] if saving.weights > 0 or operators <= 0 else []
    if operators > 0:
        parts.append(f"{operators:,} of {counted(saving.before.nodes, 'operator')}")
    return " and ".join(parts)


def _with_norms(left: Sequence[StreamReport]) -> str:
    why = f"Nothing folds: norms read {_of_all(left)}, "
    if any(each.strategy == "rotate" for stream in left for each in stream.candidates):
        return (
            f"{why}so only rotations are left, which would take longer than they save."
            " --objective size takes such folds."
        )
    return (
        f"{why}and no rotation that pays passes through them, as in a model with skip connections."
        " Such a model folds where it has adapters or branches, and this one has none that fold."
    )


def _of_all(streams: Sequence[StreamReport]) -> str:
    return "its only stream" if len(streams) == 1 else f"all {len(streams)} streams"
