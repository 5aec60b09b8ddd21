"""The same model in a wider float type: a reference to judge rounding errors against.

Widening changes types, never values: a float16 weight ``w`` becomes the float32 number that is
exactly ``w``. With ``rounded=True`` every operator's result is afterwards rounded to the type that
it had before,

    y = round_to(type(y), op(x)),

which is what hardware with 16-bit storage and float32 accumulation computes, and can be run by a
provider that has no kernels for the type.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_fold.algebra.precision import FRACTION_BITS, SIXTEEN_BITS
from onnx_fold.errors import UsageError
from onnx_fold.graph.inline import inline_all

__all__ = ["precision", "widen"]


_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "softmax_precision"}
)

# fmt: off
_EXACT = frozenset({
    "Constant", "ConstantOfShape", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "If", "Loop", "Max", "Min", "Neg", "Relu", "Reshape",
    "Scan", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
    "Where",
})
# fmt: on
"""Operators whose results are values that they were given: rounding them again changes nothing."""


def precision(model: ir.Model) -> ir.DataType:
    """Return the float type of most weight bytes; without weights that of an input or output."""
    held = dict.fromkeys(FRACTION_BITS, 0)
    for tensor in _constants(model):
        if tensor.dtype in held:
            held[tensor.dtype] += tensor.nbytes
    dtype = max(held, key=lambda dtype: held[dtype])
    if held[dtype]:
        return dtype
    ends = (value.dtype for value in (*model.graph.inputs, *model.graph.outputs))
    return next((dtype for dtype in ends if dtype in held), ir.DataType.FLOAT)


def widen(model: ir.Model, to: ir.DataType, *, rounded: bool = False) -> ir.Model:
    """Return a copy of ``model`` with every float type narrower than ``to`` replaced by ``to``.

    Initializers, tensor attributes, ``Cast`` targets, inputs, outputs and value types are widened,
    in all subgraphs; functions are inlined. Weights are converted when they are read, so that the
    copy holds none of its own. ``model`` is not changed.

    Args:
        model: The model to copy.
        to: ``FLOAT`` (from float16 and bfloat16) or ``DOUBLE`` (from these and float32).
        rounded: Round the result of every operator to the 16-bit type that it had in ``model``;
            inputs, weights and outputs are then values of that type.

    Raises:
        UsageError: A function cannot be inlined.
        ValueError: ``to`` is neither ``FLOAT`` nor ``DOUBLE``.
    """
    if to not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        raise ValueError(f"cannot widen to {to}: expected FLOAT or DOUBLE")
    narrow = SIXTEEN_BITS if to == ir.DataType.FLOAT else SIXTEEN_BITS | {ir.DataType.FLOAT}
    copy = model.clone()
    inline_all(copy)
    if copy.functions:
        raise UsageError(f"function '{next(iter(copy.functions))[1]}' cannot be inlined")
    results = _rounded_results(copy) if rounded else []
    for value in _values(copy):
        _widen_value(value, narrow, to)
    for node in copy.graph.all_nodes():
        _widen_attributes(node, narrow, to)
    for value, dtype in results:
        _round(value, dtype, to)
    return copy


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.as_tensor()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _widen_value(value: ir.Value, narrow: frozenset[ir.DataType], to: ir.DataType) -> None:
    value.type = _wide_type(value.type, narrow, to)
    if value.const_value is not None and value.const_value.dtype in narrow:
        value.const_value = _wide_tensor(value.const_value, to)


def _wide_type(
    type_: ir.TypeProtocol | None, narrow: frozenset[ir.DataType], to: ir.DataType
) -> ir.TypeProtocol | None:
    """Return a new type: a type object may be shared with the model that was copied."""
    if isinstance(type_, ir.SequenceType | ir.OptionalType):
        element = _wide_type(type_.elem_type, narrow, to)
        return type_ if element is None else type(type_)(element)
    if isinstance(type_, ir.TensorType | ir.SparseTensorType) and type_.dtype in narrow:
        return type(type_)(to)
    return type_


def _wide_tensor(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.TensorProtocol:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(functools.partial(_convert, tensor, to), to, shape, name=tensor.name)


def _convert(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.TensorProtocol:
    wide = ir.tensor(tensor.numpy().astype(to.numpy()), dtype=to, name=tensor.name)
    if isinstance(tensor, ir.ExternalTensor):  # or all of its file stays mapped
        with contextlib.suppress(BufferError):  # an array of it is in use
            tensor.release()
    return wide


def _widen_attributes(node: ir.Node, narrow: frozenset[ir.DataType], to: ir.DataType) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in narrow:
            node.attributes.add(ir.AttrTensor(name, _wide_tensor(attribute.as_tensor(), to)))
        elif name in _TYPE_ATTRIBUTES and attribute.value in narrow:
            node.attributes.add(ir.AttrInt64(name, to))
        elif node.op_type == "Constant" and name in ("value_float", "value_floats"):
            node.attributes.pop(name)
            node.attributes.add(ir.AttrTensor("value", ir.tensor(attribute.value, dtype=to)))


def _rounded_results(model: ir.Model) -> list[tuple[ir.Value, ir.DataType]]:
    """Return the values of a 16-bit type that their node may have rounded, with that type."""
    results = [value for node in model.graph.all_nodes() for value in node.outputs]
    if any(value.dtype is None for value in results):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    return [
        (value, value.dtype)
        for value in results
        if value.dtype in SIXTEEN_BITS and value.name and not _is_exact(value.producer())
    ]


def _is_exact(node: ir.Node | None) -> bool:
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in _EXACT


def _round(value: ir.Value, dtype: ir.DataType, to: ir.DataType) -> None:
    """Replace uses of ``value`` by ``Cast(Cast(value, dtype), to)``; an output keeps its name."""
    node = value.producer()
    assert node is not None
    assert node.graph is not None
    narrowed = ir.node("Cast", [value], {"to": dtype})
    widened = ir.node("Cast", narrowed.outputs, {"to": to})
    result = widened.outputs[0]
    result.name, value.name = value.name, f"{value.name}/unrounded"
    result.type, result.shape = value.type, value.shape
    narrowed.outputs[0].name = f"{result.name}/rounded"
    node.graph.insert_after(node, [narrowed, widened])
    ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
    narrowed.replace_input_with(0, value)
