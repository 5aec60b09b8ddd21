"""Random small graphs full of traps, made quickly from a seed: thousands a minute.

Each graph holds a few streams (a writer, operators that carry or break the stream, readers) in the
many forms that valid models have and exporters seldom write: broadcasts of every rank, free dims of
several names, weights behind operators, dead skips, padded convolutions. :mod:`disguise` then hides
some of it in functions, other domains and bodies. Weights are small integers, and float64 where
there are kernels, so that rounding hides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

Dims = tuple[int | str | None, ...]
"""Numbers, names of free dims, or None for what depends on the sizes of these."""

WIDTH = 4
FREE = ("B", "S", "B2", "S2")
OPSETS = (13, 17, 18, 21)


@dataclass(frozen=True)
class Value:
    """A floating-point value of the graph."""

    name: str
    dims: Dims

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def width(self) -> int | str | None:
        return self.dims[-1] if self.dims else None


@dataclass
class Graph:
    """A graph under construction."""

    rng: np.random.Generator
    dtype: type
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: dict[str, np.ndarray] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    functions: dict[tuple[str, str], onnx.FunctionProto] = field(default_factory=dict)
    dims: dict[str, Dims] = field(default_factory=dict)

    def choose(self, *options):
        return options[self.rng.integers(len(options))]

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    @property
    def element(self) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))

    def input(self, name: str, dims: Dims, element: int | None = None) -> Value:
        kind = self.element if element is None else element
        self.inputs[name] = helper.make_tensor_value_info(name, kind, dims)
        return Value(name, dims)

    def value(self, accept=lambda value: True) -> Value | None:
        """One of the last values that fit."""
        fitting = [value for value in self.values if accept(value)]
        return fitting[-1 - self.rng.integers(min(len(fitting), 4))] if fitting else None

    def add(self, op: str, inputs: list[str], *dims: Dims, domain: str = "", **attributes):
        """A node with an output for each of ``dims``; its value, or a list of them."""
        outputs = [Value(f"v{len(self.nodes)}_{i}", each) for i, each in enumerate(dims)]
        names = [value.name for value in outputs]
        name = f"n{len(self.nodes)}"
        node = helper.make_node(op, inputs, names, name, domain=domain, **attributes)
        self.nodes.append(node)
        self.dims |= {value.name: value.dims for value in outputs}
        return outputs[0] if len(outputs) == 1 else outputs

    def hold(self, array: np.ndarray) -> str:
        name = f"w{len(self.held)}"
        self.held[name] = array
        return name

    def ints(self, *numbers: int) -> str:
        return self.hold(np.array(numbers, np.int64))

    def array(self, *shape: int) -> np.ndarray:
        """Small integers; a square matrix has a determinant of one."""
        array = self.rng.integers(-2, 3, shape)
        if len(shape) > 1 and shape[-1] == shape[-2]:
            eye = np.eye(shape[-1], dtype=int)
            array = np.clip(array, -1, 1)
            array = (np.tril(array, -1) + eye) @ (np.triu(array, 1) + eye)
        return array.astype(self.dtype)

    def weight(self, *shape: int) -> str:
        return self.constant(self.array(*shape))

    def constant(self, array: np.ndarray) -> str:
        """``array`` in one of the ways in which a graph can hold it."""
        old = [
            name
            for name, other in self.held.items()
            if other.shape == array.shape and other.dtype == array.dtype
        ]
        form = self.choose(*FORMS) if self.chance(0.2) else "plain"
        if form == "shared" and old and array.dtype.kind == "f" and array.any():
            return self.choose(*old)
        made = FORMS[form](self, array) if form in FORMS and form != "shared" else None
        return made or self.hold(array)


def _node(g: Graph, array: np.ndarray) -> str:
    if array.ndim == 1 and array.dtype == np.float32 and g.chance():
        return g.add("Constant", [], array.shape, value_floats=array.tolist()).name
    if array.ndim == 0 and array.dtype == np.float32 and g.chance():
        return g.add("Constant", [], (), value_float=float(array)).name
    return g.add("Constant", [], array.shape, value=numpy_helper.from_array(array)).name


def _identity(g: Graph, array: np.ndarray) -> str:
    name = g.hold(array)
    for _ in range(g.rng.integers(1, 4)):
        name = g.add("Identity", [name], array.shape).name
    return name


def _transposed(g: Graph, array: np.ndarray) -> str:
    order = g.rng.permutation(array.ndim).tolist()
    turned = g.hold(np.ascontiguousarray(array.transpose(np.argsort(order))))
    return g.add("Transpose", [turned], array.shape, perm=order).name if order else turned


def _cast(g: Graph, array: np.ndarray) -> str:
    other = np.float32 if array.dtype == np.float64 else np.float64
    return g.add("Cast", [g.hold(array.astype(other))], array.shape, to=g.element).name


def _reshaped(g: Graph, array: np.ndarray) -> str:
    flat = g.hold(array.reshape(-1))
    return g.add("Reshape", [flat, g.ints(*array.shape)], array.shape).name


def _joined(g: Graph, array: np.ndarray) -> str | None:
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    if not axes:
        return None
    axis = g.choose(*axes)
    at = int(g.rng.integers(1, array.shape[axis]))
    parts = [g.hold(part) for part in np.split(array, [at], axis)]
    return g.add("Concat", parts, array.shape, axis=axis).name


def _unsqueezed(g: Graph, array: np.ndarray) -> str | None:
    axes = [axis for axis, size in enumerate(array.shape) if size == 1]
    if not axes:
        return None
    name = g.hold(array.squeeze(axes[0]))
    return g.add("Unsqueeze", [name, g.ints(axes[0])], array.shape).name


def _picked(g: Graph, array: np.ndarray) -> str:
    several = g.hold(np.stack([array + 1, array]))
    index = g.hold(np.array(1, np.int64))
    return g.add("Gather", [several, index], array.shape, axis=0).name


FORMS = {
    "node": _node,
    "Identity": _identity,
    "Transpose": _transposed,
    "Cast": _cast,
    "Reshape": _reshaped,
    "Concat": _joined,
    "Unsqueeze": _unsqueezed,
    "Gather": _picked,
    "shared": None,
}
"""How a graph can hold a constant, beside an initializer of its own."""


def broadcast(*shapes: Dims) -> Dims:
    """Dims of a broadcast; None where these depend on the sizes of free dims."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(dims)) + tuple(dims) for dims in shapes]

    def joined(sizes: tuple) -> int | str | None:
        large = {size for size in sizes if size != 1}
        numbers = [size for size in large if isinstance(size, int)]
        if len(large) > 1 and numbers:
            return numbers[0]
        return large.pop() if len(large) == 1 else 1 if not large else None

    return tuple(joined(sizes) for sizes in zip(*padded, strict=True))


def finished(g: Graph, ends: list[Value]) -> onnx.ModelProto:
    """The model whose outputs are ``ends``."""
    outputs = [
        helper.make_tensor_value_info(
            v.name, g.element, v.dims if g.chance(0.3) else (None,) * v.rank
        )
        for v in ends
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in g.held.items()]
    read = {name for node in g.nodes for name in reads(node)}
    inputs = [value for name, value in g.inputs.items() if name in read]
    graph = helper.make_graph(g.nodes, "traps", inputs, outputs, tensors)
    if g.chance(0.3):
        known = {name: dims for name, dims in g.dims.items() if None not in dims}
        kept = [name for name in known if g.chance(0.3) and name not in {v.name for v in ends}]
        floats = set(kept) & {value.name for value in g.values}
        graph.value_info.extend(
            helper.make_tensor_value_info(name, g.element, known[name]) for name in sorted(floats)
        )
    domains = {"": g.opset, "com.microsoft": 1, "custom": 1}
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*each) for each in domains.items()],
        functions=list(g.functions.values()),
        ir_version=9,
    )


def _stated(g: Graph, v: Value) -> Dims:
    """What an output says of its shape: all that is known, or its rank."""
    return v.dims if g.chance(0.3) else (None,) * v.rank


def reads(node: onnx.NodeProto):
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from reads(inner)
