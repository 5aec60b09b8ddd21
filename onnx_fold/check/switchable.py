"""A model that can be told its inner values, and that its weights are rounded anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import FRACTION_BITS, smallest_number
from onnx_fold.graph.widen import widen
from onnx_fold.runtime.generate import Function
from onnx_fold.runtime.inputs import Arrays

__all__ = ["Switchable", "rounded_anew"]


class Switchable:
    """A model that returns the values ``names``, and can be given others to go on with.

    Args:
        model: The model.
        names: Values that are returned.
        to: The type of its floats.
        engine: Makes a function of a model.
        moved: Weights that are rounded anew when a draw is asked for.
        kept: Of how many draws the weights are kept, for the next run.

    Attributes:
        to: The type of its floats.
    """

    def __init__(
        self,
        model: ir.Model,
        names: Sequence[str],
        to: ir.DataType,
        engine: Callable[[ir.Model], Function],
        moved: Sequence[str] = (),
        kept: int = 0,
    ) -> None:
        self._names, self.to = names, to
        stored = {n: model.graph.initializers[n].const_value for n in moved}
        self._stored = {n: tensor for n, tensor in stored.items() if tensor is not None}
        wide = widen(model, to)
        _open(wide, names, to)
        for name in self._stored:
            value = wide.graph.initializers.pop(name)
            value.const_value = None
            wide.graph.inputs.append(value)
        self._kept = kept
        self._weights: dict[int | None, Arrays] = {}
        self._function = engine(wide)

    def __call__(
        self, feed: Arrays, given: Mapping[str, Array] | None = None, draw: int | None = None
    ) -> Arrays:
        """Run on ``feed``, with values ``given`` by name, and weights rounded anew."""
        kind, given = self.to.numpy(), given or {}
        inputs = {**feed, **self._weights_of(draw)}
        for name in self._names:
            inputs[f"{name}/is_own"] = np.array(name not in given)
            inputs[f"{name}/given"] = np.asarray(given.get(name, 0.0), kind)
        return self._function(inputs)

    def _weights_of(self, draw: int | None) -> Arrays:
        if draw in self._weights:
            return self._weights[draw]
        generator = None if draw is None else np.random.default_rng(draw)
        weights = {
            name: rounded_anew(tensor, self.to, generator) for name, tensor in self._stored.items()
        }
        if draw is None or draw < self._kept:
            self._weights[draw] = weights
        return weights


def rounded_anew(
    tensor: ir.TensorProtocol, to: ir.DataType, generator: np.random.Generator | None
) -> Array:
    """Return the weight in the type ``to``, moved by half a unit in the last place, or as it is."""
    stored = tensor.numpy()
    weight: Array = stored.astype(to.numpy())
    if generator is None:
        return weight
    exponents = np.frexp(stored.astype(np.float32) if tensor.dtype.itemsize < 4 else stored)[1]
    bits = FRACTION_BITS[tensor.dtype]
    units = np.maximum(exponents - bits, np.frexp(smallest_number(stored.dtype))[1] - 1)
    half = np.ldexp(weight.dtype.type(0.5), units)
    sign = generator.integers(0, 2, weight.shape, np.int8) * np.int8(2) - np.int8(1)
    digits = np.ldexp(weight, bits // 2 - exponents)
    is_exact = (weight == 0) | _are_exact(digits == np.rint(digits))
    moved: Array = np.where(is_exact, weight, weight + half * sign)
    return moved.astype(weight.dtype)


def _are_exact(is_short: Array) -> Array:
    """The elements that were not rounded, by those that need few digits.

    One element in many needs few by chance, and a kernel of one channel may hang on it.
    """
    rows = is_short.reshape(len(is_short) if is_short.ndim > 1 else 1, -1)
    found = np.full(rows.shape, rows.all())
    if rows.shape[1] > 1:
        found |= rows.all(axis=1, keepdims=True)
    if rows.shape[0] > 1:
        found |= rows.all(axis=0, keepdims=True)
    return found.reshape(is_short.shape)


def _open(model: ir.Model, names: Iterable[str], to: ir.DataType) -> None:
    """Return the values ``names``, each of which goes on only where its own switch is on."""
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    for name in names:
        value = values[name]
        node = value.producer()
        assert node is not None
        is_own = ir.Value(
            name=f"{name}/is_own", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
        )
        given = ir.Value(name=f"{name}/given", type=ir.TensorType(to))
        switch = ir.node("Where", [is_own, value, given])
        used = switch.outputs[0]
        used.name, used.type = f"{name}/used", ir.TensorType(to)
        graph.insert_after(node, switch)
        ir.convenience.replace_all_uses_with(value, used)
        switch.replace_input_with(1, value)
        graph.inputs.extend([is_own, given])
        graph.outputs.append(value)
