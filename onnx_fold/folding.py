"""The fold itself: passes propose candidates for each closed stream, the best one is taken.

Candidates over the tolerance are dropped first; of the rest the one that removes most weights wins,
then the one with the fewest operators, then the most accurate one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import onnx_ir as ir

from onnx_fold.basis import TOLERANCES, Basis, Side, probe
from onnx_fold.report import CandidateReport, StreamReport
from onnx_fold.rewrite import Rewrite
from onnx_fold.stream import Stream, find_streams

logger = logging.getLogger(__name__)

PIVOTS = ("auto", "q", "k", "v", "p")


@dataclass(frozen=True)
class Options:
    """What a caller may ask of every pass.

    Attributes:
        pivot: Which matrix of a stream becomes the identity where there is a choice: ``"q"``,
            ``"k"``, ``"v"`` of the attention, ``"p"`` the writer of a parallel block, or
            ``"auto"``.
        protect: Names of initializers, nodes or values that must stay as they are.
        tolerance: Largest predicted relative error; None takes the default of the storage type.
    """

    pivot: str = "auto"
    protect: frozenset[str] = frozenset()
    tolerance: float | None = None


@dataclass
class Candidate:
    """One way to fold one stream.

    Attributes:
        strategy: Name of the pass that proposes it.
        text: What is folded into what, for people.
        rewrite: The change.
        writers: Writers before and after, for the probe.
        readers: Readers before and after, for the probe.
        basis: The basis that is inverted, if one is.
    """

    strategy: str
    text: str
    rewrite: Rewrite
    writers: list[Side]
    readers: list[Side]
    basis: Basis | None = None

    @cached_property
    def weights_removed(self) -> int:
        """Elements of initializers that it saves."""
        return self.rewrite.weights_removed()

    @property
    def nodes(self) -> int:
        """Operators that it adds, less those that it removes."""
        return self.rewrite.nodes_change()

    @property
    def condition(self) -> float | None:
        """Condition number of the basis that it inverts."""
        return self.basis.condition if self.basis is not None else None

    def error(self, dtype: ir.DataType) -> float:
        """Predicted relative error; see :func:`onnx_fold.basis.probe`."""
        return probe(self.writers, self.readers, dtype)

    def _growth(self) -> str:
        shared = self.rewrite.shared()
        if shared:
            names = " and ".join(map(repr, shared))
            return f"{names} has other readers, and a copy would cost as much as is saved"
        if self.weights_removed == 0:
            return "no weights would be saved"
        return f"weights would grow by {-self.weights_removed:,}"

    def judged(self, stream: Stream, options: Options) -> CandidateReport:
        """Weigh it: cheap checks first, the weights are evaluated last."""
        report = CandidateReport(
            strategy=self.strategy,
            text=self.text,
            weights_removed=self.weights_removed,
            nodes_added=self.nodes,
        )
        if self.weights_removed <= 0:
            return replace(report, refused=self._growth())
        report = replace(report, condition=self.condition)
        if self.condition is not None and self.condition > 1e15:
            return replace(report, refused="the matrix to invert is singular")
        if not self.rewrite.is_finite():
            kind = stream.dtype.name.lower()
            return replace(report, refused=f"a folded weight is not finite in {kind}")
        error = self.error(stream.dtype)
        report = replace(report, error=error)
        limit = options.tolerance or TOLERANCES[stream.dtype]
        if not error <= limit:
            return replace(
                report,
                refused=f"predicted relative error {error:.1e} is over the tolerance {limit:.0e}",
            )
        return report


class FoldPass(ir.passes.InPlacePass):
    """Base of the fold strategies; also a pass of its own in any ``onnx_ir.passes.Sequential``.

    A strategy sets ``name`` and implements :meth:`candidates`.
    """

    name: ClassVar[str]

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or Options()

    def candidates(self, stream: Stream) -> Iterator[Candidate]:
        """Yield the ways in which this strategy can fold ``stream``, which is closed."""
        raise NotImplementedError

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold ``model`` in place with this strategy alone."""
        streams = fold_streams(model, [self], self.options)
        return ir.passes.PassResult(model, any(stream.folded for stream in streams))


def fold_streams(
    model: ir.Model, passes: Sequence[FoldPass], options: Options
) -> list[StreamReport]:
    """Fold every closed stream of ``model`` in place, to a fixpoint.

    Returns:
        A report for each stream, in graph order: what was folded, or why nothing was. Streams that
        no fold could be asked of are reported as they were at first.
    """
    order = {node: position for position, node in enumerate(model.graph)}
    reports: list[tuple[int, StreamReport]] = []
    finished: set[ir.Node] = set()
    is_first_round = True
    while True:
        left: list[tuple[int, StreamReport]] = []
        touched: set[ir.Node] = set()
        for stream in find_streams(model):
            nodes = stream.nodes
            position = min(order.get(node, 0) for node in nodes)
            report = StreamReport.of(stream)
            if not report.is_foldable:
                if is_first_round:
                    reports.append((position, report))
                continue
            if nodes & touched:
                continue  # a neighbour has just changed: look again in the next round
            report = _fold_stream(model.graph, stream, passes, options)
            if report.folded:
                logger.info("%s: %s", report.folded.strategy, report.folded.text)
                touched |= nodes
                finished |= nodes
                reports.append((position, report))
            elif stream.is_closed or not nodes & finished:
                left.append((position, report))
        if not touched:
            break
        is_first_round = False
    return [report for _, report in sorted([*reports, *left], key=lambda item: item[0])]


def _fold_stream(
    graph: ir.Graph, stream: Stream, passes: Sequence[FoldPass], options: Options
) -> StreamReport:
    report = StreamReport.of(stream)
    if not stream.is_closed:
        return report
    protected = sorted(_names(stream) & options.protect)
    if protected:
        return replace(report, reasons=[f"'{protected[0]}' is protected"])
    best: tuple[tuple[float, ...], Candidate, CandidateReport] | None = None
    judged: list[CandidateReport] = []
    for candidate in (c for each in passes for c in each.candidates(stream)):
        verdict = candidate.judged(stream, options)
        judged.append(verdict)
        if verdict.refused:
            logger.debug("%s refused: %s", verdict.text, verdict.refused)
            continue
        rank = (-verdict.weights_removed, verdict.nodes_added, verdict.error or 0.0)
        if best is None or rank < best[0]:
            best = (rank, candidate, verdict)
    if best is None:
        reasons = [f"{verdict.text}: {verdict.refused}" for verdict in judged]
        return replace(
            report, candidates=judged, reasons=reasons or ["no strategy applies to its layers"]
        )
    _, candidate, verdict = best
    candidate.rewrite.apply(graph)
    return replace(report, candidates=judged, folded=verdict)


def _names(stream: Stream) -> set[str]:
    names = {value.name for value in stream.values}
    for member in stream.members:
        names |= {member.weight.leaf.name, member.node.name, member.label}
    return {name for name in names if name}
