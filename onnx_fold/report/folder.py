"""What was done in a folder of models: the report of each, and all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from onnx_fold.base.schema import SCHEMA_VERSION
from onnx_fold.base.tables import Shown, counted, new_table
from onnx_fold.engine.cost import Cost, Saving
from onnx_fold.report.fold import FoldReport, saving_dict, saving_text

__all__ = ["FolderReport"]


@dataclass(frozen=True)
class FolderReport(Shown):
    """What :func:`onnx_fold.fold_folder` did.

    Attributes:
        files: The report of each model, by its path in the folder.
        copied: Other files, which are as they were.
    """

    files: Mapping[str, FoldReport]
    copied: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = counted(len(self.files), "model")
        return f"<FolderReport: {count}, {self.saving.share:.1%} of the weights less>"

    @property
    def saving(self) -> Saving:
        """Cost of all models before and after."""
        each = [report.saving for report in self.files.values()]
        return Saving(_sum(one.before for one in each), _sum(one.after for one in each))

    @property
    def is_folded(self) -> bool:
        """Whether anything was folded."""
        return any(report.folded for report in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "files": {name: report.to_dict() for name, report in self.files.items()},
            "total": saving_dict(self.saving),
            "copied": list(self.copied),
        }

    def __rich__(self) -> RenderableType:
        """For the terminal: the report of each model, then the total."""
        parts: list[RenderableType] = []
        for name, report in self.files.items():
            parts += [Text(name, "bold underline"), Text(), report, Text()]
        table = new_table(f"All of the folder ({counted(len(self.files), 'model')})")
        table.add_column("model", overflow="fold")
        for column in ("streams folded", "weights", "after", "saved"):
            table.add_column(column, justify="right")
        for name, report in self.files.items():
            before, after = report.saving.before, report.saving.after
            numbers = f"{before.weights:,}", f"{after.weights:,}", f"{report.saving.share:.1%}"
            table.add_row(name, str(len(report.folded)), *numbers)
        return Group(*parts, table, saving_text(self.saving, self.is_folded))


def _sum(costs: Iterable[Cost]) -> Cost:
    listed = list(costs)
    names = [each.name for each in fields(Cost)]
    return Cost(*(sum(getattr(c, name) for c in listed) for name in names))
