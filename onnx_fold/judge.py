"""The rule of the parity check: when are the outputs of two models those of the same function?

Both models run on the same inputs, and every output ``a`` of the original is compared with ``b`` of
the folded model:

    max abs error    max |a - b|
    relative error   ||a - b||_2 / ||a||_2
    cosine           <a, b> / (||a||_2 ||b||_2)

Two equal functions differ by their rounding errors, so the question is how large these may be. The
yardstick is the original's own: it also runs in a wider type (float32 for 16 bits, float64 for
float32), with the same weights, which gives the reference ``r``, and

    error of the original  e_o = ||a - r||_2 / ||r||_2
    error of the folded    e_f = ||b - r||_2 / ||r||_2.

**The rule.** A float output passes if ``e_f`` is at most the limit

    max(tolerance, min(max_ratio * (e_o + u), 4 * sqrt(u))),

where ``u`` is the unit roundoff of the type (2^-24 for float32). The tolerance is an error that is
small whatever the original's is; the ratio allows for models that amplify rounding errors; and
nothing passes by its ratio once half of the digits are lost (``sqrt(u)``, and two bits).
Without a reference, or if ``e_o`` itself is beyond that point, ``e_o`` counts as 0 and the relative
error stands for ``e_f``. ``tolerance=0`` leaves the ratio
alone to decide, ``max_ratio=0`` the tolerance. Integers, booleans and strings must be equal, and
NaN and infinity must be at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from scipy.special import log_softmax

from onnx_fold.inputs import Arrays, index_limits
from onnx_fold.runtime import Array
from onnx_fold.widen import is_float, precision, unit_roundoff

__all__ = ["TOLERANCE", "Feed", "Judge", "OutputParity", "Run"]

TOLERANCE = {
    ir.DataType.DOUBLE: 1e-10,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 5e-2,
}
"""The relative error that always passes, by the float type of the weights."""


@dataclass
class OutputParity:
    """How one output differs, at its worst over all inputs.

    Attributes:
        name: Name of the output.
        dtype: Its type in the original, such as ``FLOAT16``.
        ok: Whether it passes.
        reason: Why it does not.
        max_abs_error: ``max |a - b|``.
        relative_error: ``||a - b||_2 / ||a||_2``.
        cosine: ``<a, b> / (||a||_2 ||b||_2)``.
        error_original: ``||a - r||_2 / ||r||_2``, None without a reference.
        error_folded: ``||b - r||_2 / ||r||_2``, None without a reference.
        ratio: ``error_folded / error_original``, None if the latter is None or 0.
        limit: The error up to which the output passes, None for exact types.
        top1_agreement: For logits, the share of rows with the same largest element.
        kl_divergence: For logits, mean of ``KL(softmax(a) || softmax(b))`` in nats.
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
    limit: float | None = None
    top1_agreement: float | None = None
    kl_divergence: float | None = None


@dataclass
class Feed:
    """Inputs by name, with what they are in words.

    Optional ones are skipped if the original cannot run them.
    """

    label: str
    arrays: Arrays
    optional: bool = False


@dataclass
class Run:
    """The outputs of the models for one feed."""

    feed: Feed
    original: Arrays
    folded: Arrays = field(default_factory=dict)
    reference: Arrays | None = None


@dataclass
class Judge:
    """Applies the rule of this module to the outputs of a model.

    Attributes:
        model: The original.
        tolerance: See the rule; None for that of the type of the weights, :data:`TOLERANCE`.
        max_ratio: See the rule.
        notes: Gets what a reader must know to judge the numbers.
    """

    model: ir.Model
    tolerance: float | None
    max_ratio: float
    notes: list[str]

    def __post_init__(self) -> None:
        self.vocabularies = set(index_limits(self.model).values())

    def output(self, name: str, runs: Sequence[Run]) -> OutputParity:
        """Compare one output over all runs."""
        whole = name.partition("[")[0]  # of a sequence y the elements are called y[0], y[1], ...
        outputs = self.model.graph.outputs
        value = next((v for v in outputs if v.name in (name, whole)), None)
        dtype = None if value is None else value.dtype
        result = OutputParity(name, "" if dtype is None else dtype.name)
        for run in runs:
            self._compare(result, run)
            if result.reason:
                break
        else:
            if is_float(runs[0].original[name]):
                self._apply_rule(result, dtype)
        result.ok = not result.reason
        return result

    def _compare(self, result: OutputParity, run: Run) -> None:
        """Raise the errors in ``result`` to those of ``run``, or set its reason if it fails."""
        a, b = run.original[result.name], run.folded.get(result.name)
        if b is None or a.shape != b.shape:
            shape = "missing" if b is None else list(b.shape)
            result.reason = f"shape {list(a.shape)} became {shape} ({run.feed.label})"
        elif not is_float(a):
            if not np.array_equal(a, b):
                count = int(np.count_nonzero(a != b))
                result.max_abs_error = _exact_distance(a, b)
                result.reason = f"{count} of {a.size} elements differ ({run.feed.label})"
        else:
            reference = None if run.reference is None else run.reference.get(result.name)
            self._compare_floats(result, _wide(a), _wide(b), reference, run.feed.label)

    def _compare_floats(
        self, result: OutputParity, a: Array, b: Array, reference: Array | None, label: str
    ) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            where = "the folded model" if np.isfinite(a[~finite]).any() else "the original"
            count = a.size - int(np.count_nonzero(finite))
            result.reason = f"NaN or infinity in {where} at {count} of {a.size} elements ({label})"
            return
        if not finite.all():
            self._note(f"output '{result.name}': equal NaN or infinity in both models, left out")
        if self._is_logits(result.name, a) and finite.all():
            top1, kl = _compare_logits(a, b)
            result.top1_agreement = min(top1, _or(result.top1_agreement, top1))
            result.kl_divergence = max(kl, _or(result.kl_divergence, kl))
        x, y = a[finite], b[finite]
        result.max_abs_error = max(result.max_abs_error, float(np.abs(x - y).max(initial=0.0)))
        result.relative_error = max(result.relative_error, _relative_error(y, x))
        result.cosine = min(result.cosine, _cosine(x, y))
        if reference is None:
            return
        r = _wide(reference)[finite]
        if not np.isfinite(r).all():
            self._note(f"output '{result.name}': NaN or infinity in the reference ({label})")
            return
        result.error_original = max(_relative_error(x, r), _or(result.error_original, 0.0))
        result.error_folded = max(_relative_error(y, r), _or(result.error_folded, 0.0))

    def _apply_rule(self, result: OutputParity, dtype: ir.DataType | None) -> None:
        dtypes = [precision(self.model), *([dtype] if dtype in TOLERANCE else [])]
        coarsest = max(dtypes, key=unit_roundoff)
        u = unit_roundoff(coarsest)
        tolerance = TOLERANCE[coarsest] if self.tolerance is None else self.tolerance
        ceiling = 4 * math.sqrt(u)
        own, error = result.error_original, result.error_folded
        if own:
            result.ratio = _or(error, 0.0) / own
        if own is not None and own > ceiling:
            self._note(
                f"output '{result.name}': the original is {own:.0e} off its own reference, which is"
                " no yardstick"
            )
            own = None
        if own is None or error is None:
            own, error = 0.0, result.relative_error
        result.limit = max(tolerance, min(self.max_ratio * (own + u), ceiling))
        if not error <= result.limit:
            times = "" if result.ratio is None else f", {result.ratio:.3g}x the original's own"
            result.reason = f"error {error:.1e} is over the limit {result.limit:.1e}{times}"

    def _is_logits(self, name: str, a: Array) -> bool:
        named = "logits" in name.lower()
        return a.ndim > 0 and a.size > 0 and (named or a.shape[-1] in self.vocabularies)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _relative_error(x: Array, reference: Array) -> float:
    """Return ``||x - reference||_2 / ||reference||_2``, of two zeros 0."""
    difference, norm = float(np.linalg.norm(x - reference)), float(np.linalg.norm(reference))
    if norm == 0.0:
        return math.inf if difference else 0.0
    return difference / norm


def _cosine(x: Array, y: Array) -> float:
    norms = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    if norms == 0.0:
        return 1.0 if np.array_equal(x, y) else 0.0
    return float(np.dot(x, y)) / norms


def _exact_distance(a: Array, b: Array) -> float:
    if a.dtype.kind not in "iub":
        return math.nan
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _compare_logits(a: Array, b: Array) -> tuple[float, float]:
    """Return the share of equal top-1 and the mean ``KL(softmax(a) || softmax(b))`` in nats."""
    p, q = log_softmax(a, axis=-1), log_softmax(b, axis=-1)
    top1 = np.mean(a.argmax(axis=-1) == b.argmax(axis=-1))
    return float(top1), max(0.0, float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))))
