"""Do two models store the same weights, up to rounding? Compared where no other noise hides it.

In 16 bits the activations' own rounding hides small faults: in bfloat16 a weight that is 3 % too
large is nearly invisible. So both models also run with their weights exactly as stored and with
activations in a wider type. What then differs comes from the weights alone.

**The yardstick.** If ``B`` is the same function as ``A``, then each weight that ``B`` does not
share with ``A`` is an exact one, rounded once. What that may do is measured: every such weight is
moved by half a unit in its last place, up or down at random, and ``B`` runs again (:data:`DRAWS`
times, and :data:`MORE_DRAWS` where that would not do). Where all of a weight, or of a row or a
column of it, needs less than half of its digits, such as an exponent of 3 or a row of the identity,
nothing was rounded and nothing is moved. A difference may be :data:`LIMIT` times the
root mean square of what these draws do. In a right model it is about 0.6 times: a rounding error is
uniform, with 0.58 of the deviation of its bound. It may be as large at its worst row or channel,
too; but of thousands one is far off by chance, in each draw as well. Where draws are over the limit
themselves at their worst, all is measured by that.

**Value by value.** Values of the same name in both models that a matrix product reads or writes are
compared too, and ``B`` then goes on with the value of ``A``: so the noise of many layers does not
add up before anything is looked at. Such a value may mean something else in ``B``, as in another
basis. It does, and is left out, if ``A`` with this value in the place of its own gets farther from
the outputs of ``B`` than it was, or from ``B`` at a value on the way there, which ``B`` computes as
``A`` does. A difference does not count if it moves the outputs of ``A`` far
less than the draws do (:data:`IRRELEVANT`): a bias that a softmax cancels is no part of the
function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import FRACTION_BITS, unit_roundoff
from onnx_fold.base.memory import available_memory
from onnx_fold.check.switchable import Switchable
from onnx_fold.errors import UsageError
from onnx_fold.graph.inline import inline_all
from onnx_fold.runtime.generate import Function
from onnx_fold.runtime.inputs import Arrays

__all__ = ["DRAWS", "LIMIT", "StoredParity", "compare_stored", "with_weights_anew"]

DRAWS = 3
"""How often the weights are rounded anew."""

MORE_DRAWS = 24
"""The same where a difference is over the limit: a few draws may all be small by chance, and where
only a few weights matter they often are."""

LIMIT = 3.0
"""How many times a difference may be as large as what rounding the weights anew does.

Of right models, folded by every strategy in every type, whole norms are at 0.5 to 0.8 and single
rows and columns at up to 2.2, as few draws of few weights measure them."""

FLOOR = 1 / 16
"""The share of the storage type's unit roundoff below which no difference is looked at."""

IRRELEVANT = 0.1
"""The share of what the draws do to the outputs below which a difference of a value is no fault."""

ROUNDING = 256
"""How many units of rounding of the wider type the layers of a model may add up to: what moves the
outputs by less is not known to move them."""

LIKENESS = 0.7
"""The correlation of two values below which they are no candidates for meaning the same."""

RUNS = 2
"""Inputs that are compared, the largest ones of which the values take no more than is enough."""

ENOUGH = 2**32
"""Bytes that the values of one input may take, if there is a smaller input."""

HELD = 12
"""How many times all values of a run are in memory at once: of both models, in what ONNX Runtime
keeps for each, and of the draws."""

MATRIX_PRODUCTS = frozenset(
    {"Attention", "Conv", "Einsum", "FusedMatMul", "Gemm", "GroupQueryAttention", "MatMul"}
    | {"MultiHeadAttention"}
)
"""Operators whose floats, read and written, are compared."""


@dataclass
class StoredParity:
    """How the weights of two models differ, as stored.

    Attributes:
        values: How many values were compared, outputs included.
        ratio: The largest difference, as a multiple of what rounding the weights anew does.
        name: Where that is.
        limit: How large the ratio may be.
        ok: Whether it is not larger.
    """

    values: int = 0
    ratio: float = 0.0
    name: str = ""
    limit: float = LIMIT
    ok: bool = True

    def __bool__(self) -> bool:
        return self.ok

    def add(self, name: str, ratio: float) -> None:
        """Take ``ratio`` into account, found at the value ``name``."""
        if ratio > self.ratio:
            self.ratio, self.name = ratio, name
        self.ok &= ratio <= self.limit

    def __str__(self) -> str:
        return (
            f"weights as stored: '{self.name}' is {self.ratio:.2g}x as far off as rounding its"
            f" weights anew puts it, at most {self.limit:g}x"
        )


def compare_stored(
    original: ir.Model,
    folded: ir.Model,
    feeds: Sequence[Arrays],
    to: ir.DataType,
    dtype: ir.DataType,
    engine: Callable[[ir.Model], Function],
) -> StoredParity:
    """Compare two models by the rule of this module.

    Args:
        original: The model ``A``.
        folded: The model ``B``, with the same inputs and outputs.
        feeds: Inputs to choose from.
        to: The type of the activations.
        dtype: The type that the weights are stored in.
        engine: Makes a function of a model in the type ``to``.

    Raises:
        InvalidModelError: The engine does not load a model.
        RunFailedError: A model does not run.
        UsageError: The values of a run do not fit in memory.
    """
    before, after = _prepared(original), _prepared(folded)
    changed = _changed_weights(after, before)
    known = set(_watched(after))
    names = [name for name in _watched(before) if name in known]
    outputs = [
        str(value.name)
        for value in before.graph.outputs
        if isinstance(value.type, ir.TensorType) and value.dtype in FRACTION_BITS
    ]
    a = Switchable(before, names, to, engine)
    b = Switchable(after, names, to, engine, changed, DRAWS)
    floor = FLOOR * unit_roundoff(dtype)
    comparison = _Comparison(a, b, names, outputs, floor)
    for feed in _that_fit(a, feeds):
        comparison.run(feed)
        if not comparison.result.ok:  # one fault is enough
            break
    return comparison.result


def _that_fit(a: Switchable, feeds: Sequence[Arrays]) -> Sequence[Arrays]:
    """The largest of ``feeds`` of which the values of ``a`` take no more than is enough.

    How much they take the smallest feed tells: they grow as it does. If it takes more than enough
    it is the only one, where there is memory for it.
    """
    by_size = sorted(feeds, key=_elements)
    least = HELD * sum(array.nbytes for array in a(by_size[0]).values())
    if least > available_memory() / 2:
        raise UsageError(f"values of the layers would take {least / 2**30:.0f} GiB")
    most = _elements(by_size[0]) * max(1.0, ENOUGH / max(least, 1))
    return [feed for feed in by_size if _elements(feed) <= most][-RUNS:]


def _elements(feed: Arrays) -> int:
    return sum(array.size for array in feed.values()) or 1


@dataclass
class _Comparison:
    """Compares ``b`` with ``a``, see the module."""

    a: Switchable
    b: Switchable
    names: Sequence[str]
    outputs: Sequence[str]
    floor: float
    result: StoredParity = field(default_factory=StoredParity)

    def run(self, feed: Arrays) -> None:
        """Compare the outputs, and the values that mean the same in both models."""
        original, folded = self.a(feed), self.b(feed)
        alike = [n for n in self.names if _likeness(original[n], folded[n]) >= LIKENESS]
        noise = self._noise(feed, alike, folded)
        same = []
        for name in alike:
            difference = _difference(folded[name], original[name])
            if noise[name].ratio(difference, original[name]).whole <= LIMIT:
                same.append(name)
            elif not self._means_another(feed, name, original, folded):
                self._judge_value(feed, name, original, folded, noise[name], {})
                if not self.result.ok:
                    return
        noise.clear()  # of what is held all at once it is the largest part
        given = {name: original[name] for name in same}
        folded = self.b(feed, given)
        noise = self._noise(feed, [*same, *self.outputs], folded, given)
        for name in (*same, *self.outputs):
            self._judge_value(feed, name, original, folded, noise[name], given)
            if not self.result.ok:
                return
        self.result.values = max(self.result.values, len(same) + len(self.outputs))

    def _noise(
        self,
        feed: Arrays,
        names: Iterable[str],
        folded: Arrays,
        given: Mapping[str, Array] | None = None,
    ) -> dict[str, _Noise]:
        """What rounding the weights of ``b`` anew does to the values ``names``."""
        found = {name: _Noise(self.floor) for name in names}
        for draw in range(DRAWS):
            moved = self.b(feed, given, draw)
            for name, noise in found.items():
                noise.add(_difference(moved[name], folded[name]))
        return found

    def _means_another(self, feed: Arrays, name: str, original: Arrays, folded: Arrays) -> bool:
        """Whether ``b`` computes something else under ``name``, as ``a`` shows when it is given it.

        At a fault ``a`` with the value of ``b`` gets nearer to the outputs of ``b``, or stays as
        near as the noise of the layers behind it lets it come.
        """
        given = self.a(feed, {name: folded[name]})
        if self._distance(given, folded) > 1.5 * self._distance(original, folded):
            return True
        return any(self._moves(other, given, original, folded) for other in {*self.names} - {name})

    def _moves(self, name: str, given: Arrays, original: Arrays, folded: Arrays) -> bool:
        """Whether ``a`` gets farther off at ``name`` than ``b`` is, which computes it as ``a``."""
        value = _squares(np.where(np.isfinite(original[name]), original[name], 0.0)).whole
        moved, own = (
            _squares(_difference(each[name], original[name])).whole for each in (given, folded)
        )
        return moved > 4 * own + self.floor**2 * value

    def _distance(self, x: Arrays, y: Arrays) -> float:
        pairs = [(_difference(x[name], y[name]), y[name]) for name in self.outputs]
        return math.sqrt(sum(_squares(d).whole / (_squares(v).whole or 1.0) for d, v in pairs))

    def _judge_value(
        self,
        feed: Arrays,
        name: str,
        original: Arrays,
        folded: Arrays,
        noise: _Noise,
        given: Mapping[str, Array],
    ) -> None:
        difference = _difference(folded[name], original[name])
        ratio = noise.ratio(difference, original[name]).worst
        if ratio > LIMIT:
            for draw in range(len(noise.draws), MORE_DRAWS):
                moved = self.b(feed, given, draw)
                noise.add(_difference(moved[name], folded[name]))
            ratio = noise.ratio(difference, original[name]).worst
        if ratio > LIMIT and name not in self.outputs:
            effect = self._effect(feed, name, original, folded, noise)
            ratio = effect if effect < IRRELEVANT else ratio
        self.result.add(name, ratio)

    def _effect(
        self, feed: Arrays, name: str, original: Arrays, folded: Arrays, noise: _Noise
    ) -> float:
        """How much farther the value of ``b`` moves the outputs of ``a`` than the draws do."""
        moved = self.a(feed, {name: folded[name]})
        floor = ROUNDING * unit_roundoff(self.a.to)
        effects = {output: _Noise(floor) for output in self.outputs}
        for draw in noise.draws[:DRAWS]:
            drawn = self.a(feed, {name: original[name] + draw})
            for output, effect in effects.items():
                effect.add(_difference(drawn[output], original[output]))
        return max(
            (
                effect.ratio(_difference(moved[output], original[output]), original[output]).worst
                for output, effect in effects.items()
            ),
            default=0.0,
        )


# --- Differences ---------------------------------------------------------------------------------


@dataclass
class _Squares:
    """Sums of squares: of the whole array, of each row ``[..., :]``, of each channel."""

    whole: float
    rows: Array
    channels: Array


def _rows(x: Array) -> Array:
    """``x`` as ``[rows, channels]``: of a column vector the channels come before the last axis.

    A row of one number is no row: of many the largest is far off by chance.
    """
    sizes = [size for size in x.shape if size > 1]
    return x.reshape(-1, sizes[-1] if sizes else 1)


def _squares(x: Array) -> _Squares:
    squares = np.square(_rows(x), dtype=np.float64)
    return _Squares(float(squares.sum()), squares.sum(1), squares.sum(0))


def _difference(x: Array, y: Array) -> Array:
    """``x - y``, 0 where one is not finite: that is looked at elsewhere."""
    if x.shape != y.shape:
        return np.full(y.shape, math.inf)
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(invalid="ignore"):
        return np.where(finite, x - y, np.zeros((), x.dtype))


def _likeness(x: Array, y: Array) -> float:
    """The correlation of all channels together, each less its mean; 0 for another shape."""
    if x.shape != y.shape:
        return 0.0
    finite = np.isfinite(x) & np.isfinite(y)
    rows = [_rows(np.where(finite, each, 0).astype(np.float64)) for each in (x, y)]
    p, q = (each - each.mean(0) if len(each) > 1 else each for each in rows)
    norms = float(np.linalg.norm(p) * np.linalg.norm(q))
    return float(np.vdot(p, q)) / norms if norms else 1.0


@dataclass
class _Ratio:
    """A difference as a multiple of the noise."""

    whole: float
    worst: float


@dataclass
class _Noise:
    """What rounding the weights anew does to one value."""

    floor: float
    draws: list[Array] = field(default_factory=list)

    def add(self, draw: Array) -> None:
        self.draws.append(draw)

    def ratio(self, difference: Array, value: Array) -> _Ratio:
        """Return ``difference`` as a multiple of the noise: of all of it, and at its worst.

        A row or a channel is measured by its own noise, or by that of an average one where its own
        is smaller: where few weights matter a few draws may all be small by chance. What the draws
        do at their worst, each measured so by the others, is no fault.
        """
        found = _squares(difference)
        noise = [_squares(draw) for draw in self.draws]
        size = self.floor**2 * _squares(np.where(np.isfinite(value), value, 0.0)).whole
        parts = []
        for name in ("whole", "rows", "channels"):
            drawn = np.stack([np.atleast_1d(getattr(each, name)) for each in noise])
            floor = size / max(drawn.shape[1], 1)
            worst = _worst_ratio(np.atleast_1d(getattr(found, name)), drawn, floor)
            others = (np.delete(drawn, number, axis=0) for number in range(len(drawn)))
            pairs = zip(drawn, others, strict=True)
            by_chance = float(np.mean([_worst_ratio(*pair, floor) for pair in pairs]))
            parts.append(worst / max(1.0, by_chance / LIMIT))
        return _Ratio(parts[0], max(parts))


def _worst_ratio(squares: Array, drawn: Array, floor: float) -> float:
    """The largest of some ``squares``, ``[n]``, by those of draws, ``[draws, n]``."""
    own = drawn.mean(0)
    yardstick = np.maximum(own, own.mean() if own.size else 0.0) + floor
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(squares > 0, squares / yardstick, 0.0)
    return math.sqrt(float(ratios.max(initial=0.0)))


# --- The models -----------------------------------------------------------------------------------


def with_weights_anew(
    model: ir.Model, to: ir.DataType, engine: Callable[[ir.Model], Function]
) -> Switchable:
    """``model`` in the type ``to``, with all its weights rounded anew where a draw is asked for.

    Raises:
        UsageError: A function cannot be inlined.
    """
    prepared = _prepared(model)
    return Switchable(prepared, (), to, engine, [name for name, _ in _floats(prepared)])


def _prepared(model: ir.Model) -> ir.Model:
    """Return a copy in which functions are inlined, large constants initializers, types known."""
    copy = model.clone()
    if copy.functions:
        inline_all(copy)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    if any(value.dtype is None for node in copy.graph for value in node.outputs if value.name):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    return copy


def _watched(model: ir.Model) -> Iterator[str]:
    """The names of floats that matrix products read or write, but for the outputs of the model."""
    for node in model.graph:
        for value in node.outputs:
            near = (node, *(user for user, _ in value.uses()))
            if (
                value.name
                and value.dtype in FRACTION_BITS
                and not value.is_graph_output()
                and any(each.op_type in MATRIX_PRODUCTS for each in near)
            ):
                yield value.name


def _changed_weights(after: ir.Model, before: ir.Model) -> list[str]:
    """The names of float initializers that ``before`` does not hold, under any name."""
    held = {_key(tensor) for _, tensor in _floats(before)}
    return [name for name, tensor in _floats(after) if _key(tensor) not in held]


def _floats(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FRACTION_BITS and not value.is_graph_input():
            yield name, tensor


def _key(tensor: ir.TensorProtocol) -> tuple[ir.DataType, tuple[int, ...], bytes]:
    digest = hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
    return tensor.dtype, tuple(tensor.shape.numpy()), digest
