"""The figures of the parity check as a table: of each output what was judged, and its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from onnx_fold.base.tables import ORIGINAL_AND_FOLDED, figures_table
from onnx_fold.check.judge import OutputParity

if TYPE_CHECKING:
    from onnx_fold.check.parity import ParityReport

__all__ = ["parity_table"]

_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("relative", "relative_error", ".1e"),
    ("original", "error_original", ".1e"),
    ("folded", "error_folded", ".1e"),
    ("ratio", "ratio", ".3g"),
    ("row", "row_ratio", ".3g"),
    ("channel", "channel_ratio", ".3g"),
    ("top-1", "top1_agreement", ".1%"),
    ("KL", "kl_divergence", ".1e"),
    ("limit", "limit", ".1e"),
)


_ROWS = 12


def parity_table(report: ParityReport) -> Table:
    """Return a row for each output, of many only those nearest their limit; no empty columns."""
    columns = [c for c in _COLUMNS if any(getattr(o, c[1]) is not None for o in report.outputs)]
    rows = report.outputs
    called = dict(zip(ORIGINAL_AND_FOLDED, report.names, strict=True))
    captions = []
    if any(name == "error_original" for _, name, _ in columns):
        captions.append(
            f"{', '.join(report.names)}: relative error against a wider reference; ratio of the"
            " two, and of the worst row and channel"
        )
    if len(rows) > _ROWS:
        captions.append(f"{len(rows) - _ROWS} further outputs lie deeper within their limits")
        rows = sorted(rows, key=_margin)[:_ROWS]
    sources = {output.limit_from for output in rows if output.judged}
    if len(sources) == 1:
        captions.append(f"limit: {next(iter(sources))}, for what is nearest to it")
    against = f" with {report.against}" if report.against else ""
    table = figures_table(
        f"Parity{against} in {report.dtype.lower()} on {report.provider}: {_inputs(report.shapes)}",
        "; ".join(captions) or None,
    )
    table.add_column("output", overflow="fold")
    for heading, _, _ in columns:
        table.add_column(called.get(heading, heading), justify="right", no_wrap=True)
    table.add_column("of", overflow="fold")
    for output in rows:
        cells = [_cell(getattr(output, name), form) for _, name, form in columns]
        judged = output.judged
        if judged and len(sources) > 1:
            judged += f": {output.limit_from}"
        table.add_row(output.name, *cells, judged, style=None if output.ok else "red")
    return table


def _margin(output: OutputParity) -> tuple[bool, float]:
    return output.ok, -(output.margin or 0.0)


def _inputs(shapes: Sequence[str]) -> str:
    times = {shape: shapes.count(shape) for shape in shapes}
    return ", ".join(f"{shape} ({n}x)" if n > 1 else shape for shape, n in times.items())


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form) if value else "0"
