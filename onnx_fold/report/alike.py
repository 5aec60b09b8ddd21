"""What is alike but for a number in its names: blocks of a model, shown once and counted."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from onnx_fold.engine.outcome import CandidateReport, StreamReport

__all__ = ["Alike", "Reason", "Repeat", "alike", "nameless", "reasons_of", "repeats"]

_NUMBER = re.compile(r"\[\d+:\d+\]|\d+")
_LONGEST = 12
"""Streams that a repeated block may have."""


def nameless(text: str) -> str:
    """``text`` with its numbers blotted out, but for the columns that are cut out of a layer."""
    return _NUMBER.sub(lambda found: found[0] if found[0].startswith("[") else "#", text)


@dataclass(frozen=True)
class Alike:
    """Streams of one structure.

    Attributes:
        streams: All of them, in graph order.
    """

    streams: Sequence[StreamReport]

    @property
    def first(self) -> StreamReport:
        """The one that is shown."""
        return self.streams[0]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.streams)

    @property
    def weights_removed(self) -> int:
        """What all their folds save together."""
        return sum(stream.folded.weights_removed for stream in self.streams if stream.folded)

    @property
    def candidates(self) -> list[tuple[CandidateReport, int, float | None]]:
        """The ways that were weighed: the first of each kind, their number, the largest error."""
        found: dict[Hashable, list[CandidateReport]] = {}
        for stream in self.streams:
            for each in stream.candidates:
                is_taken = each == stream.folded
                key = each.strategy, nameless(each.text), is_taken, nameless(each.refused or "")
                found.setdefault(key, []).append(each)
        return [(same[0], len(same), _largest(same)) for same in found.values()]


def _largest(candidates: Iterable[CandidateReport]) -> float | None:
    return max((each.error for each in candidates if each.error is not None), default=None)


def alike(streams: Iterable[StreamReport], *, reasons: int | None = None) -> list[Alike]:
    """``streams`` by their structure, in the order of the first of each.

    With ``reasons`` only so many of the reasons why a stream stayed tell it from another.
    """
    found: dict[Hashable, list[StreamReport]] = {}
    for stream in streams:
        found.setdefault(structure(stream, reasons), []).append(stream)
    return [Alike(same) for same in found.values()]


def structure(stream: StreamReport, most: int | None = None) -> Hashable:
    """Equal for streams that differ in a number of their names only; see :func:`alike`."""
    layers = tuple(
        (nameless(each.name), each.role, each.weights, each.weights_after) for each in stream.layers
    )
    fold = None if stream.folded is None else (stream.folded.strategy, nameless(stream.folded.text))
    reasons = frozenset(map(nameless, stream.reasons[:most]))
    return stream.width, stream.dtype, layers, fold, reasons


@dataclass(frozen=True)
class Repeat:
    """A run of streams that comes several times in a row.

    Attributes:
        streams: The run, as it is the first time.
        count: How many times it comes.
    """

    streams: Sequence[StreamReport]
    count: int


def repeats(streams: Sequence[StreamReport]) -> list[Repeat]:
    """``streams`` as runs that repeat: ``a b c b c d`` is ``a``, ``b c`` twice, ``d``."""
    kinds = [structure(stream) for stream in streams]
    found: list[Repeat] = []
    start = 0
    while start < len(kinds):
        length, count = _best_run(kinds, start)
        if count == 1 and found and found[-1].count == 1:
            found[-1] = Repeat([*found[-1].streams, streams[start]], 1)
        else:
            found.append(Repeat(streams[start : start + length], count))
        start += length * count
    return found


def _best_run(kinds: Sequence[Hashable], start: int) -> tuple[int, int]:
    """Length and count of the run at ``start`` that covers most, the shortest of these."""
    best = (1, 1)
    for length in range(1, min(_LONGEST, (len(kinds) - start) // 2) + 1):
        run = kinds[start : start + length]
        count = 1
        while kinds[start + count * length : start + (count + 1) * length] == run:
            count += 1
        if count > 1 and length * count > best[0] * best[1]:
            best = (length, count)
    return best


@dataclass(frozen=True)
class Reason:
    """Why streams stayed as they were.

    Attributes:
        text: In words, with the names of the first.
        count: How many reasons are the same but for a number.
    """

    text: str
    count: int


def reasons_of(streams: Iterable[StreamReport]) -> list[Reason]:
    """Equal reasons in one, counted."""
    found: dict[str, list[str]] = {}
    for stream in streams:
        for reason in stream.reasons:
            found.setdefault(nameless(reason), []).append(reason)
    return [Reason(same[0], len(same)) for same in found.values()]
