"""What callers hand over where several things may be meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

Provider: TypeAlias = Literal["auto", "cpu", "cuda"]
"""Where models run."""

DeviceName: TypeAlias = Literal["cpu", "cuda"] | str
"""Where weights are evaluated; torch may know further names."""

Pivot: TypeAlias = Literal["auto", "q", "k", "v", "p"]
"""Which matrix becomes the identity where there is a choice."""

Objective: TypeAlias = Literal["speed", "size", "bytes-read"]
"""What folds are for."""

TargetName: TypeAlias = Literal["cpu", "cuda"]
"""The provider that folds are to be fast on."""


def several(given: Any) -> tuple[Any, ...]:
    """``given`` as a tuple; a string, a mapping or a number by itself is one item."""
    is_one = isinstance(given, str | Mapping) or not isinstance(given, Iterable)
    return (given,) if is_one else tuple(given)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message that nothing is called ``name``: what is spelled like it, if any is."""
    found = get_close_matches(name, known, n=1)
    return f"; did you mean '{found[0]}'?" if found else ""
