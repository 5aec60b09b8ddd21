"""Tables and counts in the style of all reports."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 120
"""Columns of a table that no terminal bounds."""


ORIGINAL_AND_FOLDED = ("original", "folded")
"""What the columns of two models are called where their files have no short names."""

SHORT = 16
"""Characters that the name of a column may have."""


def headings(original: object, folded: object) -> tuple[str, str]:
    """What the columns of two models are called: their files, where short names tell them apart."""
    names = [Path(each).name for each in (original, folded) if isinstance(each, str | os.PathLike)]
    if len(names) == 2 and names[0] != names[1] and max(map(len, names)) <= SHORT:
        return names[0], names[1]
    return ORIGINAL_AND_FOLDED


class Shown:
    """What is printed as the command line shows it: ``print(report)``."""

    def __rich__(self) -> RenderableType:
        """For the terminal."""
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self)


def as_text(shown: RenderableType) -> str:
    """``shown`` in plain text, :data:`WIDTH` columns wide."""
    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None, highlight=False).print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


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
