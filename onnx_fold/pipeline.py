"""The public functions ``fold`` and ``inspect``: load, fold a copy, check it, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.console import Group, RenderableType

from onnx_fold.attention import Attention, find_attention
from onnx_fold.calibrate import record
from onnx_fold.cost import Saving, cost
from onnx_fold.device import Array
from onnx_fold.errors import CannotWriteError, CheckFailedError, UsageError
from onnx_fold.files import ModelSource, check, external_tensors, load, replacing, save
from onnx_fold.folding import PIVOTS, FoldPass, Options, fold_streams
from onnx_fold.inline import inline
from onnx_fold.linear import find_linears, label
from onnx_fold.parity import verify as parity_check
from onnx_fold.passes import PASSES
from onnx_fold.quantised import find_quantised
from onnx_fold.report import FoldReport, new_table
from onnx_fold.runtime import onnxruntime
from onnx_fold.stream import find_streams


@dataclass(frozen=True)
class FoldResult:
    """A folded model and what was done to it.

    Attributes:
        model: The result; the source is never changed.
        report: What was folded into what, what was not, and why.
        original: The model that it came from.
        source: The file that that came from, if it came from a file.
    """

    model: ir.Model
    report: FoldReport
    original: ir.Model
    source: Path | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model. Where nothing was folded, a single-file source is copied byte for byte.

        Raises:
            CannotWriteError: ``path`` is the source itself, or the system refuses to write it.
        """
        target = Path(path)
        is_single_file = not any(external_tensors(self.model))
        if self.source is not None and target.exists() and target.samefile(self.source):
            raise CannotWriteError(f"{path} is the input; write to another file")
        if self.source is not None and not self.report.folded and is_single_file:
            with replacing(target) as folder:
                shutil.copyfile(self.source, folder / target.name)
        else:
            save(self.model, target, self.original)


def fold(
    model: ModelSource,
    *,
    pivot: str = "auto",
    strategy: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    protect: Iterable[str] = (),
    tolerance: float | None = None,
    calibrate: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    verify: bool = True,
    provider: str = "auto",
) -> FoldResult:
    """Fold the closed streams of a model; the function it computes stays the same.

    Args:
        model: A path, ``onnx.ModelProto``, ``onnx_ir.Model`` or ``torch.onnx.ONNXProgram``. It is
            not changed.
        pivot: Which matrix becomes the identity where there is a choice: ``"q"``, ``"k"``, ``"v"``,
            ``"p"`` (the writer of a parallel block), or ``"auto"``: the most accurate.
        strategy: Force one way to change a basis, ``"absorb"``, ``"interpolate"`` or ``"select"``,
            whatever its error unless ``tolerance`` limits it. None chooses by predicted error.
        only: Names of the passes to run; empty for all (those and ``"merge"``).
        skip: Names of passes not to run.
        protect: Names of initializers, nodes or values whose streams are left alone.
        tolerance: Largest predicted relative error of one fold. None takes the default of the
            storage type, :data:`onnx_fold.basis.TOLERANCES`, and at most
            :data:`onnx_fold.basis.MAX_STREAM_RATIO` times the error of the original.
        calibrate: Inputs, as arrays by name or an ``.npz`` file. The original runs on them once;
            what its layers read then stands for random rows when errors are predicted, and
            weights the rows that interpolation picks.
        verify: Run both models in ONNX Runtime and compare them.
        provider: Where to verify: ``"cpu"``, ``"cuda"`` or ``"auto"``.

    Returns:
        The folded model and the report.

    Raises:
        CheckFailedError: The folded model does not compute the same function.
        InvalidModelError: The model cannot be read.
        MissingExtraError: ``verify`` is asked for and onnxruntime is not installed.
        UsageError: An unknown pivot or pass, or nothing has a name that is to be protected.
    """
    if verify or calibrate is not None:
        onnxruntime()  # say at once that it is missing, not after the work
    if strategy is not None and tolerance is None:
        tolerance = float("inf")
    options = Options(pivot=pivot, protect=frozenset(protect), tolerance=tolerance)
    passes = _passes(options, strategy, only, skip)
    original = load(model)
    _check_names(original, options.protect)
    seen = None if calibrate is None else record(original, calibrate, provider)
    before = cost(original)
    try:
        folded = inline(original).clone()
        streams = fold_streams(folded, passes, options, seen)
        if not any(stream.folded for stream in streams):
            folded = original.clone()
    except Exception as error:
        check(model, original, error)
        raise
    report = FoldReport(Saving(before, cost(folded)), streams, find_quantised(original.graph))
    if verify and report.folded:
        parity = parity_check(original, folded, provider=provider)
        report = replace(report, verification=parity)
        if not parity.ok:
            message = f"the folded model is not the same function: {parity.reason}"
            raise CheckFailedError(message, report)
    source = Path(model) if isinstance(model, str | os.PathLike) else None
    return FoldResult(folded, report, original, source)


def _check_names(model: ir.Model, protect: Iterable[str]) -> None:
    graph = model.graph
    known = {value.name for node in graph for value in (*node.inputs, *node.outputs) if value}
    known |= {node.name for node in graph} | {label(node) for node in graph}
    known |= {linear.label for linear in find_linears(graph)} | set(graph.initializers)
    if unknown := sorted(set(protect) - known):
        raise UsageError(f"nothing in the model is called '{unknown[0]}'")


def _passes(
    options: Options, strategy: str | None, only: Sequence[str], skip: Sequence[str]
) -> list[FoldPass]:
    names = [each.name for each in PASSES]
    for name in (*only, *skip, strategy):
        if name is not None and name not in names:
            raise UsageError(f"unknown pass '{name}'; there are {', '.join(names)}")
    if options.pivot not in PIVOTS:
        raise UsageError(f"unknown pivot '{options.pivot}'; there are {', '.join(PIVOTS)}")
    wanted = [each for each in PASSES if (not only or each.name in only) and each.name not in skip]
    if strategy is not None:
        wanted = [each for each in wanted if each.name == strategy or not each.is_basis_change]
    return [each(options) for each in wanted]


@dataclass(frozen=True)
class InspectReport:
    """What is in a model and what folding would do to it.

    Attributes:
        attention: The attention layers and their heads.
        plan: What :func:`fold` would do.
        metadata: Opsets, IR version and producer.
    """

    attention: list[Attention]
    plan: FoldReport
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "model": self.metadata,
            "attention": [each.to_dict() for each in self.attention],
            "plan": self.plan.to_dict(),
        }

    def __rich__(self) -> RenderableType:
        """For the terminal."""
        parts: list[RenderableType] = []
        if self.attention:
            table = new_table("Attention")
            for column in ("layer", "kind", "heads", "kv heads", "head dim", "Q, K, V"):
                table.add_column(column, overflow="fold")
            for number, each in enumerate(self.attention):
                sizes = (each.num_heads, each.num_kv_heads, each.head_dim)
                table.add_row(str(number), each.kind, *map(str, sizes), each.projections)
            parts.append(table)
        return Group(*parts, self.plan)


def inspect(
    model: ModelSource,
    *,
    pivot: str = "auto",
    strategy: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    protect: Iterable[str] = (),
    tolerance: float | None = None,
    calibrate: str | os.PathLike[str] | Mapping[str, Array] | None = None,
) -> InspectReport:
    """Show the streams of a model, what would fold, and why the rest would not.

    Takes the options of :func:`fold`, runs nothing and changes nothing.

    Raises:
        InvalidModelError: The model cannot be read.
        UsageError: An unknown pivot or pass.
    """
    original = load(model)
    result = fold(
        original,
        pivot=pivot,
        strategy=strategy,
        only=only,
        skip=skip,
        protect=protect,
        tolerance=tolerance,
        calibrate=calibrate,
        verify=False,
    )
    metadata = {
        "ir_version": original.ir_version,
        "opsets": {
            domain or "ai.onnx": version for domain, version in original.opset_imports.items()
        },
        "producer": " ".join(filter(None, (original.producer_name, original.producer_version))),
    }
    plan = replace(result.report, is_plan=True)
    return InspectReport(find_attention(find_streams(original)), plan, metadata)
