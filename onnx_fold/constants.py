"""Constant values of a graph, seen through the operators that exporters leave on top of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.device import Array
from onnx_fold.expression import Expression, cast, evaluate, of_tensor, transpose

FLOATS = frozenset(
    (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
)
"""Storage types that can be folded."""


@dataclass(frozen=True)
class Constant:
    """A value that is the same in every run: ``leaf`` seen through Identity, Cast and Transpose.

    Attributes:
        value: What the reading node has as its input.
        leaf: The initializer, or output of a Constant node, that holds the data.
        tensor: The data of ``leaf``.
        dtype: Type of ``value``.
        permutation: Axes of ``leaf`` in the order that ``value`` has them.
    """

    value: ir.Value
    leaf: ir.Value
    tensor: ir.TensorProtocol
    dtype: ir.DataType
    permutation: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``value``."""
        dims = self.tensor.shape.numpy()
        return tuple(dims[axis] for axis in self.permutation)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensor.size

    @property
    def is_vector(self) -> bool:
        """Whether all elements lie along the last axis."""
        return self.shape[-1:] == (self.size,)

    def numpy(self) -> Array:
        """The stored values, in the shape of ``value`` and the type of ``leaf``."""
        return self.tensor.numpy().transpose(self.permutation)

    @property
    def values(self) -> Expression:
        """The values, in the shape of ``value``; a weight folded before is not rounded first."""
        return transpose(of_tensor(self.tensor), self.permutation)

    def wide(self, dtype: npt.DTypeLike = np.float64) -> Expression:
        """The values as ``dtype``."""
        return cast(self.values, dtype)


def constant(value: ir.Value | None) -> Constant | None:
    """Return what ``value`` holds if it is the same in every run, else None.

    An initializer that is also a graph input can be overridden by the caller: it is no constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        if value.is_graph_input() or value.const_value is None:
            return None
        return _leaf(value, value.const_value)
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Constant":
        attribute = next(iter(node.attributes.values()))
        if attribute.type == ir.AttributeType.TENSOR:
            return _leaf(value, attribute.as_tensor())
        if attribute.name.startswith(("value_float", "value_int")):
            kind = np.float32 if "float" in attribute.name else np.int64
            return _leaf(value, ir.tensor(np.asarray(attribute.value, dtype=kind)))
        return None
    if node.op_type not in ("Identity", "Cast", "Transpose"):
        return None
    base = constant(node.inputs[0])
    if base is None:
        return None
    dtype, permutation = base.dtype, base.permutation
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int())
        if dtype != base.dtype:  # the stored type would change: not the view of a weight
            return None
    if node.op_type == "Transpose":
        rank = len(permutation)
        perm = node.attributes.get("perm")
        order = tuple(perm.as_ints()) if perm is not None else tuple(reversed(range(rank)))
        permutation = tuple(permutation[axis] for axis in order)
    return Constant(value, base.leaf, base.tensor, dtype, permutation)


def _leaf(value: ir.Value, tensor: ir.TensorProtocol) -> Constant:
    return Constant(value, value, tensor, tensor.dtype, tuple(range(len(tensor.shape))))


def scalar(value: ir.Value | None) -> float | None:
    """The number that ``value`` holds, if it is a constant with one element."""
    found = constant(value)
    return float(evaluate(found.wide()).item()) if found is not None and found.size == 1 else None


def axes_of(
    node: ir.Node, read: Callable[[ir.Value | None], Sequence[int] | None] | None = None
) -> Sequence[int] | None:
    """The axes that ``node`` names: an attribute, or its second input, as ``read`` gives it."""
    given = node.attributes.get_ints("axes")
    if given or len(node.inputs) < 2:
        return given
    return (read or integers)(node.inputs[1])


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers that ``value`` holds, if it is a constant of an integer type."""
    found = constant(value)
    if found is None or found.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return tuple(int(i) for i in found.numpy().reshape(-1))
