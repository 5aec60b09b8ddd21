"""What callers hand over where several things may be meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def several(given: Any) -> tuple[Any, ...]:
    """``given`` as a tuple; a string, a mapping or a number by itself is one item."""
    is_one = isinstance(given, str | Mapping) or not isinstance(given, Iterable)
    return (given,) if is_one else tuple(given)
