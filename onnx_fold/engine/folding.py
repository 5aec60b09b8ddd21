"""The fold itself: passes propose candidates for each closed stream, the best one is taken.

Candidates over the tolerance are dropped first; of the rest the one that removes most weights wins,
then the one with the fewest operators, then the most accurate one.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Any, ClassVar, TypeAlias, TypeGuard

import onnx_ir as ir

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.expression import FoldedTensor, ImpliedTensor
from onnx_fold.base.progress import Report, ignore
from onnx_fold.base.threads import two_at_a_time
from onnx_fold.engine.batch_norms import norms_as_gains
from onnx_fold.engine.candidate import GROWTH, Candidate, Memo, Options, Proposal, propose
from onnx_fold.engine.cost import cost
from onnx_fold.engine.outcome import (
    CandidateReport,
    NormsKept,
    StreamReport,
    layers_of,
    norms_kept,
)
from onnx_fold.engine.probe import Subject
from onnx_fold.engine.splits import split_constants
from onnx_fold.graph.channels import Group
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.graph.shapes import Shapes
from onnx_fold.rewriting.affine import make_explicit
from onnx_fold.rewriting.rebase import become_identity, rebase
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.branches import Branches, find_branches
from onnx_fold.streams.ends import Activations
from onnx_fold.streams.fixed import RowLayer, find_row_layers
from onnx_fold.streams.joined import Divided, Joined, find_divided, find_joined
from onnx_fold.streams.norms import find_norm_streams
from onnx_fold.streams.stream import Stream, find_streams

logger = logging.getLogger(__name__)

LARGE = 2**20
"""Numbers that the matrices of a stream hold, at least, where it is decided beside another one."""


class FoldPass(ir.passes.InPlacePass):
    """Base of the fold strategies; also a pass of its own in any ``onnx_ir.passes.Sequential``.

    A strategy sets ``name`` and implements :meth:`candidates`, :meth:`of_branches`,
    :meth:`of_joined`, :meth:`of_divided` or :meth:`of_rows`. Two threads may ask it at the same
    time, of streams that share no layer; the graph is not changed meanwhile.

    Attributes:
        name: What it is called on the command line.
        operators: How many operators it adds at the least; passes that add fewer are asked first.
        is_basis_change: Whether it needs ``T⁻¹``, so that there are others to choose from.
        group: The changes of basis that it makes; streams are offered that are free in these, and
            in no larger group.

    A pass takes :class:`Options`, or fields of them as keywords: ``AbsorbPass(tolerance=1e-3)``.
    """

    name: ClassVar[str]
    operators: ClassVar[int] = 0
    is_basis_change: ClassVar[bool] = True
    group: ClassVar[Group] = Group.GENERAL

    def __init__(self, options: Options | None = None, **changed: Any) -> None:
        super().__init__()
        self.options = replace(options or Options(), **changed)
        self.begin()

    def begin(self) -> None:
        """Forget what was kept: called before each fold, for passes that keep what is costly."""

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield the ways in which this strategy can fold ``stream``, which is closed.

        What it would do but cannot do in the graph is a report with the reason.
        """
        yield from ()

    def of_branches(self, branches: Branches) -> Iterator[Proposal]:
        """Yield the ways in which it can fold the linear paths between two values."""
        yield from ()

    def of_joined(self, joined: Joined) -> Iterator[Proposal]:
        """Yield the ways in which it can fold a layer behind channels side by side."""
        yield from ()

    def of_divided(self, divided: Divided) -> Iterator[Proposal]:
        """Yield the ways in which it can fold layers behind some of the channels of a stream."""
        yield from ()

    def of_rows(self, layer: RowLayer) -> Iterator[Proposal]:
        """Yield the ways in which it can fold a layer that reads rows of a constant."""
        yield from ()

    def proposals(self, subject: Subject) -> Iterator[Proposal]:
        """Yield the ways in which it can fold ``subject``."""
        for proposal in self._asked(subject):
            if isinstance(proposal, Candidate):
                proposal.by_reads = self.options.by_reads
            yield proposal

    def _asked(self, subject: Subject) -> Iterator[Proposal]:
        match subject:
            case Branches():
                return self.of_branches(subject)
            case Joined():
                return self.of_joined(subject)
            case Divided():
                return self.of_divided(subject)
            case RowLayer():
                return self.of_rows(subject)
        return self.candidates(subject)

    def make_identity(self, stream: Stream, layer: Linear, basis: Basis) -> Proposal:
        """Propose ``basis``, in which ``layer`` becomes the identity: ``W T``, and ``T⁻¹ R``.

        Args:
            stream: A closed stream.
            layer: The writer or reader that goes; a bias of its own stays.
            basis: ``T``, in which all other layers are written.
        """
        others = [name for name in stream.labels if name != layer.label]
        text = f"{layer.label} into {compact(others)}"

        def plan() -> Candidate:
            rewrite = rebase(stream, basis, pivot=layer)
            become_identity(rewrite, layer)
            return Candidate(self.name, text, rewrite, basis)

        return propose(self.name, text, plan)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold ``model`` in place with this strategy alone; if that fails it is as it was."""
        before = model.clone()
        try:
            streams = fold_streams(model, [self], self.options)
        except BaseException:
            model.graph = before.graph
            raise
        return ir.passes.PassResult(model, any(stream.folded for stream in streams))


def fold_streams(
    model: ir.Model,
    passes: Sequence[FoldPass],
    options: Options,
    activations: Activations | None = None,
    progress: Report = ignore,
) -> list[StreamReport]:
    """Fold every closed stream of ``model`` in place, to a fixpoint.

    Args:
        model: The model.
        passes: The strategies to choose from.
        options: What decides among them.
        activations: Recorded rows, for probes and the selection of rows in place of random ones;
            those that a fold makes meaningless are dropped.
        progress: Is told which stream is looked at.

    Returns:
        A report for each stream, in graph order: what was folded, or why nothing was. Streams that
        no fold could be asked of are reported as they were at first.
    """
    for each in passes:
        each.begin()
    shapes = Shapes(model)
    editor = Editor(model.graph)
    norms, gains = norms_as_gains(model.graph, shapes.without_facts(), editor, options.protect)
    with (
        split_constants(model.graph, editor, options.protect),
        norms,
        make_explicit(model, shapes.without_facts(), editor, options.protect, gains),
    ):
        reports = _fold_streams(model, passes, options, activations, shapes, editor, progress)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, FoldedTensor):
            value.const_value.device = options.device
    return reports


def _fold_streams(
    model: ir.Model,
    passes: Sequence[FoldPass],
    options: Options,
    activations: Activations | None,
    inferred: Shapes,
    editor: Editor,
    progress: Report,
) -> list[StreamReport]:
    order = {node: position for position, node in enumerate(model.graph)}
    if options.by_reads:
        options = replace(options, room=(GROWTH - 1) * cost(model).weights)
    fold = _Fold(editor, order, options, activations)
    phases = _phases(passes)
    shapes: Shapes | None = inferred
    is_first = True
    while True:
        now, later = phases[0], [each for each in passes if each not in phases[0]]
        this = _Round(fold, is_merging=_only_merge(now), is_first=is_first)
        choose = partial(_choose, fold=fold, passes=now, later=later)
        for wave in this.waves(_subjects(model, activations, shapes, now, progress)):
            chosen = _chosen(wave, choose, fold, progress)
            for each, (report, rewrite) in zip(wave, chosen, strict=True):
                this.settle(each.subject, report, rewrite)
        if not this.touched and len(phases) == 1:
            found = sorted([*fold.reports, *this.left], key=operator.itemgetter(0))
            return [report for _, report in found]
        if not this.touched:
            del phases[0]
        is_first, shapes = False, None if this.touched else shapes


Choice: TypeAlias = tuple[StreamReport, Rewrite | None]
"""What is known of a stream, and how it is folded, if it is."""


def _chosen(
    wave: Sequence[_Asked], choose: Callable[[_Asked], Choice], fold: _Fold, progress: Report
) -> list[Choice]:
    """What becomes of each stream of a wave; one alone has all cores."""
    if len(wave) == 1:
        return [choose(wave[0])]
    with two_at_a_time() as threads, fold.given_up_if_it_fails():
        choices = threads.map(choose, wave)
        return [*_told(wave, choices, progress)]


def _told(wave: Sequence[_Asked], choices: Iterator[Choice], progress: Report) -> Iterator[Choice]:
    """Wait for one choice after the other, and tell which it is."""
    for each in wave:
        progress(each.where, 0, 0)
        yield next(choices)


@dataclass(frozen=True)
class _Asked:
    """A subject of which a fold is asked.

    Attributes:
        subject: The subject.
        report: What is known of it before.
        where: Which of how many it is, as progress says it.
    """

    subject: Subject
    report: StreamReport
    where: str


@dataclass
class _Fold:
    """A model on its way to the fixpoint.

    Attributes:
        editor: Changes its graph.
        order: Where each node stood in it.
        options: What decides among candidates.
        activations: Recorded rows.
        memo: Verdicts that were given.
        reports: What was folded, and what never can be, by places in the graph.
        finished: Nodes of streams that were folded.
        rotated: Values of streams with norms that were.
        is_given_up: Whether no further candidate is to be weighed.
    """

    editor: Editor
    order: Mapping[ir.Node, int]
    options: Options
    activations: Activations | None
    memo: Memo = field(default_factory=dict)
    reports: list[tuple[int, StreamReport]] = field(default_factory=list)
    finished: set[ir.Node] = field(default_factory=set)
    rotated: set[ir.Value] = field(default_factory=set)
    is_given_up: bool = False

    @contextlib.contextmanager
    def given_up_if_it_fails(self) -> Iterator[None]:
        """Whoever waits for the threads that decide does not wait for all that they would weigh."""
        try:
            yield
        except BaseException:
            self.is_given_up = True
            raise

    def judged(self, candidate: Candidate, stream: Subject) -> CandidateReport:
        """Weigh a candidate."""
        if self.is_given_up:
            raise CancelledError
        return candidate.judged(stream, self.options, self.memo)

    def placed(self, subject: Subject, report: StreamReport) -> tuple[int, StreamReport]:
        """A report, and where the first of the nodes stood; one that is new counts as the first."""
        return min(self.order.get(node, 0) for node in subject.nodes), report

    def take(self, subject: Subject, report: StreamReport, rewrite: Rewrite) -> None:
        """Fold ``subject``."""
        assert report.folded is not None
        moved = (*subject.values, *rewrite.reordered, *rewrite.mixed, *rewrite.resized)
        if self.activations is not None:
            self.activations.forget(moved)
        names = frozenset(v.name for v in (*moved, *rewrite.touched) if v.name)
        if self.options.by_reads:
            room = self.options.room + rewrite.weights_removed()
            self.options = replace(self.options, room=room)
        rewrite.apply(self.editor)
        logger.info("%s: %s", report.folded.strategy, report.folded.text)
        self.finished |= subject.nodes
        self.reports.append(self.placed(subject, replace(report, changed=names)))
        if _is_normed(subject):
            self.rotated |= set(subject.values)


def _size(subject: Subject) -> int:
    """How many numbers its matrices hold."""
    return sum(member.weight.tensor.size for member in subject.members)


def _is_normed(subject: Subject) -> TypeGuard[Stream]:
    """Whether it is a stream that only an orthogonal basis passes through."""
    return isinstance(subject, Stream) and subject.group != Group.GENERAL


class _Round:
    """One look at whatever could be folded.

    Attributes:
        touched: Nodes that it changed; what shares one of them is looked at in the next round.
        left: Reports of what was not folded.
    """

    def __init__(self, fold: _Fold, *, is_merging: bool, is_first: bool) -> None:
        self.touched: set[ir.Node] = set()
        self.left: list[tuple[int, StreamReport]] = []
        self._fold = fold
        self._is_merging = is_merging
        self._is_first = is_first
        self._waiting: dict[ir.Node, int] = {}
        self._kept: dict[ir.Value, NormsKept] = {}

    def waves(self, subjects: Iterable[tuple[Subject, str]]) -> Iterator[list[_Asked]]:
        """What can be decided at the same time: large streams, in a row, that share no node.

        Where passes only merge, one comes after the other: the first may change what is best for
        those behind it. What is small is decided sooner than threads have taken turns.
        """
        wave: list[_Asked] = []
        nodes: set[ir.Node] = set()
        for subject, where in subjects:
            report = StreamReport.of(subject, self._kept)
            if not self._is_asked(subject, report):
                continue
            is_alone = self._is_merging or not isinstance(subject, Stream) or _is_normed(subject)
            is_alone |= subject.is_closed and _size(subject) < LARGE
            own = subject.nodes
            if wave and (is_alone or (subject.is_closed and nodes & own)):
                yield wave
                wave, nodes = [], set()
            if self._waits(own, subject.width):
                continue
            wave.append(_Asked(subject, report, where))
            nodes |= own
            if is_alone:
                yield wave
                wave, nodes = [], set()
        if wave:
            yield wave

    def _is_asked(self, subject: Subject, report: StreamReport) -> bool:
        """Whether a fold can be asked of ``subject``; else what is known of it is noted."""
        fold = self._fold
        if _is_normed(subject) and not subject.is_closed:
            self._kept |= dict.fromkeys(subject.values, norms_kept(subject, report))
            return False
        if not report.is_foldable and self._is_first and not fold.rotated & {*subject.values}:
            fold.reports.append(fold.placed(subject, report))
        return report.is_foldable

    def _waits(self, nodes: set[ir.Node], width: int) -> bool:
        """Whether a neighbour has just changed, or is to: it is looked at in the next round."""
        wider = max((self._waiting.get(node, 0) for node in nodes), default=0)
        if not nodes & self.touched and not (self._is_merging and wider > width):
            return False
        self._waiting |= {node: max(width, self._waiting.get(node, 0)) for node in nodes}
        return True

    def settle(self, subject: Subject, report: StreamReport, rewrite: Rewrite | None) -> None:
        """Fold ``subject``, or note why it is left; what the others of its wave changed waits."""
        fold = self._fold
        if rewrite is not None and report.folded is not None:
            changed = subject.nodes | rewrite.nodes
            if not changed & self.touched and rewrite.weights_removed() + fold.options.room >= 0:
                self.touched |= changed
                fold.take(subject, report, rewrite)
        elif _is_normed(subject):
            found = norms_kept(subject, report)
            self._kept |= dict.fromkeys(subject.values, found)
            if not subject.writers:  # no projection leads to the norm: nothing else tells of it
                self.left.append(fold.placed(subject, replace(report, reasons=[found.text])))
        elif subject.is_closed or not subject.nodes & fold.finished:
            self.left.append(fold.placed(subject, report))


def _phases(passes: Sequence[FoldPass]) -> list[Sequence[FoldPass]]:
    """Whatever merges first, to the fixpoint: a change of basis may stand in its way."""
    merging = [each for each in passes if not each.is_basis_change]
    return [merging, passes] if 0 < len(merging) < len(passes) else [passes]


def _only_merge(passes: Iterable[FoldPass]) -> bool:
    return not any(each.is_basis_change for each in passes)


def _subjects(
    model: ir.Model,
    activations: Activations | None,
    inferred: Shapes | None,
    passes: Sequence[FoldPass],
    progress: Report,
) -> Iterator[tuple[Subject, str]]:
    """What the passes are asked about, and what progress says of it.

    Streams that only an orthogonal basis passes through are looked for if a pass asks for them; the
    parts of open ones are among those that any basis passes through, with the reasons.

    Where passes only merge, the widest stream comes first: so a chain of matrices ends with the
    fewest weights. No best chain keeps two streams, ``d`` and a narrower ``d'`` beside it: without
    ``d``, ``d' d + d dⱼ`` becomes ``d' dⱼ``, which is less. So it keeps the narrowest, or none.
    """

    def told(what: str, found: Sequence[Subject]) -> Iterator[tuple[Subject, str]]:
        for number, subject in enumerate(found, 1):
            where = f"choosing folds: {what} {number} of {len(found)}"
            progress(where, 0, 0)
            yield subject, where
        if found:
            progress("looking for streams", 0, 0)

    progress("looking for streams", 0, 0)
    shapes = inferred or Shapes(model)
    if _ask(passes, "of_rows"):
        is_picked = any(each.options.by_reads for each in passes)
        found = [*find_row_layers(model.graph, shapes, is_picked=is_picked)]
        yield from told("layer of a constant", found)
    if _ask(passes, "of_branches"):
        yield from told("sum of branches", [*find_branches(model.graph, shapes)])
    if _ask(passes, "of_joined"):
        yield from told("concatenation", [*find_joined(model.graph, shapes)])
    if _ask(passes, "of_divided"):
        yield from told("piece", [*find_divided(model.graph, shapes)])
    if any(each.group == Group.ORTHOGONAL for each in passes):
        normed = find_norm_streams(model, activations, shapes.without_facts())
        ends = [each for each in normed if each.readers or not each.is_closed]
        between = [each for each in ends if each.written_by]
        yield from told("stream with norms", between)
    streams = find_streams(model, activations, shapes)
    if _only_merge(passes):
        streams.sort(key=lambda stream: (-stream.width, len(stream.members)))
    yield from told("stream", streams)


def _ask(passes: Sequence[FoldPass], hook: str) -> bool:
    """Whether one of ``passes`` has a say in the subjects that ``hook`` is called with."""
    return any(getattr(type(each), hook) is not getattr(FoldPass, hook) for each in passes)


def _choose(
    asked: _Asked, fold: _Fold, passes: Sequence[FoldPass], later: Sequence[FoldPass]
) -> Choice:
    """The best admissible candidate of a stream, or the reasons why there is none.

    What saves less than a candidate of the passes that are asked ``later`` waits for them. The
    graph is read and not changed: several are chosen at the same time.
    """
    stream, report, options = asked.subject, asked.report, fold.options
    if not stream.is_closed:
        return report, None
    protected = sorted(_names(stream) & options.protect)
    if protected:
        return replace(report, reasons=[f"'{protected[0]}' is protected"]), None
    judged: list[CandidateReport] = []
    is_implied = any(isinstance(m.weight.tensor, ImpliedTensor) for m in stream.members)
    passes = [each for each in passes if not (is_implied and each.is_basis_change)]
    passes = [each for each in passes if each.group == stream.group]
    later = [each for each in later if each.group == stream.group]

    def is_accurate(candidate: Candidate) -> bool:
        verdict = fold.judged(candidate, stream)
        if verdict.refused is not None:
            judged.append(verdict)
        return verdict.refused is None

    @cache
    def is_priced(candidate: Candidate) -> bool:
        return candidate.priced(stream, options).refused is None

    is_fast = options.target is not None and not options.force
    for group in _ranked(stream, passes, later, judged, is_priced, is_accurate, is_fast=is_fast):
        accepted: list[tuple[CandidateReport, Candidate]] = []
        for candidate in sorted(group, key=lambda candidate: candidate.basis is not None):
            verdict = fold.judged(candidate, stream)
            judged.append(verdict)
            if verdict.refused is None:
                accepted.append((verdict, candidate))
                if candidate.basis is None and _is_rounding(verdict):
                    break
        if accepted:
            verdict, candidate = min(accepted, key=lambda pair: pair[0].error or 0.0)
            layers = [*layers_of(stream, candidate.rewrite)]
            report = replace(report, candidates=judged, folded=verdict, layers=layers)
            return report, candidate.rewrite
    reasons = [f"{verdict.text}: {verdict.refused}" for verdict in judged]
    reasons = reasons or ["no strategy applies to its layers"]
    return replace(report, candidates=judged, reasons=reasons), None


def _is_rounding(verdict: CandidateReport) -> bool:
    """Whether the error is no more than that of the original: no inverse can do better."""
    own = verdict.error_original or 0.0
    return verdict.error is not None and verdict.error <= 1.5 * own


def _ranked(
    stream: Subject,
    passes: Sequence[FoldPass],
    later: Sequence[FoldPass],
    refused: list[CandidateReport],
    is_priced: Callable[[Candidate], bool],
    is_accurate: Callable[[Candidate], bool],
    *,
    is_fast: bool,
) -> Iterator[list[Candidate]]:
    """Candidates that tie, those that gain most first, of those the ones with fewest operators.

    A closed stream has d² weights too many. So a dear pass is not asked before the cheap ones that
    save as much have failed; what saves less waits for it, but for what stands in nothing's way,
    and for a part of a cheap one where operators count.
    """
    waiting: list[Candidate] = []
    whole: list[Candidate] = []

    def in_order() -> Iterator[list[Candidate]]:
        parts = [part for each in filter(is_priced, whole) for part in each.in_part()]
        offered = [*waiting, *_candidates(parts, refused)]
        free = [each for each in offered if is_priced(each)]
        dear = [each for each in offered if each not in free]
        return _ties([*_accurate(free, is_accurate), *dear])

    for _, tier in groupby(sorted(passes, key=_operators), key=_operators):
        proposals = [proposal for each in tier for proposal in each.proposals(stream)]
        found = list(_candidates(proposals, refused))
        yield from _ties([each for each in found if _is_full(each, stream)])
        waiting += [each for each in found if not _is_full(each, stream)]
        whole += [each for each in found if each.lesser is not None]
        if whole and is_fast and not later:
            yield from in_order()
            waiting, whole = [], []
    if later and any(is_priced(each) for each in waiting):
        others = [proposal for each in later for proposal in each.proposals(stream)]
        savings = [each.saved for each in others if isinstance(each, Candidate)]
        most = max(savings, default=0)
        waiting = [each for each in waiting if each.keeps_layers or each.saved >= most]
    yield from in_order()


def _candidates(
    proposals: Iterable[Proposal], refused: list[CandidateReport]
) -> Iterator[Candidate]:
    """Those of ``proposals`` that can be done; the others are added to ``refused``."""
    for proposal in proposals:
        if isinstance(proposal, Candidate):
            yield proposal
        else:
            refused.append(proposal)


def _accurate(
    candidates: Sequence[Candidate], is_accurate: Callable[[Candidate], bool]
) -> Iterator[Candidate]:
    """Those that differ in degree from the first accurate one on, found by bisection; all others.

    What differs in degree is the more accurate the less it saves.
    """
    degrees: dict[object, list[Candidate]] = {}
    for candidate in sorted(candidates, key=operator.attrgetter("gain")):
        degrees.setdefault(candidate.degree_of or id(candidate), []).append(candidate)
    for alike in degrees.values():
        first = bisect_left(alike, True, key=is_accurate) if len(alike) > 1 else 0
        yield from alike[first:]


def _is_full(candidate: Candidate, stream: Subject) -> bool:
    return -candidate.gain[0] >= stream.width**2


def _ties(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    gain = operator.attrgetter("gain")
    for _, group in groupby(sorted(candidates, key=gain), key=gain):
        yield list(group)


def _operators(each: FoldPass) -> int:
    return each.operators


def _names(stream: Subject) -> set[str]:
    names = {value.name for value in stream.values}
    for member in stream.members:
        names |= {member.weight.leaf.name, member.node.name, member.label}
    return {name for name in names if name}
