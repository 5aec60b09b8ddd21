"""Models in and out: any source becomes an ``onnx_ir.Model``; files are written whole or not."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir as ir
from google.protobuf import json_format, text_format
from google.protobuf.message import DecodeError

from onnx_fold.errors import CannotWriteError, InvalidModelError, UsageError

if TYPE_CHECKING:
    import torch

ModelSource: TypeAlias = (
    "str | os.PathLike[str] | onnx.ModelProto | ir.Model | torch.onnx.ONNXProgram"
)
"""What every public function takes for a model."""

_TEXT_ERRORS = (json_format.ParseError, text_format.ParseError, onnx.parser.ParseError)

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may have; larger models need external data."""


def load(source: ModelSource) -> ir.Model:
    """Return ``source`` as an ``onnx_ir.Model``; weights of a file stay on disk until read.

    An ``onnx_ir.Model`` (and the one inside a ``torch.onnx.ONNXProgram``) is returned as it is, not
    copied.

    Raises:
        InvalidModelError: The file is missing, truncated, not ONNX, or its external data is
            missing, too short, or outside the model's folder.
        UsageError: ``source`` is of none of the supported types.
    """
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, "the given model")
    if isinstance(source, str | os.PathLike):
        return _load_file(Path(source))
    model: Any = getattr(source, "model", None)  # torch.onnx.ONNXProgram, without importing torch
    if isinstance(model, ir.Model):
        return model
    raise UsageError(
        "expected a path, onnx.ModelProto, onnx_ir.Model or torch.onnx.ONNXProgram,"
        f" got {type(source).__name__}"
    )


def _load_file(path: Path) -> ir.Model:
    try:
        with warnings.catch_warnings(action="ignore"):  # that a format is experimental
            proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InvalidModelError(f"cannot read {path}: {error.strerror}") from error
    except (DecodeError, ValueError, *_TEXT_ERRORS) as error:
        raise InvalidModelError(f"{path} is not an ONNX model, or is truncated") from error
    model = _from_proto(proto, str(path))
    folder = path.parent.resolve()
    ir.external_data.set_base_dir(model.graph, folder)
    for tensor in external_tensors(model):
        _check_external(tensor, folder, path)
    return model


def _from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import:
        raise InvalidModelError(f"{name} is not an ONNX model: it holds no graph")
    for what in _unknown_parts(proto):
        raise InvalidModelError(f"{name} holds {what}, which onnx-fold would lose")
    try:
        return ir.from_proto(proto)
    except Exception as error:
        raise InvalidModelError(f"{name} is not a valid ONNX model: {error}") from error


def _unknown_parts(proto: onnx.ModelProto) -> Iterator[str]:
    """What ``proto`` holds that an ``onnx_ir.Model`` cannot."""
    if proto.training_info:
        yield "training information"
    if any(graph.sparse_initializer for graph in _graphs(proto)):
        yield "sparse initializers"


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and the bodies of control flow, at any depth."""
    queue = [proto.graph]
    while queue:
        graph = queue.pop()
        yield graph
        for attribute in (each for node in graph.node for each in node.attribute):
            queue.extend(attribute.graphs)
            if attribute.HasField("g"):
                queue.append(attribute.g)


def check(source: ModelSource, model: ir.Model, cause: Exception) -> None:
    """Blame ``cause``, which nobody expected, on the model if it is not valid ONNX.

    Raises:
        InvalidModelError: ``onnx.checker`` rejects the model.
    """
    is_path = isinstance(source, str | os.PathLike)
    name = str(source) if is_path else "the model"
    try:
        onnx.checker.check_model(name if is_path else ir.to_proto(model), full_check=True)
    except Exception as error:
        raise InvalidModelError(f"{name} is not a valid ONNX model: {error}") from cause


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the initializers, of all graphs, whose data lies in another file."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def _check_external(tensor: ir.ExternalTensor, folder: Path, path: Path) -> None:
    file = (folder / tensor.location).resolve()
    if not file.is_relative_to(folder):
        raise InvalidModelError(
            f"{path}: initializer '{tensor.name}' points outside the model's folder,"
            f" to {tensor.location}"
        )
    if not file.is_file():
        raise InvalidModelError(
            f"{path}: external data file {tensor.location} is missing (initializer '{tensor.name}')"
        )
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if (tensor.length is not None and tensor.length != tensor.nbytes) or end > file.stat().st_size:
        raise InvalidModelError(
            f"{path}: external data file {tensor.location} is too short for initializer"
            f" '{tensor.name}' ({end} bytes needed, {file.stat().st_size} there)"
        )


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of all graphs."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def save(model: ir.Model, path: str | os.PathLike[str], source: ir.Model | None = None) -> None:
    """Write ``model`` to ``path``: both files (graph and external data) or none.

    Weights go to ``<path>.data`` if some of the model's already lie outside its graph or if they
    do not fit one protobuf message. Everything is written beside the target, flushed to the disk
    and then renamed, data before graph.

    ``source`` is another model whose weights must not be overwritten.

    Raises:
        CannotWriteError: The folder is missing or read-only, the disk is full, or weights of one
            of the models lie in ``<path>.data``. An earlier file is then still what it was.
    """
    target = Path(path)
    data = target.name + ".data"
    external = weight_bytes(model) > PROTOBUF_LIMIT // 2 or any(external_tensors(model))
    for tensor in (*external_tensors(model), *(external_tensors(source) if source else ())):
        if _is_same(Path(tensor.path), target.parent / data):
            raise CannotWriteError(
                f"cannot write {target}: {data} holds the weights of the input; take another name"
            )
    with replacing(target, data if external else None) as folder:
        ir.save(model, folder / target.name, external_data=data if external else None)


@contextlib.contextmanager
def replacing(target: Path, data: str | None = None) -> Iterator[Path]:
    """Give a folder beside ``target`` to write into; on success move ``data``, then ``target`` out.

    Raises:
        CannotWriteError: Anything that the operating system refused, inside the block or out.
    """
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield folder
        for name in filter(None, (data, target.name)):
            if (folder / name).exists():
                _flush(folder / name)
                (folder / name).replace(target.parent / name)
    except OSError as error:
        raise CannotWriteError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _is_same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
