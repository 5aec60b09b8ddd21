"""Export a PyTorch module, fold it, and compare the result with the module itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnx_fold.check.parity import verify
from onnx_fold.errors import MissingExtraError, UsageError
from onnx_fold.files.load import load
from onnx_fold.files.targets import check_format, check_target
from onnx_fold.files.write import evaluate, read_in
from onnx_fold.models.export import name_weights
from onnx_fold.pipeline import FoldResult
from onnx_fold.pipeline import fold as fold_model
from onnx_fold.report.fold import CheckFailedError
from onnx_fold.runtime.module import evaluating, is_module

if TYPE_CHECKING:
    import torch

__all__ = ["export"]

_SAVING = ("shard_size", "executor")
_NOT_HERE = ("output", "in_place", "delete_old_data", "inputs")


def export(
    module: torch.nn.Module,
    args: Any = (),
    output: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    fold: Mapping[str, Any] | None = None,
    **torch_onnx_options: Any,
) -> FoldResult:
    """Export ``module`` with ``torch.onnx.export``, fold it, check it, and write it.

    The folded model is compared with the export, as :func:`onnx_fold.fold` does, and with the
    module itself, as :func:`onnx_fold.verify` does: on ``args`` and, where dimensions are dynamic,
    on other sizes. The module is in evaluation mode meanwhile.

    Args:
        module: What to export. (Presets are exported by ``onnx_fold.models.export.export``, which
            is ``onnx-fold export`` on the command line.)
        args: Its example arguments: a tuple, or one tensor.
        output: The file to write, see :meth:`onnx_fold.FoldResult.save`; None for none.
        kwargs: Its example keyword arguments.
        fold: Options of :func:`onnx_fold.fold`, such as ``{"objective": "size"}``; its ``verify``
            and ``shapes`` hold for both comparisons, and ``{"shapes": ()}`` keeps to ``args``.
        torch_onnx_options: Options of ``torch.onnx.export``, such as ``dynamic_shapes``; ``dynamo``
            is True by default.

    Returns:
        The folded model, and one report of all: ``result.report.module`` is the parity with the
        module.

    Raises:
        CannotWriteError: ``output`` cannot be written.
        CheckFailedError: The folded model does not compute what the module does, and was not
            written; the message says whether that is so before anything is folded.
        MissingExtraError: torch or onnxscript is not installed.
        UsageError: ``module`` is no module, or an option does not fit.
    """
    _import_torch()
    if not is_module(module):
        raise UsageError(
            f"expected a torch.nn.Module to export, got {type(module).__name__}; presets are"
            " exported by onnx_fold.models.export.export"
        )
    options = dict(fold or {})
    if wrong := sorted({*_NOT_HERE} & {*options}):
        raise UsageError(f"'{wrong[0]}' is no option of a fold after an export")
    if output is not None:
        check_format(Path(output))
        check_target(Path(output))
    saving = {name: options.pop(name) for name in _SAVING if name in options}
    shapes = options.get("shapes")
    if shapes is not None and not shapes:
        options["shapes"] = None
    given = args if isinstance(args, tuple) else (args,)
    exported = _exported(module, given, dict(kwargs or {}), torch_onnx_options)
    result = fold_model(exported, **options)
    if options.get("verify", True):
        evaluate(result.ir)
        how: dict[str, Any] = {"args": given, "kwargs": kwargs, "shapes": shapes}
        how["provider"] = options.get("provider", "auto")
        parity = verify(module, result.ir, **how)
        result = replace(result, report=replace(result.report, module=parity))
        if not parity:
            before = not result.report.folded or not verify(module, exported, **how)
            what = "the exported model, before any fold," if before else "the folded model"
            message = f"{what} is not the same function as the module: {parity.reason}"
            raise CheckFailedError(message, result.report)
    if output is None:
        return result
    result.save(output, **saving)
    return replace(result, ir=load(output))


def _exported(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
) -> ir.Model:
    torch = _import_torch()
    options = {"dynamo": True, "verbose": False, **options}
    with evaluating(module):
        if options["dynamo"]:
            exported: ir.Model = torch.onnx.export(module, args, kwargs=kwargs, **options).model
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                torch.onnx.export(module, args, file, kwargs=kwargs or None, **options)
                exported = load(file)
                read_in(exported)
    name_weights(exported)
    return exported


def _import_torch() -> Any:
    try:
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "torch") from error
    return torch
