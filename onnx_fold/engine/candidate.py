"""A way to fold one stream, and what it costs: weights, operators, time, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.basis import TOLERANCES, Basis, max_ratio
from onnx_fold.algebra.device import HOST, Device
from onnx_fold.algebra.expression import Expression
from onnx_fold.algebra.precision import product_dtype, unit_roundoff
from onnx_fold.base.arguments import Pivot, TargetName
from onnx_fold.engine.cost import TARGETS
from onnx_fold.engine.outcome import CandidateReport
from onnx_fold.engine.probe import Subject, probe
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite, Work
from onnx_fold.streams.branches import Branches

PIVOTS = ("auto", "q", "k", "v", "p")

GROWTH = 2
"""How many times the weights that a model had it may store where only those read count."""


@dataclass(frozen=True)
class Options:
    """What a caller may ask of every pass.

    Attributes:
        pivot: Which matrix of a stream becomes the identity where there is a choice: ``"q"``,
            ``"k"``, ``"v"`` of the attention, ``"p"`` the writer of a parallel block, or
            ``"auto"``.
        protect: Names of initializers, nodes or values that must stay as they are.
        tolerance: Largest predicted relative error, where it is below the default of the storage
            type, :data:`onnx_fold.algebra.basis.TOLERANCES`.
        force: Take a fold whatever its predicted error, and whatever time it takes.
        taken_back: Names of folds that are not to be taken, with the reasons.
        device: Where weights are evaluated.
        target: The provider on which no fold may take longer than what it saves; None folds
            whatever saves weights.
        by_reads: Whether weights count that one token reads, not those that are stored.
        room: By how many weights the model may still grow.
    """

    pivot: Pivot = "auto"
    protect: frozenset[str] = frozenset()
    tolerance: float | None = None
    force: bool = False
    taken_back: Mapping[str, str] = field(default_factory=dict)
    device: Device = HOST
    target: TargetName | None = None
    by_reads: bool = False
    room: int = 0


Memo = dict[tuple[object, ...], tuple[CandidateReport, tuple[ir.TensorProtocol, ...]]]
"""Verdicts by candidate and the tensors of its stream, kept so that their ids stay theirs."""


@dataclass(eq=False)
class Candidate:
    """One way to fold one stream.

    Attributes:
        strategy: Name of the pass that proposes it.
        text: What is folded into what, for people.
        rewrite: The change.
        basis: The basis that is inverted, if one is.
        degree_of: What it shares with candidates that differ from it in degree only: of these the
            ones that save less are more accurate. None if there are no such.
        lesser: Plans those of these that save less; asked where it is not accurate enough.
        by_reads: Whether weights count that one token reads, not those that are stored.
    """

    strategy: str
    text: str
    rewrite: Rewrite
    basis: Basis | None = None
    degree_of: object = None
    lesser: Callable[[], Iterator[Proposal]] | None = None
    by_reads: bool = False

    @cached_property
    def saved(self) -> int:
        """What counts of the weights that go, less those that come."""
        return self.reads_removed if self.by_reads else self.weights_removed

    @cached_property
    def reads_removed(self) -> int:
        """Elements of initializers that one token reads no more."""
        return self.rewrite.reads_removed()

    @cached_property
    def weights_removed(self) -> int:
        """Elements of initializers that it saves."""
        return self.rewrite.weights_removed()

    @cached_property
    def nodes(self) -> int:
        """Operators that it adds, less those that it removes."""
        return self.rewrite.nodes_change()

    @cached_property
    def work(self) -> Work:
        """What it adds for one token."""
        return self.rewrite.work()

    @cached_property
    def gain(self) -> tuple[int, int, int]:
        """Sorts what gains most to the front; only what ties has to be evaluated to be compared.

        Matrices count first: no operator is worth the few weights of a bias. Operators that compute
        sizes, a few integers, do not count.
        """
        removed = self.rewrite.reads_removed if self.by_reads else self.rewrite.weights_removed
        return -removed(min_rank=2), self.work.nodes, -self.saved

    def in_part(self) -> Iterator[Proposal]:
        """Those that save less than it and differ in degree only."""
        for proposal in () if self.lesser is None else self.lesser():
            if isinstance(proposal, Candidate):
                proposal.by_reads = self.by_reads
            yield proposal

    @property
    def keeps_layers(self) -> bool:
        """Whether every layer stays, and is as wide as it was: other folds stay possible."""
        return self.gain[0] == 0 and not self.rewrite.resized

    def _growth(self) -> str:
        if self.by_reads:
            return f"one token would read as many weights, and {-self.saved:,} more"
        shared = self.rewrite.shared()
        if shared:
            names = " and ".join(map(repr, shared))
            return f"{names} has other readers, and a copy would cost as much as is saved"
        if self.weights_removed == 0:
            return "no weights would be saved"
        return f"weights would grow by {-self.weights_removed:,}"

    def slower_on(self, itemsize: float) -> dict[str, str]:
        """The providers on which it costs time, and where: in decode or in prefill."""
        work, weights = self.work, self.saved
        lost = {name: each.loses(work, weights, itemsize) for name, each in TARGETS.items()}
        return {name: phase for name, phase in lost.items() if phase}

    def _price(self, slower_on: Mapping[str, str], target: str) -> str:
        work = self.work
        values = work.copied + work.gathered
        return (
            f"it would be slower on {target}: {work.nodes:+} operators and"
            f" {values:,} values to move at each position, for {self.weights_removed:,} weights"
            f" (--objective size takes it all the same)"
        )

    def judged(self, stream: Subject, options: Options, memo: Memo) -> CandidateReport:
        """Weigh it: cheap checks first, the weights are evaluated last, and once."""
        report = self.priced(stream, options)
        if report.refused is not None:
            return report
        tensors = tuple(member.weight.tensor for member in stream.members)
        key = (self.strategy, self.text, self.weights_removed, self.nodes, *map(id, tensors))
        if key not in memo:
            memo[key] = self._measured(report, stream, options), tensors
        return memo[key][0]

    def priced(self, stream: Subject, options: Options) -> CandidateReport:
        """Weigh it without its error, for which weights are evaluated."""
        report = CandidateReport(
            strategy=self.strategy,
            text=self.text,
            weights_removed=self.weights_removed,
            nodes_added=self.nodes,
            reads_removed=self.reads_removed,
            slower_on=self.slower_on(stream.dtype.itemsize),
        )
        saves_operators = isinstance(stream, Branches) and self.nodes < 0
        saves_operators |= self.rewrite.drops_implied
        if self.saved < 0 or (self.saved == 0 and not saves_operators):
            return replace(report, refused=self._growth())
        if self.weights_removed + options.room < 0:
            refused = f"it would store {-self.weights_removed:,} weights more, and the model over"
            return replace(report, refused=f"{refused} {GROWTH} times those that it had")
        if protected := sorted(self.rewrite.names() & options.protect):
            return replace(report, refused=f"'{protected[0]}' is protected")
        if report.name in options.taken_back:
            return replace(report, refused=options.taken_back[report.name])
        target = None if options.force else options.target
        if target is not None and target in report.slower_on:
            return replace(report, refused=self._price(report.slower_on, target))
        return report

    def _measured(
        self, report: CandidateReport, stream: Subject, options: Options
    ) -> CandidateReport:
        given: Mapping[Expression, Any] = {}
        if self.basis is not None:
            given, condition = self.basis.factored(options.device, product_dtype(stream.dtype))
            report = replace(report, condition=condition)
            if condition > 1e15:
                return replace(report, refused="the matrix to invert is singular")
        known = options.device, given
        try:
            error, own = probe(stream, self.rewrite, 32, *known)
        except CannotRewriteError as reason:
            return replace(report, refused=str(reason))
        refused = _over_limits(error, own, stream.dtype, options)
        if (refused is None or not np.isfinite(error)) and not self.rewrite.is_finite(*known):
            refused = f"a folded weight is not finite in {stream.dtype.name.lower()}"
            return replace(report, refused=refused)
        return replace(report, error=error, error_original=own, refused=refused)


def _over_limits(error: float, own: float, dtype: ir.DataType, options: Options) -> str | None:
    """Why a predicted error is too large; both limits hold, whatever tolerance was asked for."""
    if options.force and np.isfinite(error):
        return None
    limit = min(TOLERANCES[dtype], np.inf if options.tolerance is None else options.tolerance)
    if not error <= limit:
        return (
            f"predicted relative error {error:.1e} is over the tolerance {limit:.1e} ({_FORCING})"
        )
    own = max(own, unit_roundoff(dtype) / 2)  # the layers may be exact by chance
    ratio = round(error / own, 1)
    for_size = options.target is None
    most, most_for_size = (max_ratio(dtype, for_size=each) for each in (for_size, True))
    if dtype != ir.DataType.DOUBLE and ratio > most:  # nothing wider than double
        larger = f"--objective size takes up to {most_for_size:.1f}; " * (most < most_for_size)
        return (
            f"predicted relative error {error:.1e} is {ratio:.1f} times the model's own"
            f" ({own:.1e}); at most {most:.1f} times is taken ({larger}{_FORCING})"
        )
    return None


_FORCING = "--strategy with --force takes it all the same"


Proposal: TypeAlias = Candidate | CandidateReport
"""A way to fold a stream, or the reason why it cannot be done in the graph."""


def propose(strategy: str, text: str, plan: Callable[[], Candidate]) -> Proposal:
    """What ``plan`` makes, or the reason why it cannot be done in the graph."""
    try:
        return plan()
    except CannotRewriteError as reason:
        return CandidateReport(
            strategy, text, weights_removed=0, nodes_added=0, refused=str(reason)
        )
