"""Greedy decoding: a decoder writes token after token, each time the most likely one.

A decoder with a KV cache reads the prompt once, then one token a step, and what it returns as keys
and values is the next step's cache. A decoder without one reads the whole sequence again.

**Do two models write the same?** The original writes N tokens. The folded model reads the same
prompt and the original's tokens, with its own cache, and must find each of them the most likely.
Where it does not, both models have read the same tokens, so their logits ``l_o`` and ``l_f`` are
comparable, also with those of the original in a wider type, ``l_r``. Let ``a`` be the original's
token and ``b`` the folded model's; by how far each model prefers its own are the margins

    m_o = l_o[a] - l_o[b],    m_f = l_f[b] - l_f[a],    both at least 0, and
    m_o + m_f = (l_o[a] - l_f[a]) + (l_f[b] - l_o[b]).

With the errors at this very step, ``e_o = rms(l_o - l_r)`` and ``e_f = rms(l_f - l_r)`` over the
vocabulary, that sum of four errors has the deviation ``sqrt(2 (e_o² + e_f²))``. The difference is a
tie within rounding, which passes, if

    m_o + m_f <= 4 sqrt(2 (e_o² + e_f²))    and    e_f <= max_ratio * (e_o + u rms(l_r)),

as in the rule of the parity check, with the unit roundoff ``u``; otherwise it is a failure. Ties
are counted, and the comparison goes on after them. Without a reference ``l_o`` takes the place of
``l_r``, and the relative error that the outputs may have that of ``max_ratio * u``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.errors import UsageError
from onnx_fold.runtime.inputs import (
    Arrays,
    cache_inputs,
    cache_links,
    given_inputs,
    index_limits,
    make_inputs,
    model_inputs,
)
from onnx_fold.runtime.sessions import RunFailedError

__all__ = [
    "PROMPT_LENGTH",
    "Decoder",
    "Decoding",
    "Function",
    "GreedyCheck",
    "GreedyParity",
    "greedy",
]

Function: TypeAlias = Callable[[Arrays], Arrays]
"""A model as a function from its inputs to its outputs, by their names."""

PROMPT_LENGTH = 8
"""Random tokens that generation starts from where no prompt is given."""


@dataclass(frozen=True)
class Decoder:
    """A model that can write text: which of its inputs and outputs mean what.

    Attributes:
        model: The model.
        token_ids: The input that takes the tokens, an integer ``[batch, seq]``.
        logits: The output that scores each token of the vocabulary, ``[..., vocab]``.
        cache: The output that becomes each cache input in the next step; empty without a cache.
            A cache that no output updates, as of an encoder, stays as it is.
    """

    model: ir.Model
    token_ids: str
    logits: str
    cache: Mapping[str, str]

    @classmethod
    def of(cls, model: ir.Model) -> Decoder:
        """Find out what is what in ``model``, by names, shapes, and the table of the tokens.

        Raises:
            UsageError: The model cannot generate; the message says why.
        """
        ids, links = _token_ids(model), cache_links(model)
        if not links and (caches := cache_inputs(model)):
            raise UsageError(f"cannot generate: no output updates the cache input '{caches[0]}'")
        for value in model_inputs(model):
            is_fixed = all(isinstance(dim, int) for dim in list(value.shape or ())[1:])
            if value.name in links and is_fixed:
                raise UsageError(
                    f"cannot generate: the cache input '{value.name}' has a fixed length"
                )
        return cls(model, str(ids.name), _logits(model, ids, links.values()), links)

    def inputs(
        self,
        ids: Sequence[int] | Array,
        past: int = 0,
        given: Mapping[str, Array] | None = None,
        seed: int = 0,
    ) -> Arrays:
        """Return the inputs of a step that reads ``ids`` (one row, or [batch, seq]).

        Args:
            ids: Token ids.
            past: Tokens that were read before, and are in the cache.
            given: Inputs that are known, such as the cache; the others follow the rules of
                :func:`~onnx_fold.runtime.inputs.make_inputs`.
            seed: Seed of inputs that are drawn.
        """
        value = next(v for v in model_inputs(self.model) if v.name == self.token_ids)
        assert value.dtype is not None
        rows = np.atleast_2d(np.asarray(ids, dtype=value.dtype.numpy()))
        batch, seq = rows.shape
        known = {**(given or {}), self.token_ids: rows}
        return make_inputs(self.model, batch=batch, seq=seq, past=past, seed=seed, given=known)

    def start(
        self, inputs: str | os.PathLike[str] | Mapping[str, Array] | None = None, seed: int = 0
    ) -> Arrays:
        """Return the inputs of a first step, with the prompt.

        Args:
            inputs: The prompt and any other inputs, by name, or an ``.npz`` file of them. None for
                a prompt of ``PROMPT_LENGTH`` random tokens.
            seed: Seed of what is drawn.

        Raises:
            UsageError: The prompt is missing, or an input is unknown or does not fit.
        """
        if inputs is None:
            return make_inputs(self.model, batch=1, seq=PROMPT_LENGTH, seed=seed)
        given = given_inputs(self.model, inputs, [self.token_ids])
        return self.inputs(given[self.token_ids], given=given, seed=seed)


def _token_ids(model: ir.Model) -> ir.Value:
    """Return the input of the tokens: of an encoder-decoder model those of the decoder."""
    found = [value for value in model_inputs(model) if _takes_tokens(value)]
    if not found:
        raise UsageError(
            "cannot generate: no input takes token ids (integers [batch, seq], named ...ids)"
        )
    ids = next((value for value in found if "decoder" in str(value.name)), found[0])
    assert ids.shape is not None
    batch, seq = ids.shape
    if isinstance(seq, int):
        raise UsageError(f"cannot generate: '{ids.name}' has a fixed length of {seq}")
    if isinstance(batch, int) and batch != 1:
        raise UsageError(f"cannot generate: '{ids.name}' has a fixed batch of {batch}, not 1")
    return ids


def _takes_tokens(value: ir.Value) -> bool:
    name = str(value.name).lower()
    if value.dtype is None or not value.dtype.is_integer() or value.shape is None:
        return False
    counted = any(word in name for word in ("position", "type", "mask"))
    return value.shape.rank() == 2 and name.endswith("ids") and not counted


def _logits(model: ir.Model, ids: ir.Value, cache: Collection[str]) -> str:
    """Return the output whose last dimension is the vocabulary, or that is called logits."""
    rows = index_limits(model).get(str(ids.name))
    scores = [
        value
        for value in model.graph.outputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and value.shape.rank() > 1
        and str(value.name) not in cache
    ]
    named = [value for value in scores if "logits" in str(value.name).lower()]
    fitting = [value for value in (*named, *scores) if value.shape and value.shape[-1] == rows]
    if not fitting and not named:
        raise UsageError("cannot generate: no output has the logits of a vocabulary")
    return str((fitting or named)[0].name)


class Decoding:
    """One sequence that a decoder reads, a few tokens at a time.

    Args:
        decoder: What the inputs and outputs mean.
        function: Runs the decoder, or another model with the same inputs and outputs.
        start: Inputs of the first step. Those that stay the same while tokens come in (what an
            encoder says, floats that are no masks) are taken from it.
    """

    def __init__(self, decoder: Decoder, function: Function, start: Mapping[str, Array]) -> None:
        self._decoder, self._function = decoder, function
        stay = {str(value.name) for value in model_inputs(decoder.model) if _stays(value)}
        stay -= decoder.cache.keys()
        self._known = {name: array for name, array in start.items() if name in stay}
        self._tokens: list[int] = []

    def read(self, ids: Sequence[int]) -> Array:
        """Read ``ids`` and return the logits of the token after them, ``[vocab]``.

        Raises:
            RunFailedError: The function cannot run on the inputs of this step, or says NaN.
        """
        self._tokens += ids
        new = ids if self._decoder.cache else self._tokens
        past = len(self._tokens) - len(new)
        outputs = self._function(self._decoder.inputs(new, past, self._known))
        self._known |= {name: outputs[output] for name, output in self._decoder.cache.items()}
        logits = outputs[self._decoder.logits]
        last: Array = logits.reshape(-1, logits.shape[-1])[-1]
        if np.isnan(last).any():
            raise RunFailedError(f"NaN in the logits after {len(self._tokens)} tokens")
        return last


def _stays(value: ir.Value) -> bool:
    name = str(value.name).lower()
    drawn = value.dtype is not None and value.dtype.is_floating_point() and "mask" not in name
    return name.startswith("encoder") or drawn


def greedy(
    decoder: Decoder,
    function: Function,
    start: Mapping[str, Array],
    tokens: int,
    noise: Array | None = None,
) -> Iterator[tuple[int, Array]]:
    """Continue a prompt: yield each most likely token, and the logits ``[vocab]`` that say so.

    Args:
        decoder: What the inputs and outputs mean.
        function: Runs the decoder, or another model with the same inputs and outputs.
        start: Inputs of the first step (:meth:`Decoder.inputs`), with the prompt, of one row.
        tokens: How many tokens to write.
        noise: What is added to the logits before the largest is taken, ``[tokens, vocab]``. With
            Gumbel noise of scale ``t`` a token is a sample at temperature ``t``.

    Raises:
        RunFailedError: The function cannot run on the inputs of a step.
    """
    decoding = Decoding(decoder, function, start)
    ids: list[int] = start[decoder.token_ids][0].tolist()
    for step in range(tokens):
        logits = decoding.read(ids)
        ids = [int((logits if noise is None else logits + noise[step]).argmax())]
        yield ids[0], logits


@dataclass
class GreedyParity:
    """Whether two models write the same tokens.

    Attributes:
        tokens: How many tokens the original wrote.
        equal: Whether the folded model would have written the same.
        ok: Whether they are equal but for ties within rounding.
        ties: How many of these there are.
        position: Number of tokens before the first difference that is no tie, or the first tie.
        token_original: The original's token there, ``a``.
        token_folded: The folded model's, ``b``.
        margin_original: ``l_o[a] - l_o[b]``.
        margin_folded: ``l_f[b] - l_f[a]``.
        limit: What both margins together may be in a tie.
    """

    tokens: int
    equal: bool = True
    ok: bool = True
    ties: int = 0
    position: int | None = None
    token_original: int | None = None
    token_folded: int | None = None
    margin_original: float | None = None
    margin_folded: float | None = None
    limit: float | None = None

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.equal:
            return f"greedy decoding: both write the same {self.tokens} tokens"
        there = (
            f"{self.token_original} (ahead by {self.margin_original:.2g}) became"
            f" {self.token_folded} (ahead by {self.margin_folded:.2g})"
        )
        if self.ok:
            return (
                f"greedy decoding: both write the same tokens at {self.tokens - self.ties} of"
                f" {self.tokens} places, at {self.ties} there is a tie within rounding; at the"
                f" first, after {self.position}, {there}, in sum at most {self.limit:.2g}"
            )
        before = f", {self.ties} of them ties within rounding," if self.ties else ","
        return (
            f"greedy decoding: both write the same {self.position} of {self.tokens} tokens{before}"
            f" then {there}, more than rounding ({self.limit:.2g})"
        )


@dataclass(frozen=True)
class _Step:
    """A place where the folded model prefers another token."""

    position: int
    original: Array
    folded: Array


@dataclass
class GreedyCheck:
    """The comparison of two models, which run one after the other.

    Attributes:
        decoder: What the inputs and outputs of both mean.
        start: Inputs of the first step, with the prompt, of one row.
        tokens: How many tokens to write.
    """

    decoder: Decoder
    start: Mapping[str, Array]
    tokens: int
    _written: list[tuple[int, Array]] = field(default_factory=list, init=False)
    _steps: list[_Step] = field(default_factory=list, init=False)
    _references: dict[int, Array] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError("greedy decoding: at least one token is needed")
        rows, length = self.start[self.decoder.token_ids].shape
        if rows != 1 or length < 1:
            raise UsageError(
                f"greedy decoding takes one prompt: '{self.decoder.token_ids}' has {rows} rows of"
                f" {length} tokens"
            )

    def run_original(self, function: Function) -> None:
        """Let the original write the tokens.

        Raises:
            UsageError: It cannot write so many.
        """
        self._written = []
        try:
            for token, logits in greedy(self.decoder, function, self.start, self.tokens):
                self._written.append((token, logits))
        except RunFailedError as error:
            count = len(self._written)
            raise UsageError(f"the original stops after {count} tokens: {error}") from error

    def run_folded(self, function: Function) -> None:
        """Let the folded model read the original's tokens, and note where it prefers others.

        Raises:
            RunFailedError: It cannot run on the inputs of a step.
        """
        self._steps = [
            _Step(position, self._written[position][1], logits)
            for position, logits in self._read(function)
            if int(logits.argmax()) != self._written[position][0]
        ]

    def run_reference(self, function: Function) -> None:
        """Let the original in a wider type read them too, as far as that is asked for.

        Raises:
            RunFailedError: It cannot run on the inputs of a step.
        """
        wanted = {step.position for step in self._steps}
        if wanted:
            read = itertools.islice(self._read(function), max(wanted) + 1)
            self._references = {place: logits for place, logits in read if place in wanted}

    def _read(self, function: Function) -> Iterator[tuple[int, Array]]:
        """Yield the logits at each place of the original's text."""
        decoding = Decoding(self.decoder, function, self.start)
        ids: list[int] = self.start[self.decoder.token_ids][0].tolist()
        for position, (token, _) in enumerate(self._written):
            yield position, decoding.read(ids)
            ids = [token]

    def judge(self, max_ratio: float, roundoff: float, tolerance: float) -> GreedyParity:
        """Return the result by the rule of this module.

        Args:
            max_ratio: How many times the original's own error the folded model may have.
            roundoff: The unit roundoff of the type.
            tolerance: The relative error that the logits may have where there is no reference.
        """
        result = GreedyParity(len(self._written), equal=not self._steps)
        for step in self._steps:
            reference = self._references.get(step.position)
            allowed = tolerance if reference is None else max_ratio * roundoff
            found = _tie(step, reference, max_ratio, allowed)
            if result.position is None or not found.ok:
                result = replace(found, tokens=result.tokens, ties=result.ties)
            if not found.ok:
                break
            result.ties += 1
        return result


def _tie(step: _Step, reference: Array | None, max_ratio: float, allowed: float) -> GreedyParity:
    """Return the margins of one difference and whether they are a tie."""
    original, folded = step.original.astype(np.float64), step.folded.astype(np.float64)
    exact = original if reference is None else reference.astype(np.float64)
    finite = np.isfinite(original) & np.isfinite(folded) & np.isfinite(exact)
    own, error = (_rms(each[finite] - exact[finite]) for each in (original, folded))
    most = max_ratio * own + allowed * _rms(exact[finite])
    limit = 4 * math.sqrt(2 * (own**2 + min(error, most) ** 2))
    a, b = int(original.argmax()), int(folded.argmax())
    margins = float(original[a] - original[b]), float(folded[b] - folded[a])
    return GreedyParity(
        tokens=0,
        equal=False,
        ok=error <= most and sum(margins) <= limit,
        position=step.position,
        token_original=a,
        token_folded=b,
        margin_original=margins[0],
        margin_folded=margins[1],
        limit=limit,
    )


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
