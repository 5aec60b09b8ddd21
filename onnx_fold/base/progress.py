"""How far a long run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
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
    with _bar(console) if console.is_terminal else _lines(console) as report:
        yield report


class _WhereCounted(ProgressColumn):
    """Another column, of which nothing is shown while nothing is counted."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        """Return what the other column shows."""
        return "" if task.total is None else self._column(task)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Report]:
    columns = (
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        *map(_WhereCounted, (BarColumn(), DownloadColumn(), TimeRemainingColumn())),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            if not total:
                bar.tasks[0].total = None  # which update takes for no change
            bar.update(task, description=what, completed=done, total=total or None)

        yield report


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Report]:
    """A line every :data:`LINE_INTERVAL`, whether there is news or not."""
    start, line, ended = time.monotonic(), "starting", threading.Event()

    def report(what: str, done: int, total: int) -> None:
        nonlocal line
        line = what
        if total:
            line += f": {decimal(done)} of {decimal(total)}, {done / total:.0%}"

    def write() -> None:
        while not ended.wait(LINE_INTERVAL):
            console.print(f"{time.monotonic() - start:.0f} s: {line}", soft_wrap=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()
