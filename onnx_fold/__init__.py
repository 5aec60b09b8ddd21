"""Fold consecutive linear projections of ONNX transformers into single initializers.

The functions are those of the command line, with the same options::

    import onnx_fold

    result = onnx_fold.fold("model.onnx")  # or ModelProto, onnx_ir.Model, ONNXProgram
    result.report.saving.share
    result.save("folded.onnx")
"""

from onnx_fold.bench import BenchReport, bench
from onnx_fold.errors import (
    CannotWriteError,
    CheckFailedError,
    InvalidModelError,
    MissingExtraError,
    NotFiniteError,
    OnnxFoldError,
    UsageError,
)
from onnx_fold.parity import ParityReport, verify
from onnx_fold.pipeline import FoldResult, InspectReport, fold, inspect
from onnx_fold.report import FoldReport

__all__ = [
    "BenchReport",
    "CannotWriteError",
    "CheckFailedError",
    "FoldReport",
    "FoldResult",
    "InspectReport",
    "InvalidModelError",
    "MissingExtraError",
    "NotFiniteError",
    "OnnxFoldError",
    "ParityReport",
    "UsageError",
    "bench",
    "fold",
    "inspect",
    "verify",
]

__version__ = "0.1.0"
