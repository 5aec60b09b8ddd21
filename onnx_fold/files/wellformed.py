"""What a file must be for ``onnx_ir`` to hold it: names that are text, attributes of their type.

``onnx_ir`` reads more than this and stumbles later; ONNX Runtime refuses what is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_NOTES = frozenset({"doc_string", "producer_name", "producer_version", "denotation"})
"""Fields that are for people, and metadata: bytes in them that are no text are replaced."""

_DATA = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRINGS: "strings",
    onnx.AttributeProto.TENSORS: "tensors",
    onnx.AttributeProto.GRAPHS: "graphs",
    onnx.AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    onnx.AttributeProto.TYPE_PROTOS: "type_protos",
}
"""The field that an attribute of a type has its value in."""


_ONE = frozenset(name for name in _DATA.values() if not name.endswith("s")) | {"s"}
"""Those of them that hold one value, which must be there."""


_FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}
"""Where a tensor has its elements that has no bytes, and how many for one; else in int32_data."""

_TEXTS = tuple(
    onnx.TensorProto.DESCRIPTOR.fields_by_name[name]
    for name in ("name", "doc_string", "external_data")
)


class MalformedError(Exception):
    """A model breaks a rule of ONNX; the message says which."""


def well_formed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto``, or a copy whose notes for people are text.

    Raises:
        MalformedError: A name is no text, an attribute is not of its type, or a tensor has a type
            or sizes that cannot be, or other data than they take.
    """
    notes = [_broken_notes(message, in_function) for message, in_function in _messages(proto)]
    if not any(notes):
        return proto
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    for (message, _), names in zip(_messages(copy), notes, strict=True):
        for name in names:
            setattr(message, name, getattr(message, name).decode(errors="replace"))
    return copy


def _messages(message: Message) -> Iterator[tuple[Message, bool]]:
    """``message`` and all that are in it, and whether they are in a function."""
    todo = [(message, False)]
    while todo:
        message, in_function = todo.pop()
        in_function = in_function or isinstance(message, onnx.FunctionProto)
        yield message, in_function
        for field, value in _fields(message):
            if field.message_type is not None:
                parts = value if field.is_repeated else [value]
                todo.extend((part, in_function) for part in parts)


def _fields(message: Message) -> list[tuple[Any, Any]]:
    """The fields of ``message``, but for the data of tensors, which would be copied."""
    if isinstance(message, onnx.TensorProto):
        return [(field, getattr(message, field.name)) for field in _TEXTS]
    return list(message.ListFields())


def _broken_notes(message: Message, in_function: bool) -> list[str]:
    """Check one message; return the names of its notes that are no text."""
    if isinstance(message, onnx.AttributeProto):
        _check_attribute(message, in_function)
    elif isinstance(message, onnx.TensorProto):
        _check_tensor(message)
    broken = []
    for field, value in _fields(message):
        if field.type != FieldDescriptor.TYPE_STRING:
            continue
        for text in value if field.is_repeated else (value,):
            if isinstance(text, str):  # what is no UTF-8 comes as bytes
                continue
            if field.name not in _NOTES and not isinstance(message, onnx.StringStringEntryProto):
                raise MalformedError(f"a name is no text: {text!r}")
            broken.append(field.name)
    return broken


def _check_attribute(attribute: onnx.AttributeProto, in_function: bool) -> None:
    if attribute.ref_attr_name:
        if not in_function:
            raise MalformedError(
                f"attribute '{attribute.name}' refers to one of a function, but is in none"
            )
        return
    field = _DATA.get(attribute.type)
    if field is None:
        raise MalformedError(f"attribute '{attribute.name}' has no type that is known")
    set_fields = {each.name for each, _ in attribute.ListFields()} & {*_DATA.values()}
    if set_fields - {field} or (field in _ONE and field not in set_fields):
        raise MalformedError(f"attribute '{attribute.name}' is not of the type that it says")


def _check_tensor(tensor: onnx.TensorProto) -> None:
    name = f"tensor '{tensor.name}'"
    if any(dim < 0 for dim in tensor.dims) or math.prod(tensor.dims) >= 2**62:
        raise MalformedError(f"{name} has an impossible shape: {list(tensor.dims)}")
    try:
        dtype = ir.DataType(tensor.data_type)
        bits = 0 if dtype == ir.DataType.STRING else dtype.bitwidth
    except (TypeError, ValueError):
        raise MalformedError(f"{name} is of the unknown type {tensor.data_type}") from None
    size = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        there, takes, unit = len(tensor.raw_data), math.ceil(size * bits / 8), "bytes"
    else:
        field, per_element = _FIELDS.get(dtype, ("int32_data", 1))
        there, takes, unit = len(getattr(tensor, field)), size * per_element, "elements"
        if bits < 8 and dtype != ir.DataType.STRING:  # several of them in one of int32_data
            return
    if there != takes:
        raise MalformedError(
            f"{name} has {there} {unit}, but its shape {list(tensor.dims)} takes {takes}"
        )
