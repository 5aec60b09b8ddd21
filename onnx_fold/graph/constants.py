"""Constant values of a graph, seen through the operators that exporters leave on top of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.expression import Expression, cast, evaluate, of_tensor, transpose
from onnx_fold.graph.operators import operator

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


_VIEWS = frozenset(("Identity", "Cast", "Transpose"))


def constant(value: ir.Value | None) -> Constant | None:
    """Return what ``value`` holds if it is the same in every run, else None.

    An initializer that is also a graph input can be overridden by the caller: it is no constant.
    """
    if value is None:
        return None
    leaf, views = value, []
    while (node := leaf.producer()) is not None and operator(node) in _VIEWS:
        source = node.inputs[0]
        if source is None:
            return None
        views.append(node)
        leaf = source
    tensor = _tensor(leaf)
    if tensor is None:
        return None
    order = tuple(range(len(tensor.shape)))
    for node in reversed(views):
        if operator(node) == "Cast":
            if node.attributes.get_int("to", 0) != tensor.dtype:
                return None  # the stored type would change: not the view of a weight
        elif operator(node) == "Transpose":
            perm = node.attributes.get_ints("perm", tuple(reversed(range(len(order)))))
            order = tuple(order[axis] for axis in perm)
    return Constant(value, leaf, tensor, tensor.dtype, order)


def _tensor(leaf: ir.Value) -> ir.TensorProtocol | None:
    """The data of an initializer, or of what a Constant node makes."""
    if leaf.is_initializer():
        return None if leaf.is_graph_input() else leaf.const_value
    node = leaf.producer()
    if node is None or operator(node) != "Constant" or not node.attributes:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    if attribute.name.startswith(("value_float", "value_int")):
        kind = np.float32 if "float" in attribute.name else np.int64
        return ir.tensor(np.asarray(attribute.value, dtype=kind))
    return None


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
