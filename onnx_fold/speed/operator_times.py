"""Where the time goes: the operators of two models side by side, by ONNX Runtime's profiler.

Per node the median over the runs, summed over the nodes of each operator. Profiling costs time of
its own, so the sums are larger than the times of a bench. On CUDA they are the times of the
launches, not of the kernels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from onnx_fold.base.arguments import Provider
from onnx_fold.base.tables import figures_table
from onnx_fold.files.load import ModelSource
from onnx_fold.runtime import sessions
from onnx_fold.speed.steps import Fixed, Values

__all__ = ["OperatorTime", "Times", "operator_times", "operators_table", "side_by_side"]

Times = dict[str, tuple[int, float]]
"""Number of nodes and microseconds a run, by operator."""


@dataclass
class OperatorTime:
    """All nodes of one operator in one phase.

    Attributes:
        phase: ``prefill`` or ``decode``.
        operator: Its name.
        original_nodes: Nodes of the original model, after ONNX Runtime's optimisations.
        folded_nodes: Nodes of the folded model.
        original_us: Microseconds that these take in one run of the original.
        folded_us: The same of the folded model.
    """

    phase: str
    operator: str
    original_nodes: int
    folded_nodes: int
    original_us: float
    folded_us: float


def operator_times(
    source: ModelSource, provider: Provider, values: Values, **options: Any
) -> Times:
    """Run a model on ``values`` with the profiler on.

    Args:
        source: The model.
        provider: ``"cpu"`` or ``"cuda"``.
        values: Its inputs, on the device.
        options: Further options of :func:`onnx_fold.runtime.sessions.session`, and ``runs``.

    Raises:
        InvalidModelError: The model cannot be loaded.
        RunFailedError: It cannot run on these values.
    """
    runs = options.pop("runs", 20)
    with TemporaryDirectory(prefix="onnx-fold-") as folder:
        session = sessions.session(source, provider, profile=Path(folder) / "profile", **options)
        step = Fixed(session, values, provider, cuda_graph=False)
        for _ in range(runs):
            step.run()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"])
    times: Times = {}
    for (operator, _), seen in nodes.items():
        count, total = times.get(operator, (0, 0.0))
        times[operator] = count + 1, total + median(seen)
    return times


def side_by_side(phase: str, original: Times, folded: Times) -> list[OperatorTime]:
    """Join the times of both models, what takes longest first."""
    joined = []
    for name in dict.fromkeys((*original, *folded)):
        (nodes, time), (folded_nodes, folded_time) = (
            times.get(name, (0, 0.0)) for times in (original, folded)
        )
        joined.append(OperatorTime(phase, name, nodes, folded_nodes, time, folded_time))
    return sorted(joined, key=lambda each: -max(each.original_us, each.folded_us))


_SHOWN = 10
"""Operators shown; all of them are in the JSON report."""

_COLUMNS = "original_nodes", "folded_nodes", "original_us", "folded_us"


def operators_table(phase: str, operators: Sequence[OperatorTime], folded: str) -> Table:
    """The operators of one phase; of many those that take longest, and the sum of the others.

    Args:
        phase: Name of the phase.
        operators: What was measured.
        folded: What the folded model is called.
    """
    shown, rest = operators[:_SHOWN], operators[_SHOWN:]
    if rest:
        sums = [sum(getattr(each, name) for each in rest) for name in _COLUMNS]
        shown = [*shown, OperatorTime(phase, f"{len(rest)} others", *sums)]
    table = figures_table(f"Where the time of {phase} goes")
    table.add_column("operator", no_wrap=True)
    for heading in ("nodes", folded, "µs", folded, "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in shown:
        saved = each.original_us - each.folded_us
        times = (f"{time:,.0f}" for time in (each.original_us, each.folded_us))
        counts = str(each.original_nodes), str(each.folded_nodes)
        table.add_row(each.operator, *counts, *times, f"{saved:+,.0f}")
    return table
