"""Dot plots: a dot for each figure, on a track with a line at its limit. Places in per cent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx_fold.check.judge import OutputParity
from onnx_fold.check.parity import ParityReport
from onnx_fold.check.proof import Proof
from onnx_fold.speed.timing import BenchReport, Phase

__all__ = ["Mark", "Plot", "Row", "parity_plot", "speed_plot"]

_MARGINS = (1e-3, 10.0)
"""Shares of a limit that are told apart; what lies beyond is drawn at the edge."""

MANY = 24
"""Outputs that are drawn; of more, those nearest their limits."""


@dataclass(frozen=True)
class Mark:
    """A line across all rows of a plot, or a tick below it."""

    place: float
    text: str
    is_limit: bool = False


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: What it is of.
        place: Where its dot is.
        text: The figure in words.
        ok: Whether it is within its limit.
        low: Where its interval begins, if it has one.
        high: Where that ends.
        is_beyond: Whether it lies further left than can be drawn.
    """

    name: str
    place: float
    text: str
    ok: bool = True
    low: float | None = None
    high: float | None = None
    is_beyond: bool = False


@dataclass(frozen=True)
class Plot:
    """Rows on one axis.

    Attributes:
        rows: The figures.
        ticks: What is written along the axis.
        lines: What is drawn across the rows.
        caption: What the axis is.
        left_out: How many rows are not shown.
    """

    rows: Sequence[Row]
    ticks: Sequence[Mark]
    lines: Sequence[Mark]
    caption: str
    left_out: int = 0


def parity_plot(proof: Proof | None, parity: ParityReport | None, limit: float) -> Plot | None:
    """The proof and every output of the parity check, each as a share of its limit.

    Args:
        proof: The proof, if there is one.
        parity: The parity check, if there is one.
        limit: What the error of the proof may be.
    """
    rows = []
    if proof is not None and (proof.proved or proof.failed):
        text = f"{proof.error:.0e} of at most {limit:.0e}, {proof.scope}"
        rows.append(_margin_row("proof in float64", proof.error / limit, text, not proof.failed))
    outputs = [] if parity is None else sorted(parity.outputs, key=_nearness)
    rows += [_output_row(output) for output in outputs[:MANY]]
    if not rows:
        return None
    decades = [10.0**exponent for exponent in range(-3, 2)]
    ticks = [Mark(_log_place(x), f"{x:g}") for x in decades]
    lines = [Mark(_log_place(1.0), "limit", is_limit=True)]
    caption = "error as a share of its limit (logarithmic)"
    return Plot(rows, ticks, lines, caption, max(0, len(outputs) - MANY))


def _nearness(output: OutputParity) -> tuple[bool, float]:
    return output.ok, -(output.margin or 0.0)


def _output_row(output: OutputParity) -> Row:
    if output.margin is None:
        text = output.reason or ("equal" if output.ok else "differs")
        return _margin_row(output.name, 0.0 if output.ok else math.inf, text, output.ok)
    if not output.ok:
        text = f"{output.margin:.3g}x its limit: {output.reason}"
        return _margin_row(output.name, output.margin, text, ok=False)
    parts = [f"{100 * output.margin:.3g} % of the limit"]
    if output.error_original is not None and output.error_folded is not None:
        parts.append(f"error {output.error_original:.1e} → {output.error_folded:.1e}")
    else:
        parts.append(f"relative error {output.relative_error:.1e}")
    if output.judged:
        parts.append(f"judged by {output.judged}")
    return _margin_row(output.name, output.margin, ", ".join(parts), ok=True)


def _margin_row(name: str, margin: float, text: str, ok: bool) -> Row:
    return Row(name, _log_place(margin), text, ok, is_beyond=margin < _MARGINS[0])


def _log_place(margin: float) -> float:
    low, high = (math.log10(end) for end in _MARGINS)
    if not margin > 0:
        return 0.0
    return 100 * min(1.0, max(0.0, (math.log10(min(margin, 1e9)) - low) / (high - low)))


def speed_plot(report: BenchReport) -> Plot:
    """The speed-up of each phase with its interval, beside the ratio of the bytes read."""
    phases = report.phases
    seen = [1.0, report.read_ratio, *(end for each in phases for end in (each.low, each.high))]
    step = _step(max(seen) - min(seen))
    low = max(0, math.floor(min(seen) / step - 0.25)) * step
    high = math.ceil(max(seen) / step + 0.25) * step

    def place(ratio: float) -> float:
        return 100 * (ratio - low) / (high - low)

    count = round((high - low) / step)
    values = [low + step * number for number in range(count + 1)]
    ticks = [Mark(place(x), f"{x:.4g}x") for x in _spread(values)]
    limit = f"bytes read {report.read_ratio:.2f}x"
    lines = [Mark(place(1.0), "1x"), Mark(place(report.read_ratio), limit, is_limit=True)]
    rows = [
        Row(
            _named(each),
            place(each.speedup),
            f"{each.speedup:.3f}x ({each.low:.2f}-{each.high:.2f}), {each.pairs} pairs",
            each.high >= 1.0,
            place(each.low),
            place(each.high),
        )
        for each in phases
    ]
    caption = f"speed-up with its 95 % interval; dashed: {limit}"
    if report.has_tokens:
        caption += ", what decode at batch 1 can gain"
    return Plot(rows, ticks, lines, caption)


def _named(phase: Phase) -> str:
    sizes = {"prefill": f", {phase.seq} tokens", "decode": f", past {phase.past}"}
    return f"{phase.name}, batch {phase.batch}{sizes.get(phase.name, '')}"


def _step(span: float) -> float:
    """A round step that cuts ``span`` into about four."""
    rough = max(span, 0.02) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)


def _spread(values: Sequence[float], most: int = 7) -> Iterable[float]:
    return values[:: math.ceil(len(values) / most)]
