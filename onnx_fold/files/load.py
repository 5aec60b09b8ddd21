"""Models in: any source becomes an ``onnx_ir.Model``, whose external data is known to be there."""

from __future__ import annotations

import errno
import functools
import inspect
import itertools
import math
import os
import re
import stat
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import onnx
import onnx_ir as ir
from google.protobuf import json_format, text_format
from google.protobuf.message import DecodeError

from onnx_fold.errors import InvalidModelError, OnnxFoldError, UsageError, sentence
from onnx_fold.files.order import in_order, without_listed_initializers
from onnx_fold.files.wellformed import MalformedError, well_formed

if TYPE_CHECKING:
    import torch

ModelSource: TypeAlias = (
    "str | os.PathLike[str] | onnx.ModelProto | ir.Model | torch.onnx.ONNXProgram"
)
"""What every public function takes for a model."""

_TEXT_ERRORS = (json_format.ParseError, text_format.ParseError, onnx.parser.ParseError)

TEXT_SUFFIXES = (".json", ".onnxjson", ".onnxtxt", ".onnxtext", ".textproto", ".prototxt", ".pbtxt")
"""Models in these are text, which ONNX reads and ONNX Runtime does not."""

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may have; larger models need external data."""


def load(source: ModelSource) -> ir.Model:
    """Return ``source`` as an ``onnx_ir.Model``; weights of a file stay on disk until read.

    An ``onnx_ir.Model`` (and the one inside a ``torch.onnx.ONNXProgram``) is returned as it is, not
    copied; but nodes that are read before they are written are sorted, in a copy, and so is a model
    of an IR version that lists its initializers among its inputs one of the next version, which
    does not.

    Raises:
        InvalidModelError: The file is missing, truncated, not ONNX, or its external data is
            missing, too short, outside the model's folder, or said to be where nothing can be; or
            a value is read that nothing writes.
        UsageError: ``source`` is of none of the supported types.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else "the given model"
    try:
        return without_listed_initializers(in_order(_read(source)))
    except MalformedError as error:
        raise InvalidModelError(f"{name} is not a valid ONNX model: {error}") from error


def _read(source: ModelSource) -> ir.Model:
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return _from_proto(well_formed(source), "the given model")
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
    if reason := why_not_a_file(path):
        raise InvalidModelError(f"cannot read {path}: {reason}")
    try:
        with warnings.catch_warnings(action="ignore"):  # that a format is experimental
            proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InvalidModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError, *_TEXT_ERRORS) as error:
        raise InvalidModelError(f"{path} is not an ONNX model, or is truncated") from error
    proto = well_formed(proto)
    folder = path.parent.resolve()
    try:
        _check_external(proto, folder)
    except InvalidModelError as error:
        raise InvalidModelError(f"{path}: {error}") from None
    model = _from_proto(proto, str(path))
    for tensor in external_tensors(model):
        tensor.base_dir = folder
    return model


def _from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import:
        raise InvalidModelError(f"{name} is not an ONNX model: it holds no graph")
    for what in _unknown_parts(proto):
        raise InvalidModelError(f"{name} holds {what}, which onnx-fold would lose")
    if _holds_maps(proto.graph):
        raise InvalidModelError(
            f"{name} has inputs or outputs of a map type, which onnx_ir cannot read; leave ZipMap"
            " out when it is exported"
        )
    try:
        return ir.from_proto(proto)
    except Exception as error:
        raise InvalidModelError(f"{name} is not a valid ONNX model: {sentence(error)}") from error


def _holds_maps(graph: onnx.GraphProto) -> bool:
    """Whether a value is a map, or a sequence of them, as classifiers of scikit-learn give it."""
    types = [value.type for value in (*graph.input, *graph.output, *graph.value_info)]
    kinds = [t.sequence_type.elem_type if t.HasField("sequence_type") else t for t in types]
    return any(kind.HasField("map_type") for kind in kinds)


def why_not_a_file(path: Path) -> str:
    """Why ``path`` cannot be read like a file: it would block, or never end; empty if it can."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    return "" if stat.S_ISREG(mode) else "it is not a regular file"


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


_P = ParamSpec("_P")
_R = TypeVar("_R")


def blames_models(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let ``function`` blame an error that nobody expected on a model that is not valid ONNX.

    Its models are its arguments of the names ``model``, ``original`` and ``folded``.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def blaming(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (OnnxFoldError, MemoryError):
            raise
        except Exception as error:
            arguments = signature.bind(*args, **kwargs).arguments
            for name in ("model", "original", "folded"):
                if name in arguments:
                    _check(arguments[name], error)
            raise

    return blaming


def _check(source: ModelSource, cause: Exception) -> None:
    """Raise ``InvalidModelError`` if ``onnx.checker`` rejects the model, else nothing."""
    is_path = isinstance(source, str | os.PathLike)
    name = str(source) if is_path else "the given model"
    try:
        model = name if is_path else ir.to_proto(load(source))
        onnx.checker.check_model(model, full_check=True)
    except UsageError:
        return  # it is no model at all
    except Exception as error:
        raise InvalidModelError(f"{name} is not a valid ONNX model: {sentence(error)}") from cause


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors whose data lies in another file, wherever in ``model`` they are."""
    for tensor, _ in stored_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor


def stored_tensors(
    model: ir.Model,
) -> Iterator[tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    """Yield every tensor that ``model`` holds, and what puts another in its place.

    They are initializers of graphs and bodies, and attributes of nodes, in functions too.
    """
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        graphs = [*scope.subgraphs()]
        attributes = [node.attributes for node in scope.all_nodes()]
        if isinstance(scope, ir.Graph):
            graphs.append(scope)
        else:
            attributes.append(scope.attributes)
        for value in (value for graph in graphs for value in graph.initializers.values()):
            if value.const_value is not None:
                yield value.const_value, partial(setattr, value, "const_value")
        for each in attributes:
            yield from _tensor_attributes(each)


def _tensor_attributes(
    attributes: MutableMapping[str, ir.Attr],
) -> Iterator[tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    for name, attribute in list(attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:

            def put(tensor: ir.TensorProtocol, name: str = name) -> None:
                attributes[name] = ir.AttrTensor(name, tensor)

            yield attribute.as_tensor(), put
        elif attribute.type == ir.AttributeType.TENSORS and attribute.value is not None:
            for i, one in enumerate(attribute.as_tensors()):

                def put_one(tensor: ir.TensorProtocol, name: str = name, i: int = i) -> None:
                    several = list(attributes[name].as_tensors())
                    several[i] = tensor
                    attributes[name] = ir.AttrTensors(name, several)

                yield one, put_one


def data_files(path: Path) -> set[Path]:
    """The files that a model in ``path`` names for its data; none if it cannot be read."""
    try:
        if path.stat().st_size > PROTOBUF_LIMIT or not path.is_file():
            return set()
        with warnings.catch_warnings(action="ignore"):  # that a format is experimental
            proto = onnx.load(path, load_external_data=False)
    except Exception:  # whatever it is, it is no model
        return set()
    return {
        path.parent / entry.value
        for tensor in all_stored(proto)
        if onnx.external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


@dataclass(frozen=True, order=True)
class _Range:
    """Bytes ``start`` to ``end`` of a file, and the tensor that they hold."""

    start: int
    end: int
    name: str


def _check_external(proto: onnx.ModelProto, folder: Path) -> None:
    """Check that every external tensor lies whole in a file of ``folder``, and none in another."""
    ranges: dict[Path, set[_Range]] = defaultdict(set)
    for tensor in all_stored(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            file, found = _external_range(tensor, folder)
            if found.end > found.start:
                ranges[file].add(found)
    for file, found_there in ranges.items():
        ordered = sorted(found_there)
        for one, other in itertools.pairwise(ordered):
            if other.start < one.end and (other.start, other.end) != (one.start, one.end):
                raise InvalidModelError(
                    f"initializers '{one.name}' and '{other.name}' overlap in external data file"
                    f" {file.name}"
                )


def all_stored(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that ``proto`` holds, those of functions and bodies included."""
    yield from _stored(proto.graph.initializer, proto.graph.node)
    for function in proto.functions:
        yield from _stored((), function.node)
        yield from (each.t for each in function.attribute_proto)


def _stored(
    initializers: Iterable[onnx.TensorProto], nodes: Iterable[onnx.NodeProto]
) -> Iterator[onnx.TensorProto]:
    """Yield all tensors of a graph, those of its nodes' attributes and bodies included."""
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _stored(graph.initializer, graph.node)


def _external_range(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, _Range]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, name = entries.get("location", ""), tensor.name
    start = _count(entries.get("offset", "0"), "offset", name)
    size = _size(tensor)
    length = _count(entries.get("length", str(size)), "length", name)
    if length != size:
        raise InvalidModelError(
            f"initializer '{name}' takes {size} bytes, but has {length} in {location}"
        )
    if "\0" in location:
        raise InvalidModelError(f"initializer '{name}' has no valid location: {location!r}")
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        raise InvalidModelError(
            f"initializer '{name}' points outside the model's folder, to {location}"
        )
    if Path(location).is_absolute():
        raise InvalidModelError(f"initializer '{name}' has an absolute location, {location}")
    if not file.is_file():
        raise InvalidModelError(f"external data file {location} is missing (initializer '{name}')")
    if start + length > file.stat().st_size:
        raise InvalidModelError(
            f"external data file {location} is too short for initializer '{name}'"
            f" ({start + length} bytes needed, {file.stat().st_size} there)"
        )
    if file.stat().st_nlink > 1:
        raise InvalidModelError(
            f"external data file {location} has several hard links, which is not safe to read:"
            " copy it"
        )
    return file, _Range(start, start + length, name)


def _size(tensor: onnx.TensorProto) -> int:
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):
        raise InvalidModelError(
            f"initializer '{tensor.name}' is of a type that has no external data"
        ) from None
    return math.ceil(math.prod(tensor.dims) * bits / 8)


def _count(text: str, what: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InvalidModelError(f"initializer '{name}' has an invalid {what}: {text!r}")
    return int(text)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all tensors that ``model`` holds, those of Constant nodes, too."""
    return sum(tensor.nbytes for tensor, _ in stored_tensors(model))
