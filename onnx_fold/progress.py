"""How far a long run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["LINE_INTERVAL", "Report", "ignore", "shown"]

Report: TypeAlias = Callable[[str, int, int], None]
"""Is called with what is being done, bytes done, and bytes in all (0 where nothing is counted)."""

LINE_INTERVAL = 10.0
"""Seconds between two lines of a log; a run that is done sooner writes none."""


def ignore(what: str, done: int, total: int) -> None:
    """A :data:`Report` that shows nothing."""


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Report]:
    """Show progress on ``console``: as a bar if it is a terminal, else in lines."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report


class _Lines:
    """Writes a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.next = time.monotonic() + LINE_INTERVAL

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + LINE_INTERVAL
        share = f": {decimal(done)} of {decimal(total)}, {done / total:.0%}" if total else ""
        self.console.print(f"{what}{share}", soft_wrap=True)
