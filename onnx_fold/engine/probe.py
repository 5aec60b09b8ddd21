"""The error of a fold, predicted: random rows go through the layers as they are, and as planned.

The planned ones are what the change itself says, with its weights as they would be stored. Whatever
a pass states, its steps are run here, so there is no formula of its own for any of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import HOST, Array, Device, Indices
from onnx_fold.algebra.expression import (
    Expression,
    evaluate,
    sample,
    take,
)
from onnx_fold.engine.rows import Known, Planned, Rows, holding, times
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.branches import Branches
from onnx_fold.streams.ends import Reader, Writer
from onnx_fold.streams.fixed import RowLayer
from onnx_fold.streams.joined import Divided, Joined
from onnx_fold.streams.stream import Stream

Subject: TypeAlias = Stream | Branches | Joined | Divided | RowLayer
"""What a pass is asked about."""


def probe(
    subject: Subject,
    rewrite: Rewrite,
    rows: int = 32,
    device: Device = HOST,
    given: Mapping[Expression, Any] = MappingProxyType({}),
) -> tuple[float, float]:
    """Predict the relative error of a change, for values and weights stored as they are.

    Random rows ``h ~ N(0, 1)``, or recorded ones, are what the writers of a stream read; those that
    read one value read the same. The reference is ``y = (Σ h W) R``, in float64, or in float32 for
    16-bit weights. The changed side has its weights as they would be stored; on both sides the
    stream's value and the result are rounded to the storage type. Of wide layers only some channels
    of ``h`` are not zero, and only some columns of ``y`` are looked at. A probe, not a bound.

    Args:
        subject: A stream, branches, channels side by side or apart, or a layer that reads rows.
        rewrite: The change.
        rows: How many rows of ``h`` to draw.
        device: Where to evaluate.
        given: Values on the device that are known already.

    Returns:
        The largest ``‖y' - y‖ / ‖y‖`` (Frobenius) of all readers for the changed layers, and the
        same for the original ones. The first is infinite if a new weight is not finite.
    """
    run = _Run(rewrite, subject.dtype, rows, device, given)
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(subject, Branches):
            return run.branches(subject)
        if isinstance(subject, RowLayer):
            return run.rows(subject)
        if isinstance(subject, Divided):
            return run.divided(subject)
        return run.joined(subject) if isinstance(subject, Joined) else run.stream(subject)


class _Run:
    """A subject as it is, and with one change, run on rows of numbers."""

    def __init__(
        self,
        rewrite: Rewrite,
        dtype: ir.DataType,
        count: int,
        device: Device,
        given: Mapping[Expression, Any],
    ) -> None:
        self._rewrite = rewrite
        self._narrow = dtype.numpy()
        self._count = count
        self._planned = Planned(rewrite, device, given)
        self._generator = np.random.default_rng(0)
        self._drawn: dict[tuple[ir.Value, int], Rows] = {}

    def stream(self, stream: Stream) -> tuple[float, float]:
        x, x_new = self._written(stream)
        errors = []
        for reader in stream.readers:
            columns = sample(reader.matrix, 1, self._generator)
            read, read_own, read_new = (
                rows - rows.mean(axis=1, keepdims=True) if reader.x in stream.centred else rows
                for rows in (x, self._rounded(x), self._rounded(x_new))
            )
            known = {reader.x: Rows.of(read_new)}
            errors.append(self._read(reader, read, read_own, known, columns))
        if not errors:
            errors.append(self._errors(x, x, x_new))
        return _worst(errors)

    def joined(self, joined: Joined) -> tuple[float, float]:
        before: list[Array] = []
        known: dict[ir.Value, Rows] = {}
        for part in joined.parts:
            if part.stream is None:
                x = x_new = self._generator.standard_normal((self._count, len(part.rows)))
            else:
                x, x_new = self._written(part.stream)
            before.append(x)
            known[part.value] = Rows.of(self._rounded(x_new))
        x, reader = np.concatenate(before, axis=1), joined.reader
        columns = sample(reader.matrix, 1, self._generator)
        return self._read(reader, x, self._rounded(x), known, columns)

    def divided(self, divided: Divided) -> tuple[float, float]:
        x, x_new = self._written(divided.stream)
        added, added_new = self._written(divided.behind)
        x = x[:, divided.piece.columns] + added
        known: dict[ir.Value, Rows] = {divided.value: Rows.of(self._rounded(x_new))}
        piece = self._planned.made(divided.piece.value, None, known)
        errors = []
        for reader in divided.behind.readers:
            if piece is not None:
                known[reader.x] = Rows.of(self._rounded(piece.dense + added_new))
            columns = sample(reader.matrix, 1, self._generator)
            errors.append(self._read(reader, x, self._rounded(x), known, columns))
        return _worst(errors)

    def branches(self, branches: Branches) -> tuple[float, float]:
        matrix = branches.map.matrix
        x = self._draw(branches.source, matrix, None)
        y = self._planned.product(x, matrix).numbers
        made = self._rewrite.replaced[branches.result]
        y_new = self._planned.made(made, None, {branches.source: x})
        return self._errors(y, y, np.zeros_like(y) if y_new is None else y_new.dense)

    def rows(self, layer: RowLayer) -> tuple[float, float]:
        """What is stored is rounded once, as the last of its layers would round it."""
        numbers = layer.rows.numbers
        picked = self._generator.integers(0, numbers.shape[0], self._count)
        y = self._planned.evaluated(take(numbers, picked, 0)).astype(np.float64)
        return self._errors(y, y, y)

    def _written(self, stream: Stream) -> tuple[Array, Array]:
        """The value of ``stream``, ``[rows, d]``, before and after the change."""
        x: Array = np.zeros(())
        x_new: Array = np.zeros(())
        for writer in stream.writers:
            h = self._draw(writer.x, writer.matrix, stream.rows_of(writer))
            known = {writer.x: self._in_order(writer, h)}
            x = x + self._planned.product(h, writer.matrix).numbers
            x_new = x_new + self._planned.output(writer, known).dense
        stored, replaced = self._rewrite.stored, self._rewrite.replaced
        biases = {writer.bias: writer for writer in stream.writers if writer.bias is not None}
        is_carried = any(reader.edge in stored for reader in stream.readers)  # behind the readers
        for added in stream.constants:
            tensor, layer = stored.get(added.edge), biases.get(added.edge)
            if added.is_zero() or (tensor is None and is_carried):
                continue
            picked = self._generator.integers(0, added.matrix.shape[0], self._count)
            beta = 1.0 if layer is None else layer.beta
            x = x + beta * self._planned.evaluated(take(added.matrix, picked, 0))
            if layer is not None and layer.y in replaced:
                beta = 1.0  # what is added behind the layer holds it
            if tensor is not None or added.node.outputs[0] not in replaced:
                rows = take(holding(added, tensor), picked, 0)
                x_new = x_new + beta * self._planned.evaluated(rows)
        return x, x_new

    def _draw(self, value: ir.Value, matrix: Expression, seen: Array | None) -> Rows:
        """Rows for a layer; the fewer of the channels are picked, the larger they are."""
        width = matrix.shape[0]
        if (value, width) not in self._drawn:
            picked = sample(matrix, 0, self._generator)
            count = width if picked is None else len(picked)
            if seen is None:
                h: Array = self._generator.standard_normal((self._count, count))
            else:
                h = seen[self._generator.integers(0, len(seen), self._count)]
                h = h if picked is None else h[:, picked]
            h = self._rounded(h * math.sqrt(width / count))
            self._drawn[value, width] = Rows(h, width, picked)
        return self._drawn[value, width]

    def _in_order(self, writer: Writer, h: Rows) -> Rows:
        order = self._rewrite.reordered.get(writer.x)
        return h if order is None else h.pick(evaluate(order))

    def _read(
        self, reader: Reader, x: Array, x_own: Array, known: Known, columns: Indices | None
    ) -> tuple[float, float]:
        """The error of what ``reader`` writes, after the change and before."""
        before = reader.matrix if columns is None else take(reader.matrix, columns, 1)
        matrix = self._planned.evaluated(before)
        y, y_own = (times(rows, matrix) for rows in (x, x_own))
        order = self._rewrite.reordered.get(reader.y)
        if order is not None:
            places = np.argsort(evaluate(order))
            columns = places if columns is None else places[columns]
        return self._errors(y, y_own, self._planned.output(reader, known, columns).dense)

    def _errors(self, y: Array, y_own: Array, y_new: Array) -> tuple[float, float]:
        return _relative(self._rounded(y_new), y), _relative(self._rounded(y_own), y)

    def _rounded(self, array: Array) -> Array:
        return array.astype(self._narrow).astype(np.float64)


def _worst(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max(new for new, _ in errors), max(own for _, own in errors)


def _relative(approximate: Array, exact: Array) -> float:
    if not np.isfinite(approximate).all():
        return float("inf")
    error, norm = np.linalg.norm(approximate - exact), np.linalg.norm(exact)
    if error == 0.0:
        return 0.0
    return float(error / norm) if norm > 0.0 else float("inf")
