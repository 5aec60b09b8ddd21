"""All that :func:`onnx_fold.fold` does, as one pass of ``onnx_ir`` among others."""

from __future__ import annotations

import gc
import inspect
import logging
from typing import Any

import onnx_ir as ir

from onnx_fold.errors import UsageError
from onnx_fold.files.write import evaluate
from onnx_fold.pipeline import fold
from onnx_fold.report.fold import FoldReport

__all__ = ["OnnxFold"]

logger = logging.getLogger(__name__)

_OF_FILES = ("model", "output", "in_place", "delete_old_data", "shard_size")
OPTIONS = frozenset(inspect.signature(fold).parameters) - {*_OF_FILES}
"""The options of :func:`onnx_fold.fold` that do not speak of files."""


class OnnxFold(ir.passes.InPlacePass):
    """Fold the closed streams of a model, prove it and check it, as :func:`onnx_fold.fold` does.

    The work is done on a copy. When all of it is done the model gets the folded graph; a pass that
    raises, or that folds nothing, leaves the model and each of its values as they were. Values and
    nodes that were taken from ``model.graph`` before a fold belong to the old graph.

    Attributes:
        options: What it was made with.
        report: What the last call did, None before the first.
    """

    def __init__(self, **options: Any) -> None:
        """Take the options of :func:`onnx_fold.fold`, such as ``objective="size"``.

        Raises:
            UsageError: There is no such option, or it is about files.
        """
        if unknown := sorted({*options} - OPTIONS):
            known = ", ".join(sorted(OPTIONS))
            raise UsageError(f"unknown option '{unknown[0]}' of OnnxFold; there are {known}")
        super().__init__()
        self.options = options
        self.report: FoldReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold ``model``.

        Raises:
            OnnxFoldError: As :func:`onnx_fold.fold`.
        """
        result = fold(model, **self.options)
        self.report = result.report
        logger.info("%r", result.report)
        if not result.report.folded:
            return ir.passes.PassResult(model, modified=False)
        evaluate(result.ir, self.options.get("executor"))
        _become(model, result.ir)
        del result
        gc.collect()  # arrays that map the data files: who releases those next would fail
        return ir.passes.PassResult(model, modified=True)


def _become(model: ir.Model, other: ir.Model) -> None:
    """Let ``model`` hold what ``other`` does; nothing of this can fail."""
    functions = dict(other.functions)
    model.graph = other.graph
    model.functions.clear()
    model.functions.update(functions)
    model.ir_version = other.ir_version
