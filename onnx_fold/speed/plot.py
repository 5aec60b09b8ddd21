"""A picture of a speed check: latency and speed-up over batch and length, beside the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_fold.errors import CannotWriteError, MissingExtraError
from onnx_fold.files.output import replacing

if TYPE_CHECKING:
    from onnx_fold.speed.timing import BenchReport, Phase

AXES = {"prefill": "tokens", "decode": "tokens in the cache", "run": "length"}
ROWS = {
    "prefill": "time to first token, ms",
    "decode": "time between tokens, ms",
    "run": "time of a run, ms",
}
COLOURS = "#1f6f8b", "#c1440e", "#3a7d44", "#b08900", "#6a4c93", "#444444"


def check(path: Path) -> None:
    """Refuse what could not be drawn, before the measurement.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CannotWriteError: Nothing is known of such a suffix.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    if path.suffix.lstrip(".") not in matplotlib.figure.Figure().canvas.get_supported_filetypes():
        raise CannotWriteError(f"cannot draw {path}: use a name that ends in .svg or .png")


def plot(report: BenchReport, path: Path) -> None:
    """Draw ``report`` to ``path``: a row for each phase, left the latency, right the speed-up.

    The horizontal axis is the batch, with a line for each length; of a single batch the length.

    Args:
        report: What :func:`onnx_fold.bench` returned.
        path: File to write; its suffix says in which format (``.svg``, ``.png``, ``.pdf``).

    Raises:
        MissingExtraError: matplotlib is not installed.
        CannotWriteError: The file cannot be written, or nothing is known of such a suffix.
    """
    check(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    names = [name for name in ROWS if any(phase.name == name for phase in report.phases)]
    figure.set_size_inches(9.5, 3.1 * len(names) + 0.4)
    with rc_context({"font.size": 9, "svg.hashsalt": "onnx-fold", "axes.axisbelow": True}):
        panels: Any = figure.subplots(len(names), 2, squeeze=False)
        for (left, right), name in zip(panels, names, strict=True):
            phases = [phase for phase in report.phases if phase.name == name]
            _draw(left, right, name, phases, report)
        handles, labels = panels[-1][0].get_legend_handles_labels()
        limit, text = panels[-1][1].get_legend_handles_labels()
        figure.legend(
            handles + limit, labels + text, loc="outside lower center", ncols=4, frameon=False
        )
        with replacing(path) as folder:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(folder / path.name, dpi=150, metadata=metadata)


def _draw(left: Any, right: Any, name: str, phases: Sequence[Phase], report: BenchReport) -> None:
    limit, (original, folded) = report.read_ratio, report.names
    by_length = len({phase.batch for phase in phases}) == 1
    groups = sorted({phase.batch if by_length else _length(phase) for phase in phases})
    for colour, group in zip(COLOURS * len(groups), groups, strict=False):
        line = [p for p in phases if group == (p.batch if by_length else _length(p))]
        line.sort(key=lambda p: _length(p) if by_length else p.batch)
        x = [_length(p) if by_length else p.batch for p in line]
        what = f"batch {group}" if by_length else f"{group} tokens"
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3}
        left.plot(
            x, [p.original.median_ms for p in line], ls=":", label=f"{what}, {original}", **style
        )
        left.plot(x, [p.folded.median_ms for p in line], label=f"{what}, {folded}", **style)
        spread = [[p.speedup - p.low for p in line], [p.high - p.speedup for p in line]]
        right.errorbar(x, [p.speedup for p in line], spread, capsize=2, **style)
    right.axhline(limit, color="black", lw=0.9, ls="--", label=f"ratio of bytes read, {limit:.2f}")
    right.axhline(1, color="#999999", lw=0.8)
    label = AXES[name] if by_length else "batch"
    ticks = sorted({_length(p) if by_length else p.batch for p in phases})
    for axis, title in ((left, ROWS[name]), (right, "speed-up")):
        scale = "log" if min(ticks) > 0 else "linear"
        axis.set(xscale=scale, xlabel=label, title=f"{name}: {title}")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(visible=True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set_ylim(
        min(0.95, *(p.low for p in phases)), max(limit, *(p.high for p in phases)) + 0.02
    )


def _length(phase: Phase) -> int:
    return phase.past if phase.name == "decode" else phase.seq
