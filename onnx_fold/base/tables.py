"""Tables and counts in the style of all reports."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table


def new_table(title: str) -> Table:
    """A table in the style of all reports."""
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)


def figures_table(title: str, caption: str | None = None) -> Table:
    """A table of many narrow columns, in the style of measurements."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def counted(count: int, noun: str) -> str:
    """``1 stream``, ``2 streams``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
