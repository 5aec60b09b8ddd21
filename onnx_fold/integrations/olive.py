"""Folding as a pass of Olive (``olive-ai``).

Olive finds passes of others by a package configuration, see ``examples/olive_packages.json``::

    olive run --config examples/olive_fold.json --package-config examples/olive_packages.json
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from onnx_fold.base.arguments import Objective, Pivot, TargetName
from onnx_fold.errors import MissingExtraError
from onnx_fold.files.load import data_files
from onnx_fold.pipeline import CHECKS, fold

try:
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
except ImportError as error:
    raise MissingExtraError("olive-ai", "olive") from error

__all__ = ["OnnxFold"]

logger = logging.getLogger(__name__)

_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class OnnxFold(Pass):  # type: ignore[misc]  # it has no types
    """Fold consecutive linear layers of an ONNX model exactly: prove, check, report.

    Attributes of the model, its settings and its additional files stay; weights in a data file go
    to a data file. Put it before passes that fuse operators or quantise.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: Any) -> bool:
        """False: which folds pay depends on where the model runs."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {
            name: PassConfigParam(type_=kind, default_value=default, description=description)
            for name, kind, default, description in _options(accelerator_spec)
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        source = Path(model.model_path)
        target = Path(resolve_onnx_path(output_model_path, source.name))
        options = {name: getattr(config, name) for name, *_ in _options(self.accelerator_spec)}
        verify, report = options.pop("verify"), options.pop("report")
        if options["objective"] != "speed":
            options["target"] = None
        given = {name: value for name, value in options.items() if value is not None}
        if data_files(source):
            given.setdefault("shard_size", sys.maxsize)  # one data file, however small
        result = fold(source, output=target, verify=verify != "off" and verify, **given)
        logger.info("%r", result.report)
        if report is not None:
            Path(report).write_text(f"{json.dumps(result.report.to_dict(), indent=2)}\n")
        beside = _files_beside(model, target.parent)
        place: dict[str, str] = {"model_path": str(target)}
        if beside or data_files(target):
            place = {"model_path": str(target.parent), "onnx_file_name": target.name}
        return ONNXModelHandler(
            **place,
            **beside,
            inference_settings=copy.deepcopy(model.inference_settings),
            use_ort_extensions=model.use_ort_extensions,
            model_attributes=copy.deepcopy(model.model_attributes),
        )


def _options(accelerator: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield the options: name, type, default, and what they are."""
    provider = str(getattr(accelerator, "execution_provider", None) or "")
    target = "cuda" if provider in _CUDA else "cpu"

    def one_of(*known: str) -> str:
        return f"one of {', '.join(known)}"

    yield (
        *("objective", str, "speed"),
        f"What folds are for: never slower, as few weights as can be, or as few bytes a token: "
        f"{one_of(*get_args(Objective))}.",
    )
    yield (
        *("target", str, target),
        f"With objective speed, where no fold may cost time: {one_of(*get_args(TargetName))}; by"
        " default what the accelerator is.",
    )
    yield "pivot", str, "auto", f"Which matrix becomes the identity: {one_of(*get_args(Pivot))}."
    yield "strategy", str, None, "Keep to absorb, interpolate, select or rotate."
    yield "only", list[str], None, "Names of the passes to run."
    yield "skip", list[str], None, "Names of passes not to run."
    yield "protect", list[str], None, "Names of what stays as it is; also patterns: layers.0.*"
    yield "tolerance", float, None, "Largest predicted relative error of one fold."
    yield "shard_size", int, None, "Bytes at which a further data file is begun."
    yield "device", str, "cpu", "Where weights are evaluated: cpu, or a device of torch."
    yield "verify", str, "auto", f"How folds are checked: {one_of(*CHECKS, 'off')}."
    yield "report", str, None, "A file to write the report to, as JSON."
    yield "strict", bool, False, "Fail if a fold does not pass, in place of leaving it out."


def _files_beside(model: Any, folder: Path) -> dict[str, str]:
    """Copy files that a model of Olive may have beside its graph, and return their names."""
    names = {
        "external_initializers_file_name": model.external_initializers_path,
        "constant_inputs_file_name": model.constant_inputs_path,
    }
    found = {name: Path(path) for name, path in names.items() if path}
    for path in found.values():
        shutil.copy2(path, folder / path.name)
    return {name: path.name for name, path in found.items()}
