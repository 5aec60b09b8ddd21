"""Only folds that can be trusted are kept: each is proved, and all of them together are judged.

A fold that the proof rejects is taken back: the model is folded again without it, and another way
to fold the same stream may take its place. If the folded model is then not within the limits of the
judgement, the folds with the largest predicted errors are taken back, as few as are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import onnx_ir as ir

from onnx_fold.base.progress import Report
from onnx_fold.check.parity import ParityReport
from onnx_fold.check.proof import prove
from onnx_fold.engine.outcome import CandidateReport
from onnx_fold.errors import WeightError
from onnx_fold.graph.inline import inline
from onnx_fold.report.fold import CheckFailedError, FoldReport

__all__ = ["Folded", "Plan", "proved", "within_limits"]


@dataclass(frozen=True)
class Folded:
    """A folded model, not evaluated yet, and what was done to it."""

    model: ir.Model
    report: FoldReport


Plan: TypeAlias = Callable[[Mapping[str, str]], Folded]
"""Folds the original without some folds, by their names, each with the reason."""


def proved(
    plan: Plan,
    original: ir.Model,
    progress: Report,
    *,
    strict: bool,
    taken_back: Mapping[str, str] = MappingProxyType({}),
) -> Folded:
    """Fold with ``plan``, and take back what the proof rejects.

    Args:
        plan: How to fold.
        original: What is folded.
        progress: Is told what is being done.
        strict: Take nothing back.
        taken_back: Folds that are left out from the start, and why.

    Raises:
        CheckFailedError: A fold is wrong, and ``strict`` forbids to leave it out.
    """
    before = inline(original)
    while True:
        folded = plan(taken_back)
        if not folded.report.folded:
            return folded
        proof = prove(before, folded.model, folded.report.folded, progress)
        suspects = list(proof.failed) or [fold.name for fold in _folds(folded.report)]
        if len(suspects) > 1 and (proof.failed or proof.differs):
            wrong = _first_wrong(plan, before, suspects, taken_back, progress)
            proof = replace(proof, failed={wrong: proof.failed.get(wrong, proof.differs)})
        folded = replace(folded, report=replace(folded.report, proof=proof))
        if not proof.failed:
            return folded
        if strict:
            name, reason = next(iter(proof.failed.items()))
            raise CheckFailedError(f"the proof rejects {name}: {reason}", folded.report)
        taken_back = {
            **taken_back,
            **{name: f"the proof rejects it: {reason}" for name, reason in proof.failed.items()},
        }


def _first_wrong(
    plan: Plan,
    before: ir.Model,
    suspects: Sequence[str],
    taken_back: Mapping[str, str],
    progress: Report,
) -> str:
    """The first of the ``suspects`` without which, and those after it, the rest is right.

    Where streams lie side by side a wrong one spoils the pieces of its neighbours too.
    """
    right, wrong = 0, len(suspects)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        some = plan({**taken_back, **dict.fromkeys(suspects[middle:], "left out for a trial")})
        proof = prove(before, some.model, some.report.folded, progress)
        if proof.failed or proof.differs:
            wrong = middle
        else:
            right = middle
    return suspects[wrong - 1]


def within_limits(
    plan: Plan, folded: Folded, judge: Callable[[Folded], ParityReport], reason: str
) -> Mapping[str, str]:
    """The folds to take back: those with the largest predicted errors, as few as are enough.

    Args:
        plan: How to fold.
        folded: What did not pass.
        judge: Compares a folded model with the original.
        reason: Why it did not pass.
    """
    ranked = sorted(_folds(folded.report), key=_predicted, reverse=True)
    before = folded.report.taken_back
    because = f"with it, {reason}"

    def without(count: int) -> Mapping[str, str]:
        return {**before, **{fold.name: because for fold in ranked[:count]}}

    failing, passing = 0, len(ranked)
    while passing - failing > 1:
        middle = (failing + passing) // 2
        if _passes(judge, plan(without(middle))):
            passing = middle
        else:
            failing = middle
    return without(passing)


def _passes(judge: Callable[[Folded], ParityReport], folded: Folded) -> bool:
    try:
        return not folded.report.folded or judge(folded).ok
    except WeightError:
        return False


def _folds(report: FoldReport) -> Sequence[CandidateReport]:
    return [stream.folded for stream in report.folded if stream.folded is not None]


def _predicted(fold: CandidateReport) -> float:
    """The predicted error, as a multiple of what rounding alone does."""
    return (fold.error or 0.0) / (fold.error_original or 1.0)
