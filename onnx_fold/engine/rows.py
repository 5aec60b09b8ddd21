"""Planned changes, run on rows of numbers: what takes the place of a value, before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Array, Device, Indices
from onnx_fold.algebra.expression import (
    Expression,
    FoldedTensor,
    cast,
    evaluate,
    of_tensor,
    reshape,
    take,
    transpose,
)
from onnx_fold.algebra.precision import product_dtype
from onnx_fold.graph.linear import Linear
from onnx_fold.rewriting.record import Held, Made, Operand, Present, Step, widths
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.ends import End
from onnx_fold.streams.maps import transposed


@dataclass(frozen=True)
class Rows:
    """Rows of a value, of which only some channels are not zero.

    Attributes:
        numbers: ``[rows, channels]``, float64.
        width: How many channels the value has.
        channels: Which of them ``numbers`` holds; None for all.
    """

    numbers: Array
    width: int
    channels: Indices | None = None

    def pick(self, columns: Indices) -> Rows:
        """The channels ``columns``, in that order; those beyond the width are zero."""
        if self.channels is None and columns.max(initial=0) < self.width:
            return Rows(self.numbers[:, columns], len(columns))
        place = np.full(max(self.width, columns.max(initial=0) + 1), -1)
        place[slice(self.width) if self.channels is None else self.channels] = np.arange(
            self.numbers.shape[1]
        )
        found = place[columns]
        (channels,) = np.nonzero(found >= 0)
        return Rows(self.numbers[:, found[channels]], len(columns), channels)

    @classmethod
    def of(cls, numbers: Array) -> Rows:
        """Rows of which all channels may be other than zero."""
        return cls(numbers, numbers.shape[1])

    @property
    def dense(self) -> Array:
        """All channels."""
        if self.channels is None:
            return self.numbers
        placed = np.zeros((len(self.numbers), self.width))
        placed[:, self.channels] = self.numbers
        return placed


@dataclass(frozen=True)
class Product:
    """``x W``, of which only the columns that are asked for are computed."""

    x: Rows
    matrix: Expression


Known: TypeAlias = Mapping[ir.Value, Rows | Product | None]
"""What some values are; None of what no known value makes."""


class Planned:
    """A change that is not made yet, run on rows.

    Weights are as they would be stored; what new operators pass on to each other is not rounded.
    """

    def __init__(self, rewrite: Rewrite, device: Device, given: Mapping[Expression, Any]) -> None:
        """Run ``rewrite`` on ``device``, where the values of some expressions are ``given``."""
        self._rewrite = rewrite
        self._where = device, given
        self._widths = widths([each for each in rewrite.recorded if isinstance(each, Step)])

    def output(self, layer: Linear, known: Known, columns: Indices | None = None) -> Rows:
        """What stands in the place of the output of ``layer``, which reads what is ``known``."""
        rewrite = self._rewrite
        operand = rewrite.parted.get(layer.y, rewrite.replaced.get(layer.y, layer.y))
        x = known.get(layer.x)
        if isinstance(x, Rows):
            matrix = holding(layer, rewrite.stored.get(layer.edge))
            known = {**known, layer.y: Product(x, matrix)}
        made = self.made(operand, columns, known)
        if made is None:
            raise CannotRewriteError(f"nothing takes the place of what {layer.label} writes")
        return made

    def made(self, operand: Operand, columns: Indices | None, known: Known) -> Rows | None:
        """The rows of ``operand``, or some of its ``columns``; None if nothing known makes it."""
        if isinstance(operand, Made):
            return self._step(operand, columns, known)
        if isinstance(operand, Held | Present):
            return None
        if operand not in known:
            instead = self._rewrite.replaced.get(operand)
            return (
                None if instead is None else self.made(instead, columns, {**known, operand: None})
            )
        found = known[operand]
        if isinstance(found, Product):
            return self.product(found.x, found.matrix, columns)
        return found if found is None or columns is None else found.pick(columns)

    def _step(self, made: Made, columns: Indices | None, known: Known) -> Rows | None:
        """The rows of one output of a step, as :meth:`made` gives them."""
        step = made.step
        x = step.inputs[0]
        assert x is not None
        if step.operator in _FACTORS and isinstance(step.inputs[1], Held):
            rows = self.made(x, None, known)
            return None if rows is None else self.product(rows, _factor(step), columns)
        match step.operator:
            case "Add" | "Sub" | "Sum":
                return self._sum(step, columns, known)
            case "Concat":
                return self._joined(step, columns, known)
            case "Split" | "Slice":
                start, size = _range(made)
                places = np.arange(size) if columns is None else columns
                return self.made(x, start + places, known)
            case "Gather":
                order = _integers(step.inputs[1])
                return self.made(x, order if columns is None else order[columns], known)
            case "Pad":
                rows = self.made(x, None, known)
                places = np.arange(step.sizes[0]) if columns is None else columns
                return None if rows is None else rows.pick(places)
            case "Reshape" | "Identity":
                return self.made(x, columns, known)
            case "Neg":
                rows = self.made(x, columns, known)
                return None if rows is None else replace(rows, numbers=-rows.numbers)
        raise CannotRewriteError(f"what a new {step.operator} does to the error is not known")

    def _sum(self, step: Step, columns: Indices | None, known: Known) -> Rows | None:
        """A sum of what is known; biases and other terms are the same before and after."""
        terms = [None if each is None else self.made(each, columns, known) for each in step.inputs]
        if step.operator == "Sub" and terms[1] is not None:
            terms[1] = replace(terms[1], numbers=-terms[1].numbers)
        found = [rows.dense for rows in terms if rows is not None]
        return Rows.of(sum(found[1:], start=found[0])) if found else None

    def _joined(self, step: Step, columns: Indices | None, known: Known) -> Rows | None:
        """Channels side by side; of each operand only the ``columns`` that are its own are made."""
        sizes = [self._width(operand, known) for operand in step.inputs if operand is not None]
        columns = np.arange(sum(sizes)) if columns is None else columns
        places, parts, start = list[Indices](), list[Array](), 0
        for operand, size in zip(step.inputs, sizes, strict=True):
            (own,) = np.nonzero((start <= columns) & (columns < start + size))
            rows = None if operand is None else self.made(operand, columns[own] - start, known)
            if rows is None:
                return None
            places.append(own)
            parts.append(rows.dense)
            start += size
        order = np.argsort(np.concatenate(places))
        return Rows.of(np.concatenate(parts, axis=1)[:, order])

    def _width(self, operand: Operand, known: Known) -> int:
        """The channels of ``operand``."""
        found = known.get(operand) if isinstance(operand, ir.Value) else None
        if isinstance(found, Product):
            return found.matrix.shape[1]
        if operand in self._widths:
            return self._widths[operand]
        rows = found or self.made(operand, None, known)
        return 0 if rows is None else rows.width

    def product(self, x: Rows, matrix: Expression, columns: Indices | None = None) -> Rows:
        """``x W``, in the type of ``W``; only the rows of ``W`` are read that meet a number."""
        width = matrix.shape[1]
        if x.channels is not None:
            matrix = take(matrix, x.channels, 0)
        if columns is not None:
            matrix, width = take(matrix, columns, 1), len(columns)
        return Rows(times(x.numbers, self.evaluated(matrix)), width)

    def evaluated(self, expression: Expression) -> Array:
        """The values of ``expression``."""
        return evaluate(expression, *self._where)


_FACTORS = ("MatMul", "Conv", "ConvTranspose", "Mul")
"""Operators that multiply what they read by a new weight."""


def _factor(step: Step) -> Expression:
    """What a step multiplies the rows by, ``[in, out]``: rows of windows, for a Conv."""
    held = step.inputs[1]
    assert isinstance(held, Held)
    assert not isinstance(held.content, Expression)
    stored = _wide(held.content)
    if step.operator == "ConvTranspose":
        groups = step.attributes["group"]
        assert isinstance(groups, int)
        stored = transposed(stored, groups)
    if step.operator in ("Conv", "ConvTranspose"):
        return transpose(reshape(stored, (stored.shape[0], -1)))
    return stored if step.operator == "MatMul" else reshape(stored, (1, -1))


def _range(made: Made) -> tuple[int, int]:
    """The first of the channels that a Split or a Slice gives, and how many."""
    step = made.step
    if step.operator == "Split":
        return sum(step.sizes[: made.index]), step.sizes[made.index]
    start, stop = (int(_integers(bound)[0]) for bound in step.inputs[1:3])
    return start, stop - start


def _integers(operand: Operand | None) -> Indices:
    """The numbers of a new initializer of integers."""
    assert isinstance(operand, Held)
    content = operand.content
    found: Indices = evaluate(content) if isinstance(content, Expression) else content.numpy()
    return found


def holding(end: End | Linear, tensor: ir.TensorProtocol | None) -> Expression:
    """The matrix of ``end`` once it stores ``tensor``, rounding included; as it is without one."""
    return end.matrix if tensor is None else end.unpack(_wide(tensor))


def _wide(tensor: ir.TensorProtocol) -> Expression:
    """What is stored, in the type in which its products accumulate."""
    stored = tensor.rounded if isinstance(tensor, FoldedTensor) else of_tensor(tensor)
    return cast(stored, product_dtype(tensor.dtype))


def times(x: Array, w: Array) -> Array:
    """``x w`` in the type of ``w``, as float64."""
    product: Array = x.astype(w.dtype) @ w
    return product.astype(np.float64)
