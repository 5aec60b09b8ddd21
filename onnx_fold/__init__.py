"""Fold consecutive linear projections of ONNX transformers into single initializers.

The functions are those of the command line, with the same options::

    import onnx_fold

    result = onnx_fold.fold("model.onnx")  # or ModelProto, onnx_ir.Model, ONNXProgram
    result.report.saving.share
    result.save("folded.onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_fold.check.parity import ParityReport, verify
    from onnx_fold.errors import (
        CannotWriteError,
        InvalidModelError,
        MissingExtraError,
        NotFiniteError,
        OnnxFoldError,
        UsageError,
    )
    from onnx_fold.integrations.folder import fold_folder
    from onnx_fold.integrations.onnx_ir import OnnxFold
    from onnx_fold.integrations.torch import export
    from onnx_fold.pipeline import FoldResult, InspectReport, fold, inspect
    from onnx_fold.report.fold import CheckFailedError, FoldReport
    from onnx_fold.report.folder import FolderReport
    from onnx_fold.speed.timing import BenchReport, bench
else:

    def __getattr__(name: str) -> object:
        """Import what is asked for when it is asked for: onnx and scipy take their time."""
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        module = import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
        globals()[name] = value = getattr(module, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "BenchReport",
    "CannotWriteError",
    "CheckFailedError",
    "FoldReport",
    "FoldResult",
    "FolderReport",
    "InspectReport",
    "InvalidModelError",
    "MissingExtraError",
    "NotFiniteError",
    "OnnxFold",
    "OnnxFoldError",
    "ParityReport",
    "UsageError",
    "bench",
    "export",
    "fold",
    "fold_folder",
    "inspect",
    "verify",
]

_MODULES = {
    "BenchReport": "speed.timing",
    "CheckFailedError": "report.fold",
    "FoldReport": "report.fold",
    "FoldResult": "pipeline",
    "FolderReport": "report.folder",
    "InspectReport": "pipeline",
    "OnnxFold": "integrations.onnx_ir",
    "ParityReport": "check.parity",
    "bench": "speed.timing",
    "export": "integrations.torch",
    "fold": "pipeline",
    "fold_folder": "integrations.folder",
    "inspect": "pipeline",
    "verify": "check.parity",
}
"""Where the names of this module come from; those of errors from ``errors``."""

__version__ = "0.1.0"
