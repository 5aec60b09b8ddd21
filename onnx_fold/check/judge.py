"""The rule of the parity check: when are the outputs of two models those of the same function?

Both models run on the same inputs, and every output ``a`` of the original is compared with ``b`` of
the folded model. Two equal functions differ by their rounding errors, so the question is how large
these may be. The yardstick is the original's own: it also runs in a wider type (float32 for 16
bits, float64 for float32), with the same weights, which gives the reference ``r``, and

    error of the original  e_o = ||a - r||_2 / ||r||_2
    error of the folded    e_f = ||b - r||_2 / ||r||_2.

**The rule.** A float output passes if ``e_f`` is at most the limit

    min(max_ratio * (e_o + u), 4 * sqrt(u)),

where ``u`` is the unit roundoff of the type (2^-24 for float32): an original may happen to be exact
where the folded model rounds once, and no whole output passes once half of the digits
are lost (``sqrt(u)``, and two bits) of the narrowest type that the graph computes in. That must
hold

- of each input shape by itself,
- of the whole output,
- of its worst row ``[..., :]`` and of its worst channel: the largest of ``||b_i - r_i|| / s_i``
  against the largest of ``||a_i - r_i|| / s_i``, where ``s_i`` is ``||r_i||``, or the root mean
  square of all of them where that is larger. A small row has no small errors, and the worst one of
  the original is less a matter of chance than its error of the very same row would be.

It still is one where few rows hang on the last digits of what makes them: they may be lucky once.
So where a row, a channel or the most likely token is over its limit, or an output that is one row,
the reference runs again, its weights rounded anew (:mod:`onnx_fold.check.stored`) in a few draws.
What a draw moves counts as an error of the original, whose weights were all rounded once.

A CPU runs float16 in float32 from operator to operator, so that an original is rounded once, at its
outputs, but the weights of a fold once more. There both models also run with the result of every
operator rounded, as their types say and other hardware does, and of each the larger error counts.

A Sigmoid is rounded as 1 is, however small its result. So where an output comes from Sigmoids
alone, norms below those of as many ones count as these; and what the Sigmoids read is judged, too.

Where the output has logits, ``KL(softmax(r) || softmax(b))`` is at most ``max_ratio^2`` times that
of the original (it grows with the square of an error) and of logits that are rounded once more; and
where the most likely token is another one it must be a tie: ``r`` prefers its own by at most
``2 * max_ratio`` times the largest error of one logit of the original.

Of a float64 model with narrower parts the reference shows the errors of these alone: the tolerance
of float64 takes the place of ``max_ratio * u``.

A ``tolerance`` limits ``e_f`` further; it never allows more. Without a reference, or if ``e_o`` is
beyond ``4 * sqrt(u)``, which is no yardstick, ``||a - b||_2 / ||a||_2`` is at most
:data:`TOLERANCE` of the type. NaN and infinity must be at the same places.

Integers, booleans and strings must be equal, but for ties of floats by which they are decided: at
most ``max_ratio`` times as many elements may be other ones than in ``r`` as in the original, or in
``r`` with its weights rounded anew, and no more than ``4 * sqrt(u)`` of them. Outputs of which
elements are picked, or put in order, by their numbers (NonMaxSuppression, TopK, NonZero) are left
out, with a note, on inputs where the original itself picks others in another rounding: it is
another number of them, or more than ``4 * sqrt(u)`` off. The floats that decide are judged, too.

**Models of other float types**, such as a model and its float16 version, have no yardstick in
common: the same holds for them, by the coarsest of the types that the weights and the output have
in either.

**Allclose.** In place of all of that a caller may ask for NumPy's rule: of every element of every
float output ``|a - b| <= atol + rtol * |a|``. What is no float is judged as above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from scipy.special import log_softmax

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import is_float, unit_roundoff
from onnx_fold.graph.widen import precision
from onnx_fold.runtime.generate import GreedyCheck, GreedyParity
from onnx_fold.runtime.inputs import Arrays, index_limits

__all__ = ["TOLERANCE", "Feed", "Judge", "OutputParity", "Run"]

TOLERANCE = {
    ir.DataType.DOUBLE: 1e-10,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 5e-2,
}
"""The relative error that passes where there is no yardstick, by the float type of the weights."""


@dataclass
class OutputParity:
    """How one output differs, on the input where it is nearest to its limit.

    Attributes:
        name: Name of the output.
        dtype: Its type in the original, such as ``FLOAT16``.
        ok: Whether it passes.
        reason: Why it does not.
        max_abs_error: ``max |a - b|`` of all inputs.
        relative_error: ``||a - b||_2 / ||a||_2``.
        cosine: ``<a, b> / (||a||_2 ||b||_2)``.
        error_original: ``||a - r||_2 / ||r||_2``, None without a reference; where the models ran
            with every result rounded, too, the larger of both.
        error_folded: ``||b - r||_2 / ||r||_2``, the same.
        ratio: ``error_folded / error_original``, None if the latter is None or 0.
        row_ratio: The same of the worst row.
        channel_ratio: The same of the worst channel.
        margin: What was judged as a share of its limit.
        limit: What ``judged`` may be, None for exact types.
        judged: What was nearest to its limit: ``folded``, ``row``, ``channel``, ``relative``,
            ``element``, ``KL`` or ``top-1``.
        limit_from: Where that limit comes from.
        top1_agreement: For logits, the share of rows with the same largest element.
        kl_divergence: For logits, mean of ``KL(softmax(a) || softmax(b))`` in nats.
        left_out: The share of the elements that were not compared, being NaN or infinite in both.
    """

    name: str
    dtype: str
    ok: bool = True
    reason: str = ""
    max_abs_error: float = 0.0
    relative_error: float = 0.0
    cosine: float = 1.0
    error_original: float | None = None
    error_folded: float | None = None
    ratio: float | None = None
    row_ratio: float | None = None
    channel_ratio: float | None = None
    limit: float | None = None
    judged: str = ""
    limit_from: str = ""
    margin: float | None = None
    top1_agreement: float | None = None
    kl_divergence: float | None = None
    left_out: float = 0.0

    def __bool__(self) -> bool:
        return self.ok


@dataclass
class Feed:
    """Inputs by name, with what they are in words.

    Optional ones are skipped if the original cannot run them; of a group the first that it runs is
    enough.
    """

    label: str
    arrays: Arrays
    optional: bool = False
    group: str = ""


@dataclass
class Run:
    """The outputs of the models for one feed.

    Attributes:
        feed: What they read.
        original: Those of the original.
        folded: Those of the folded model.
        reference: Those of the original in a wider type, if it ran so.
        rounded: Those of both with every operator's result rounded, if they ran so, too.
        drawn: Those of the reference with its weights rounded anew, if that was asked.
    """

    feed: Feed
    original: Arrays
    folded: Arrays = field(default_factory=dict)
    reference: Arrays | None = None
    rounded: Run | None = None
    drawn: Sequence[Arrays] | None = None

    def both(self, name: str) -> Iterator[tuple[Array, Array]]:
        """An output of the original and of the folded model, in each way in which they ran."""
        yield self.original[name], self.folded[name]
        if self.rounded is not None:
            ways = self.rounded.original, self.rounded.folded
            before, after = (outputs.get(name, np.zeros(0)) for outputs in ways)
            if before.shape == after.shape == self.original[name].shape:  # it may be another then
                yield before, after


@dataclass
class Judge:
    """Applies the rule of this module to the outputs of a model.

    Attributes:
        model: The original.
        tolerance: See the rule; None for no further limit.
        max_ratio: See the rule.
        notes: Gets what a reader must know to judge the numbers.
        folded: The folded model, if it is of another float type.
        close: ``atol`` and ``rtol``, if the rule is NumPy's.
        inner: Names of outputs that are inner values of the model, and so no logits.
        squashed: Names of outputs of which all comes from Sigmoids.
        picked: Names of outputs whose elements are picked, or put in order, by numbers.
        anew: Gives the reference of a run with its weights rounded anew, in a few draws.
    """

    model: ir.Model
    tolerance: float | None
    max_ratio: float
    notes: list[str]
    folded: ir.Model | None = None
    close: tuple[float, float] | None = None
    inner: Collection[str] = ()
    squashed: Collection[str] = ()
    picked: Collection[str] = ()
    anew: Callable[[Run], Sequence[Arrays]] = lambda _: ()

    def __post_init__(self) -> None:
        self.models = [self.model] if self.folded is None else [self.model, self.folded]
        self.vocabularies = set(index_limits(self.model).values())
        self.precision = max(map(precision, self.models), key=unit_roundoff)
        values = [value for node in self.model.graph.all_nodes() for value in node.outputs]
        held = {value.dtype for value in values} & TOLERANCE.keys()
        self.narrowest = max((*held, self.precision), key=unit_roundoff)
        self.ceiling = _half_of_the_digits(self.narrowest)

    def output(self, name: str, runs: Sequence[Run]) -> OutputParity:
        """Compare one output over all runs."""
        whole = name.partition("[")[0]  # of a sequence y the elements are called y[0], y[1], ...
        outputs = (value for model in self.models for value in model.graph.outputs)
        dtypes = [value.dtype for value in outputs if value.name in (name, whole)]
        own = dtypes[0] if dtypes else None
        result = OutputParity(name, "" if own is None else own.name)
        coarsest = self._coarsest(*dtypes)
        for run in runs:
            found = replace(result)
            self._compare(found, run, coarsest)
            if found.reason and name in self.picked and self._picks_others(name, run):
                result.left_out = 1.0
                self._note(f"output '{name}': other roundings pick others ({run.feed.label})")
                continue
            result = found
            if result.reason:
                break
        result.ok = not result.reason
        return result

    def _picks_others(self, name: str, run: Run) -> bool:
        """Whether the original itself, in another rounding, gives other elements."""
        r = None if run.reference is None else run.reference.get(name)
        if r is None or name not in run.folded:
            return False
        known = [run.original, *self._draws(run)]
        known += [] if run.rounded is None else [run.rounded.original]
        others = [each[name] for each in known if name in each]
        return any(x.shape != r.shape or _share_off(x, r) > self.ceiling for x in others)

    def greedy(self, check: GreedyCheck) -> GreedyParity:
        """Judge greedy decoding by the same rule."""
        outputs = {value.name: value.dtype for value in self.model.graph.outputs}
        coarsest = self._coarsest(outputs.get(check.decoder.logits))
        given = math.inf if self.tolerance is None else self.tolerance
        tolerance = min(TOLERANCE[coarsest], given)
        return check.judge(self.max_ratio, unit_roundoff(coarsest), tolerance)

    def _coarsest(self, *dtypes: ir.DataType | None) -> ir.DataType:
        """Return the coarsest float type of the weights' and ``dtypes``."""
        held = (each for each in dtypes if each in TOLERANCE)
        return max((self.precision, *(each for each in held if each)), key=unit_roundoff)

    def _compare(self, result: OutputParity, run: Run, dtype: ir.DataType) -> None:
        """Compare one run, and keep in ``result`` what is nearest to its limit."""
        a, b = run.original[result.name], run.folded.get(result.name)
        label = run.feed.label
        if b is None or a.shape != b.shape:
            shape = "missing" if b is None else list(b.shape)
            result.reason = f"shape {list(a.shape)} became {shape} ({label})"
        elif not is_float(a):
            if not np.array_equal(a, b):
                self._compare_exact(result, a, b, run)
        else:
            reference = None if run.reference is None else run.reference.get(result.name)
            if reference is not None and reference.shape != a.shape:
                self._note(f"output '{result.name}': the reference has another shape ({label})")
                reference = None
            wide = None if reference is None else _wide(reference)
            pairs = [(_wide(before), _wide(after)) for before, after in run.both(result.name)]
            self._compare_floats(result, pairs, wide, run, dtype)

    def _compare_exact(self, result: OutputParity, a: Array, b: Array, run: Run) -> None:
        """Elements that differ pass where floats were as near to deciding otherwise before."""
        result.max_abs_error = _exact_distance(a, b)
        result.reason = f"{np.count_nonzero(a != b)} of {a.size} elements differ ({run.feed.label})"
        r = None if run.reference is None else run.reference.get(result.name)
        if r is None or r.shape != a.shape:
            return
        before, after = zip(*run.both(result.name), strict=True)
        own, error = (
            max(np.count_nonzero(each != r) for each in side)
            for side in ((*before, *self._drawn(result.name, run, r.shape)), after)
        )
        if error <= min(self.max_ratio * own, self.ceiling * a.size):
            reason = f"{result.reason}, of the original in other roundings up to {own}"
            self._note(f"output '{result.name}': {reason}")
            result.reason = ""

    def _drawn(self, name: str, run: Run, shape: tuple[int, ...]) -> list[Array]:
        """An output of the reference with its weights rounded anew, in the draws that have it."""
        found = (each[name] for each in self._draws(run) if name in each)
        return [each for each in found if each.shape == shape]

    def _draws(self, run: Run) -> Sequence[Arrays]:
        if run.drawn is None:
            run.drawn = self.anew(run)
        return run.drawn

    def _compare_floats(
        self,
        result: OutputParity,
        both: Sequence[tuple[Array, Array]],
        r: Array | None,
        run: Run,
        dtype: ir.DataType,
    ) -> None:
        a, b = both[0]
        label = run.feed.label
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all() and not self._same_infinities(result, a, b, r, label):
            return
        if r is not None and not np.isfinite(r[finite]).all():
            self._note(f"output '{result.name}': NaN or infinity in the reference ({label})")
            r = None
        a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        r = None if r is None else np.where(finite, r, 0.0)
        runs = _Outputs([a], [b])
        for before, after in both[1:]:
            before, after = (np.where(finite, each, 0.0) for each in (before, after))
            if np.isfinite(before).all():
                runs.before.append(before)
                runs.after.append(after)
        result.max_abs_error = max(result.max_abs_error, float(np.abs(a - b).max(initial=0.0)))
        logits = self._is_logits(result.name, a) and bool(finite.all())
        if logits:
            top1, kl = float(np.mean(a.argmax(-1) == b.argmax(-1))), _divergence(a, b)
            result.top1_agreement = min(top1, _or(result.top1_agreement, top1))
            result.kl_divergence = max(kl, _or(result.kl_divergence, kl))
        unit = float(result.name in self.squashed)
        errors = {} if r is None else _errors(runs, r, unit)
        marks = self._marks(runs, r, errors, dtype, logits, unit)
        if r is None or marks[0].name == "relative":
            self._note_no_yardstick(result.name, runs, r)
        elif any(mark.margin > 1.0 and mark.is_of_few for mark in marks):
            draws = self._drawn(result.name, run, r.shape)
            drawn = [np.where(finite, _wide(draw), 0.0) for draw in draws]
            runs = replace(runs, drawn=[draw for draw in drawn if np.isfinite(draw).all()])
            errors = _errors(runs, r, unit)
            marks = self._marks(runs, r, errors, dtype, logits, unit)
            if all(mark.margin <= 1.0 for mark in marks):
                self._note(
                    f"output '{result.name}': at its worst the original is as far off with its"
                    f" weights rounded anew ({label})"
                )
        worst = max(marks, key=lambda mark: mark.margin)
        if result.margin is None or worst.margin > result.margin:
            self._keep(result, worst, runs, errors, unit)
        if worst.margin > 1.0:
            result.reason = worst.reason(label, result.ratio)

    def _marks(
        self,
        runs: _Outputs,
        r: Array | None,
        errors: _Errors,
        coarsest: ir.DataType,
        logits: bool,
        unit: float,
    ) -> list[_Mark]:
        """Return every error that is judged, with its limit."""
        a, b = runs.before[0], runs.after[0]
        if self.close is not None:
            return [_worst_element(a, b, *self.close)]
        u = unit_roundoff(coarsest)
        own = None if r is None else max(_relative_error(each, r, unit) for each in runs.before)
        ceiling = max(self.ceiling, _half_of_the_digits(coarsest))
        if r is None or own is None or own > ceiling:
            limit = TOLERANCE[coarsest]
            source = f"{coarsest.name.lower()}'s, without a yardstick"
            if own is not None:
                source += f": rounding alone puts the original {own:.0e} off"
            if self.tolerance is not None and self.tolerance < limit:
                limit, source = self.tolerance, "the tolerance"
            return [_Mark("relative", _relative_error(b, a, unit), limit, source)]
        marks = []
        floor = TOLERANCE[coarsest] if coarsest == ir.DataType.DOUBLE else self.max_ratio * u
        for name, (own, error) in errors.items():
            limit, source = self.max_ratio * own + floor, f"{self.max_ratio:g}x the original's"
            if name == "folded" and ceiling < limit:
                limit, source = ceiling, "half of the digits"
            if name == "folded" and self.tolerance is not None and self.tolerance < limit:
                limit, source = self.tolerance, "the tolerance"
            marks.append(_Mark(name, error, limit, source, runs.is_of_few(name)))
        if logits:
            marks += self._marks_of_logits(runs, r, u)
        return marks

    def _marks_of_logits(self, runs: _Outputs, r: Array, u: float) -> list[_Mark]:
        largest = float(np.abs(r).max(initial=0.0))
        own = max(_divergence(r, a) for a in runs.before)
        own += 0.5 * (u * largest) ** 2 + 1e-14  # what float64 can tell
        limit, source = self.max_ratio**2 * own, f"{self.max_ratio:g}²x the original's"
        known = *runs.before, *runs.drawn
        error = max(float(np.abs(a - r).max(initial=0.0)) for a in known) + u * largest
        tie = 2 * self.max_ratio * error
        return [
            _Mark("KL", max(_divergence(r, b) for b in runs.after), limit, source),
            _Mark(
                "top-1",
                max(_lead(r, b) for b in runs.after),
                tie,
                f"{2 * self.max_ratio:g}x the original's, a tie",
                is_of_few=True,
            ),
        ]

    def _keep(
        self,
        result: OutputParity,
        worst: _Mark,
        runs: _Outputs,
        errors: _Errors,
        unit: float,
    ) -> None:
        a, b = runs.before[0], runs.after[0]
        result.margin, result.limit = worst.margin, worst.limit
        result.judged, result.limit_from = worst.name, worst.source
        result.relative_error, result.cosine = _relative_error(b, a, unit), _cosine(a, b)
        if not errors:
            return
        result.error_original, result.error_folded = errors["folded"]
        ratios = {name: error / own if own else None for name, (own, error) in errors.items()}
        result.ratio = ratios["folded"]
        result.row_ratio, result.channel_ratio = ratios["row"], ratios["channel"]

    def _same_infinities(
        self, result: OutputParity, a: Array, b: Array, r: Array | None, label: str
    ) -> bool:
        """Whether NaN and infinity are at the same places; say of which model they are."""
        finite = np.isfinite(a) & np.isfinite(b)
        counts = {
            "the original": int(np.count_nonzero(~np.isfinite(a))),
            "the folded model": int(np.count_nonzero(~np.isfinite(b))),
        }
        advice = self._advice(a, r)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            where = " and ".join(
                f"{_share(count / a.size)} of {name} ({count} of {a.size} elements)"
                for name, count in counts.items()
                if count
            )
            result.reason = f"NaN or infinity in {where}, not at the same places{advice} ({label})"
            return False
        share = counts["the original"] / a.size
        result.left_out = max(result.left_out, share)
        self._note(
            f"output '{result.name}': {_share(share)} of it is NaN or infinity in both models and"
            f" was left out{advice} ({label})"
        )
        return True

    def _advice(self, a: Array, r: Array | None) -> str:
        overflows = r is not None and bool(np.isfinite(r[~np.isfinite(a)]).any())
        if overflows and self.precision == ir.DataType.FLOAT16:
            return "; float16 ends at 65504, which the original exceeds: use bfloat16 or float32"
        return ""

    def _note_no_yardstick(self, name: str, runs: _Outputs, r: Array | None) -> None:
        if r is not None:
            own = max(_relative_error(each, r) for each in runs.before)
            self._note(
                f"output '{name}': the original is {own:.0e} off its own reference, which is no"
                " yardstick"
            )

    def _is_logits(self, name: str, a: Array) -> bool:
        if a.ndim == 0 or a.size == 0 or name in self.inner:
            return False
        return "logits" in name.lower() or a.shape[-1] in self.vocabularies

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


@dataclass(frozen=True)
class _Outputs:
    """What the original gave, and the folded model, first as they are; of errors the largest count.

    Attributes:
        before: Of the original.
        after: Of the folded model, in the same order.
        drawn: Of the reference with its weights rounded anew.
    """

    before: list[Array]
    after: list[Array]
    drawn: list[Array] = field(default_factory=list)

    def is_of_few(self, name: str) -> bool:
        """Whether an error is that of one row or channel, of which the original's may be lucky."""
        return name != "folded" or math.prod(self.before[0].shape[:-1]) == 1


@dataclass(frozen=True)
class _Mark:
    """One error that is judged.

    Attributes:
        name: Its name.
        error: How large it is.
        limit: How large it may be.
        source: Where that comes from.
        is_of_few: Whether it is of one row, channel or token, of which the original's may be lucky.
    """

    name: str
    error: float
    limit: float
    source: str
    is_of_few: bool = False

    @property
    def margin(self) -> float:
        """The error as a share of its limit; NaN counts as too large."""
        if self.error == 0.0:
            return 0.0
        margin = self.error / self.limit if self.limit else math.inf
        return math.inf if math.isnan(margin) else margin

    def reason(self, label: str, ratio: float | None) -> str:
        """Why it does not pass."""
        what = {
            "folded": "error",
            "relative": "error",
            "row": "error of the worst row",
            "channel": "error of the worst channel",
            "element": "difference of the worst element",
            "KL": "KL divergence",
            "top-1": "lead of the token that is no longer the most likely one",
        }[self.name]
        times = (
            "" if ratio is None or self.name != "folded" else f", {ratio:.3g}x the original's own"
        )
        return (
            f"{what} {self.error:.2e} is over the limit {self.limit:.2e}{times}, which is"
            f" {self.source} ({label})"
        )


def _half_of_the_digits(dtype: ir.DataType | None) -> float:
    """The relative error at which half of the digits of ``dtype`` are lost, and two bits."""
    return 4 * math.sqrt(unit_roundoff(dtype))


def _share_off(x: Array, r: Array) -> float:
    """The relative error of floats, and the share of other elements that are not ``r``'s."""
    if is_float(r):
        return _relative_error(_wide(x), _wide(r))
    return float(np.mean(x != r)) if r.size else 0.0


def _worst_element(a: Array, b: Array, atol: float, rtol: float) -> _Mark:
    """Return the difference that is nearest to what NumPy's ``allclose`` lets it be."""
    errors, limits = np.abs(a - b), atol + rtol * np.abs(a)
    shares = np.divide(errors, limits, out=np.where(errors > 0, np.inf, 0.0), where=limits > 0)
    source = f"{atol:g} + {rtol:g} |a|"
    if not shares.size:
        return _Mark("element", 0.0, atol, source)
    worst = np.unravel_index(int(shares.argmax()), shares.shape)
    return _Mark("element", float(errors[worst]), float(limits[worst]), source)


_Errors: TypeAlias = Mapping[str, tuple[float, float]]
"""The errors of the whole, the worst row and the worst channel: before, and after."""


def _errors(runs: _Outputs, r: Array, unit: float) -> _Errors:
    """Return the errors of the whole, the worst row, the worst channel: before, and after."""
    rows = -1, r.shape[-1] if r.ndim else 1
    sides = runs.before, runs.after, runs.drawn
    before, after, drawn = ([each.reshape(rows) for each in side] for side in sides)
    reference = r.reshape(rows)
    measures: dict[str, Callable[[Array], float]] = {
        "folded": lambda each: _relative_error(each, reference, unit),
        "row": lambda each: _worst_error(each, reference, 1, unit),
        "channel": lambda each: _worst_error(each, reference, 0, unit),
    }
    errors = {}
    for name, error in measures.items():
        own = [*before, *drawn] if runs.is_of_few(name) else before
        errors[name] = max(map(error, own)), max(map(error, after))
    return errors


def _worst_error(x: Array, r: Array, axis: int, unit: float) -> float:
    """Return the largest ``||x_i - r_i|| / s_i`` of rows (axis 1) or channels (axis 0)."""
    sizes, errors = (np.sum(np.square(each), axis) for each in (r, x - r))
    least = max(sizes.mean() if sizes.size else 0.0, unit**2 * r.shape[axis])
    scales = np.maximum(sizes, least)
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.where(errors > 0, errors / scales, 0.0).max(initial=0.0)
    return math.sqrt(float(worst))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _share(share: float) -> str:
    return f"{100 * share:.3g} %"


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _relative_error(x: Array, reference: Array, unit: float = 0.0) -> float:
    """Return ``||x - reference||_2 / ||reference||_2``, of two zeros 0.

    The norm counts at least as if all elements were ``unit``.
    """
    difference, norm = float(np.linalg.norm(x - reference)), float(np.linalg.norm(reference))
    norm = max(norm, unit * math.sqrt(reference.size))
    if norm == 0.0:
        return math.inf if difference else 0.0
    return difference / norm


def _cosine(x: Array, y: Array) -> float:
    norms = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    if norms == 0.0:
        return 1.0 if np.array_equal(x, y) else 0.0
    return float(np.vdot(x, y)) / norms


def _exact_distance(a: Array, b: Array) -> float:
    if a.dtype.kind not in "iub":
        return math.nan
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _divergence(x: Array, y: Array) -> float:
    """Return the mean ``KL(softmax(x) || softmax(y))`` in nats."""
    p, q = log_softmax(x, axis=-1), log_softmax(y, axis=-1)
    return max(0.0, float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))))


def _lead(r: Array, b: Array) -> float:
    """Return by how much ``r`` prefers its most likely tokens to those of ``b``, at most."""
    chosen = np.take_along_axis(r, b.argmax(-1)[..., None], -1)[..., 0]
    return float((r.max(-1) - chosen).max(initial=0.0))
