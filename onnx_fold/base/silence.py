"""Other libraries' warnings, dropped where they tell nothing new."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["silenced"]

_IS_SILENT = ContextVar("is_silent", default=False)


def _may_pass(record: logging.LogRecord) -> bool:
    return not _IS_SILENT.get()


@contextlib.contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Drop what ``loggers`` say meanwhile, and what reaches their handlers, in this thread only."""
    for logger in map(logging.getLogger, loggers):
        for each in (logger, *logger.handlers):
            each.addFilter(_may_pass)  # one that is there already is not added
    token = _IS_SILENT.set(True)
    try:
        yield
    finally:
        _IS_SILENT.reset(token)
