"""The fold itself: passes propose candidates for each closed stream, the best one is taken.

Candidates over the tolerance are dropped first; of the rest the one that removes most weights wins,
then the one with the fewest operators, then the most accurate one.
"""

from __future__ import annotations

import logging
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any, ClassVar

import onnx_ir as ir

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.expression import FoldedTensor, ImpliedTensor
from onnx_fold.base.progress import Report, ignore
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


class FoldPass(ir.passes.InPlacePass):
    """Base of the fold strategies; also a pass of its own in any ``onnx_ir.passes.Sequential``.

    A strategy sets ``name`` and implements :meth:`candidates`, :meth:`of_branches`,
    :meth:`of_joined`, :meth:`of_divided` or :meth:`of_rows`.

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
    reports: list[tuple[int, StreamReport]] = []
    finished: set[ir.Node] = set()
    shapes: Shapes | None = inferred
    is_first_round = True
    memo: Memo = {}
    phases = _phases(passes)
    rotated: set[ir.Value] = set()
    if options.by_reads:
        options = replace(options, room=(GROWTH - 1) * cost(model).weights)
    while True:
        left: list[tuple[int, StreamReport]] = []
        touched: set[ir.Node] = set()
        waiting: dict[ir.Node, int] = {}
        kept: dict[ir.Value, NormsKept] = {}
        is_merging = not any(each.is_basis_change for each in phases[0])
        later = [each for each in passes if each not in phases[0]]
        for stream in _subjects(model, activations, shapes, phases[0], progress):
            nodes = stream.nodes
            position = min(order.get(node, 0) for node in nodes)
            report = StreamReport.of(stream, kept)
            is_general = stream.group == Group.GENERAL
            normed = stream if isinstance(stream, Stream) and not is_general else None
            if normed is not None and not normed.is_closed:
                kept |= dict.fromkeys(normed.values, norms_kept(normed, report))
                continue
            if not report.is_foldable:
                if is_first_round and not rotated.intersection(stream.values):
                    reports.append((position, report))
                continue
            wider = max((waiting.get(node, 0) for node in nodes), default=0)
            if nodes & touched or (is_merging and wider > stream.width):
                waiting |= {node: max(stream.width, waiting.get(node, 0)) for node in nodes}
                continue  # a neighbour has just changed, or is to: look again in the next round
            report, rewrite = _choose(stream, report, phases[0], later, options, memo)
            if rewrite is not None and report.folded is not None:
                changed = nodes | rewrite.nodes
                if changed & touched:
                    continue
                moved = (*stream.values, *rewrite.reordered, *rewrite.mixed, *rewrite.resized)
                if activations is not None:
                    activations.forget(moved)
                names = frozenset(v.name for v in (*moved, *rewrite.touched) if v.name)
                if options.by_reads:
                    options = replace(options, room=options.room + rewrite.weights_removed())
                rewrite.apply(editor)
                logger.info("%s: %s", report.folded.strategy, report.folded.text)
                touched |= changed
                finished |= nodes
                reports.append((position, replace(report, changed=names)))
                if normed is not None:
                    rotated |= set(normed.values)
            elif normed is not None:
                found = norms_kept(normed, report)
                kept |= dict.fromkeys(normed.values, found)
                if not normed.writers:  # no projection leads to the norm: nothing else tells of it
                    left.append((position, replace(report, reasons=[found.text])))
            elif (stream.is_closed or not nodes & finished) and report.is_foldable:
                left.append((position, report))
        if not touched and len(phases) == 1:
            break
        if not touched:
            del phases[0]
        is_first_round, shapes = False, None if touched else shapes
    return [report for _, report in sorted([*reports, *left], key=lambda item: item[0])]


def _phases(passes: Sequence[FoldPass]) -> list[Sequence[FoldPass]]:
    """Whatever merges first, to the fixpoint: a change of basis may stand in its way."""
    merging = [each for each in passes if not each.is_basis_change]
    return [merging, passes] if 0 < len(merging) < len(passes) else [passes]


def _subjects(
    model: ir.Model,
    activations: Activations | None,
    inferred: Shapes | None,
    passes: Sequence[FoldPass],
    progress: Report,
) -> Iterator[Subject]:
    """What the passes are asked about.

    Streams that only an orthogonal basis passes through are looked for if a pass asks for them; the
    parts of open ones are among those that any basis passes through, with the reasons.

    Where passes only merge, the widest stream comes first: so a chain of matrices ends with the
    fewest weights. No best chain keeps two streams, ``d`` and a narrower ``d'`` beside it: without
    ``d``, ``d' d + d dⱼ`` becomes ``d' dⱼ``, which is less. So it keeps the narrowest, or none.
    """

    def told(what: str, found: Sequence[Subject]) -> Iterator[Subject]:
        for number, subject in enumerate(found, 1):
            progress(f"choosing folds: {what} {number} of {len(found)}", 0, 0)
            yield subject
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
    if not any(each.is_basis_change for each in passes):
        streams.sort(key=lambda stream: (-stream.width, len(stream.members)))
    yield from told("stream", streams)


def _ask(passes: Sequence[FoldPass], hook: str) -> bool:
    """Whether one of ``passes`` has a say in the subjects that ``hook`` is called with."""
    return any(getattr(type(each), hook) is not getattr(FoldPass, hook) for each in passes)


def _choose(
    stream: Subject,
    report: StreamReport,
    passes: Sequence[FoldPass],
    later: Sequence[FoldPass],
    options: Options,
    memo: Memo,
) -> tuple[StreamReport, Rewrite | None]:
    """The best admissible candidate of a stream, or the reasons why there is none.

    What saves less than a candidate of the passes that are asked ``later`` waits for them.
    """
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
        verdict = candidate.judged(stream, options, memo)
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
            verdict = candidate.judged(stream, options, memo)
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
