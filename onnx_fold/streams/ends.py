"""The ends of a stream: layers that write it, layers that read it, constants that enter it.

Each gives its weight as a matrix that has the channels of the stream along one axis, and stores
another one in its place: ``W → W T`` of a writer or a constant, ``R → T⁻¹ R`` of a reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.expression import (
    Expression,
    FoldedTensor,
    broadcast,
    reshape,
    scaled_rows,
    transpose,
)
from onnx_fold.algebra.precision import product_dtype
from onnx_fold.graph.constants import Constant
from onnx_fold.graph.linear import Edge, Linear, label


@dataclass(frozen=True)
class Weight:
    """A constant that an operator reads.

    Attributes:
        node: The operator.
        index: Which input of ``node`` it is.
        weight: What it holds.
    """

    node: ir.Node
    index: int
    weight: Constant

    @property
    def edge(self) -> Edge:
        """The input that holds it."""
        return self.node, self.index

    @property
    def label(self) -> str:
        """The name a person knows it by."""
        return label(self.node, self.weight)


@dataclass(frozen=True, eq=False)
class Gain:
    """Factors by channel that an operator multiplies by, as those behind an RMSNorm.

    Attributes:
        edge: The input of the operator that holds them.
        weight: What it holds.
    """

    edge: Edge
    weight: Constant


@dataclass(frozen=True)
class Writer(Linear):
    """A linear layer that writes the stream: ``W``, ``[num_matrices · in_features, d]``."""


@dataclass(frozen=True)
class Reader(Linear):
    """A linear layer that reads the stream: ``R``, ``[d, num_matrices · out_features]``.

    Attributes:
        gain: The factors that the stream is multiplied by in front of it, if there are any.
    """

    gain: Gain | None = None

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.in_axes, (*self._other_axes, *self.out_axes)

    @property
    def matrix(self) -> Expression:
        """``G R``: what it multiplies the stream by, the gain ``G`` in front of it included."""
        matrix = self.behind_gain
        if self.gain is None:
            return matrix
        return scaled_rows(
            matrix, reshape(self.gain.weight.wide(matrix.dtype), (self.in_features,))
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """What two ends have in common that can share one weight."""
        return *super().identity, self.gain

    @property
    def behind_gain(self) -> Expression:
        """``R``: what it multiplies by what is behind the gain."""
        return super().matrix


@dataclass(frozen=True)
class ConstantWriter(Weight):
    """A constant that enters the stream: a bias, an embedding or position table, a class token.

    Attributes:
        axis: Its channel axis, from the end.
        width: Width of the stream; the constant may be broadcast to it.
    """

    axis: int
    width: int

    @property
    def is_table(self) -> bool:
        """Whether it differs from position to position: rows to be looked up, an embedding."""
        dims = self.weight.shape
        return self.weight.size > (dims[self.axis] if -self.axis <= len(dims) else 1)

    @property
    def is_uniform(self) -> bool:
        """Whether every channel gets the same number, so that their order is of no matter."""
        dims = self.weight.shape
        return -self.axis > len(dims) or dims[self.axis] == 1

    def is_zero(self) -> bool:
        """Whether it adds nothing in any basis."""
        return not self.is_table and not self.weight.numpy().any()

    @property
    def matrix(self) -> Expression:
        """Its rows, ``[n, d]``, in the type of products."""
        rows = self.unpack(self.weight.wide(product_dtype(self.weight.dtype)))
        return broadcast(rows, (rows.shape[0], self.width))

    @property
    def identity(self) -> tuple[object, ...]:
        """What two ends have in common that can share one weight."""
        return type(self), self.weight.leaf, self.weight.permutation, self.axis, self.width

    def unpack(self, stored: Expression) -> Expression:
        """Its rows when it holds ``stored``."""
        if not self.is_table:
            return reshape(stored, (1, -1))
        dims = list(self._dims)
        dims[self.axis] = -1
        last = transpose(reshape(stored, dims), self._order)
        return reshape(last, (-1, last.shape[-1]))

    def store(self, matrix: Expression) -> FoldedTensor:
        """The constant whose rows are ``matrix``."""
        dims = [self._dims[axis] for axis in self._order[:-1]]
        order = [self._order.index(axis) for axis in range(len(self._order))]
        values = transpose(reshape(matrix, (*dims, matrix.shape[-1])), order)
        return FoldedTensor(values, self.weight.dtype)

    @property
    def _dims(self) -> tuple[int, ...]:
        """Its dimensions, with those in front that make room for the channel axis."""
        dims = self.weight.shape
        return (*[1] * (-self.axis - len(dims)), *dims)

    @property
    def _order(self) -> tuple[int, ...]:
        """Its axes, that of the channels last."""
        rank = len(self._dims)
        return (*(axis for axis in range(rank) if axis != rank + self.axis), rank + self.axis)


End: TypeAlias = Writer | Reader | ConstantWriter


@dataclass
class Activations:
    """Rows of the values that linear layers read, ``[n, width]`` float64, by value name."""

    rows: dict[str, Array] = field(default_factory=dict)

    def of(self, layer: Linear) -> Array | None:
        """The rows that ``layer`` reads, or None if they were not recorded or are out of date."""
        return self.rows.get(layer.x.name or "")

    def forget(self, values: Iterable[ir.Value]) -> None:
        """Drop what no longer holds: the channels of ``values`` mean something else now."""
        for value in values:
            self.rows.pop(value.name or "", None)
