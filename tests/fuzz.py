"""Random models for the fuzzer: streams in every idiom, with traps in their way.

A model grows step by step. Each step reads values that are there already and adds its own; which
step, on which values, with which weights and attributes is drawn by hypothesis, so that a failure
shrinks to the few operators that matter. All sizes are known here; the graph may hide them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import helper, numpy_helper

BATCH, SEQ, ROWS = 2, 3, 5
MAX_WIDTH = 6
MAX_SIZE = 400  # elements of a value
DTYPES = [ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16]
OPSETS = range(11, onnx.defs.onnx_opset_version() + 1)
BFLOAT16_OPSETS = range(16, OPSETS.stop)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the graph under construction."""

    name: str
    shape: Shape


@dataclass
class Builder:
    """A model under construction, and where its choices come from."""

    data: Any
    dtype: ir.DataType
    opset: int
    rng: np.random.Generator
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: dict[str, np.ndarray] = field(default_factory=dict)
    overridable: set[str] = field(default_factory=set)
    values: list[Value] = field(default_factory=list)

    # What is drawn

    def choose(self, *options):
        return self.data.draw(st.sampled_from(options))

    def flip(self) -> bool:
        return self.data.draw(st.booleans())

    def rarely(self) -> bool:
        return self.data.draw(st.integers(0, 9)) == 9

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def value(self, accept: Callable[[Shape], bool] = lambda shape: True) -> Value | None:
        """A value that is there; the latest ones first, so that chains grow."""
        fitting = [value for value in self.values if accept(value.shape)]
        if not fitting:
            return None
        return fitting[-1 - min(self.integer(0, 5), len(fitting) - 1)]

    def axis(self, shape: Shape) -> int:
        return self.integer(0, len(shape) - 1)

    # What is built

    def name(self, prefix: str) -> str:
        """A name that is free; now and then one that a fold would like to give."""
        count = len(self.nodes) + len(self.held)
        if self.held and self.rarely():
            prefix = f"{self.choose(*self.held)}{self.choose('_folded', '_bias', '_rest')}"
        taken = {name for node in self.nodes for name in node.output} | set(self.held)
        return prefix if "_" in prefix and prefix not in taken else f"{prefix}{count}"

    def add(self, op: str, inputs: list[str], *shapes: Shape, domain: str = "", **attributes):
        """Add a node with one output for each of ``shapes``; its value, or a list of them."""
        outputs = []
        for shape in shapes:
            taken = {value.name for value in outputs}
            name = self.name("v")
            outputs.append(Value(name if name not in taken else f"{name}_{len(taken)}", shape))
        names = [value.name for value in outputs]
        node_name = f"n{len(self.nodes)}" if self.flip() else ""
        self.nodes.append(
            helper.make_node(op, inputs, names, node_name, domain=domain, **attributes)
        )
        return outputs[0] if len(outputs) == 1 else outputs

    def hold(self, array: np.ndarray, prefix: str = "c") -> str:
        name = self.name(prefix)
        self.held[name] = array
        return name

    def ints(self, *numbers: int) -> str:
        return self.hold(np.array(numbers, np.int64))

    def numbers(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        array = self.rng.standard_normal(shape) * scale
        return np.asarray(array).astype(self.dtype.numpy())

    def weight(self, *shape: int) -> str:
        """A weight in one of the ways in which exporters write one."""
        scale = 1.0 / np.sqrt(max(shape[-2:])) if len(shape) > 1 else 1.0
        old = [n for n, a in self.held.items() if a.shape == shape and a.dtype.kind not in "iub"]
        form = self.choose("plain", "plain", "shared", "node", "Identity", "Transpose", "input")
        if form == "shared" and old:
            return self.choose(*old)
        array = self.numbers(*shape, scale=scale)
        if form == "node":
            tensor = numpy_helper.from_array(array)
            return self.add("Constant", [], shape, value=tensor).name
        if form == "Identity":
            return self.add("Identity", [self.hold(array, "W")], shape).name
        if form == "Transpose":
            turned = self.hold(np.ascontiguousarray(array.T), "W")
            return self.add("Transpose", [turned], shape).name
        name = self.hold(array, "W")
        if form == "input" and self.rarely():
            self.overridable.add(name)
        return name

    def scalar(self) -> str:
        number = self.choose(2.0, -0.5, 1.0)
        shape = self.choose((), (1,), (1, 1))
        return self.hold(np.full(shape, number, self.dtype.numpy()))

    def reshape(self, value: Value, shape: Shape) -> Value:
        """A Reshape whose target says the sizes, or copies and infers some."""
        target = list(shape)
        if self.flip():
            for axis, size in enumerate(value.shape[: len(shape)]):
                if size == shape[axis]:
                    target[axis] = 0
        if self.flip() and shape:
            target[self.axis(shape)] = -1
        return self.add("Reshape", [value.name, self.ints(*target)], shape)

    def transpose(self, value: Value, order: list[int]) -> Value:
        shape = tuple(value.shape[axis] for axis in order)
        return self.add("Transpose", [value.name], shape, perm=order)

    def with_axes(self, op: str, value: Value, axes: list[int], shape: Shape, since: int, **attrs):
        """An operator whose axes are an attribute before opset ``since``, then an input."""
        if self.opset < since:
            return self.add(op, [value.name], shape, axes=axes, **attrs)
        return self.add(op, [value.name, self.ints(*axes)], shape, **attrs)


# --- Linear layers -------------------------------------------------------------------------------


def matmul(b: Builder) -> list[Value]:
    value = b.value()
    width = b.integer(1, MAX_WIDTH)
    product = b.add(
        "MatMul", [value.name, b.weight(value.shape[-1], width)], (*value.shape[:-1], width)
    )
    return [bias(b, product) if b.flip() else product]


def bias(b: Builder, value: Value) -> Value:
    shape = b.choose((value.shape[-1],), (value.shape[-1],), (1,), value.shape[-2:])
    operands = [value.name, b.weight(*shape)]
    op = b.choose("Add", "Add", "Sub")
    return b.add(op, operands if b.flip() else operands[::-1], value.shape)


def left_matmul(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) > 1)
    if value is None:
        return []
    width = b.integer(1, MAX_WIDTH)
    shape = (*value.shape[:-2], width, value.shape[-1])
    return [b.add("MatMul", [b.weight(width, value.shape[-2]), value.name], shape)]


def gemm(b: Builder) -> list[Value]:
    value = b.value()
    rows = int(np.prod(value.shape[:-1]))
    flat = value if len(value.shape) == 2 else b.reshape(value, (rows, value.shape[-1]))
    trans_a, trans_b = b.rarely(), b.flip()
    contracted, kept = flat.shape if trans_a else flat.shape[::-1]
    width = b.integer(1, MAX_WIDTH)
    weight = b.weight(width, contracted) if trans_b else b.weight(contracted, width)
    shape = (kept, width)
    operands = [flat.name, weight]
    kind = b.choose("none", "vector", "vector", "row", "one", "matrix", "stream")
    if kind == "stream":
        other = b.value(lambda s: s == shape)
        operands += [other.name] if other is not None else []
    elif kind != "none":
        sizes = {"vector": (width,), "row": (1, width), "one": (1,), "matrix": shape}
        operands.append(b.weight(*sizes[kind]))
    factors = {"alpha": b.choose(1.0, -0.5), "beta": b.choose(1.0, 2.0, 0.0)}
    product = b.add("Gemm", operands, shape, transA=int(trans_a), transB=int(trans_b), **factors)
    if trans_a or len(value.shape) == 2 or b.rarely():
        return [product]
    return [b.reshape(product, (*value.shape[:-1], width))]


def einsum(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) == 3)
    if value is None or b.opset < 12 or b.dtype == ir.DataType.BFLOAT16:
        return []
    width = b.integer(1, MAX_WIDTH)
    is_turned = b.flip()
    weight = b.weight(*((width, value.shape[-1]) if is_turned else (value.shape[-1], width)))
    first, second = ("bsd", "ed" if is_turned else "de")
    operands = [(first, value.name), (second, weight)]
    operands = operands if b.flip() else operands[::-1]
    result, shape = b.choose(
        ("bse", (*value.shape[:-1], width)), ("bes", (value.shape[0], width, value.shape[1]))
    )
    equation = f"{operands[0][0]},{operands[1][0]}->{result}"
    return [b.add("Einsum", [name for _, name in operands], shape, equation=equation)]


def conv(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) == 3)
    if value is None or b.dtype != ir.DataType.FLOAT:  # what ONNX Runtime has a kernel for
        return []
    turned = b.transpose(value, [0, 2, 1]) if b.flip() else value
    size = b.choose(1, 1, min(2, turned.shape[2]))
    width = b.integer(1, MAX_WIDTH)
    shape = (turned.shape[0], width, turned.shape[2] - size + 1)
    kernel = b.hold(b.numbers(width, turned.shape[1], size, scale=0.5), "W")
    operands = [turned.name, kernel, *([b.weight(width)] if b.flip() else [])]
    product = b.add("Conv", operands, shape)
    for _ in range(b.choose(0, 1, 2)):
        product = b.choose(batch_norm, scaled)(b, product)
    return [b.transpose(product, [0, 2, 1])] if turned is not value else [product]


def batch_norm(b: Builder, value: Value) -> Value:
    """Statistics of axis 1, which are given."""
    width = value.shape[1]
    gain, shift, mean = (b.numbers(width) for _ in range(3))
    variance = np.abs(b.numbers(width)) + b.numbers(width).dtype.type(0.5)
    held = [b.hold(array, "n") for array in (gain, shift, mean, variance)]
    return b.add("BatchNormalization", [value.name, *held], value.shape)


def scaled(b: Builder, value: Value) -> Value:
    """By one number, or one for each channel of axis 1; the constant may come first."""
    factor = b.scalar() if b.flip() else b.hold(b.numbers(value.shape[1], 1), "g")
    operands = [value.name, factor]
    op = b.choose("Mul", "Add", "Sub")
    return b.add(op, operands[::-1] if b.flip() else operands, value.shape)


def norm(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) in (2, 3))
    if value is None or b.dtype != ir.DataType.FLOAT:  # what ONNX Runtime has a kernel for
        return []
    return [batch_norm(b, value)]


def bottleneck(b: Builder) -> list[Value]:
    """MobileNetV2's: an expansion, a convolution of each channel, a projection, the sum around."""
    value = b.value(lambda shape: len(shape) == 3)
    if value is None or b.dtype != ir.DataType.FLOAT:
        return []
    batch, channels, size = value.shape
    hidden = b.choose(2, 3) * channels

    def layer(x: Value, width: int, ins: int, window: int = 1, **how: object) -> Value:
        kernel = b.hold(b.numbers(width, ins, window, scale=0.5), "W")
        operands = [x.name, kernel, *([b.weight(width)] if b.flip() else [])]
        return b.add("Conv", operands, (batch, width, size), **how)

    wide = b.add("Relu", [layer(value, hidden, channels).name], (batch, hidden, size))
    groups = b.choose(hidden, hidden, channels)
    mixed = layer(wide, hidden, hidden // groups, 3, group=groups, pads=[1, 1])
    bent = b.add(b.choose("Relu", "Identity"), [mixed.name], mixed.shape)
    narrow = layer(bent, channels, hidden)
    return [narrow, b.add("Add", [value.name, narrow.name], value.shape)]


def pixels(b: Builder) -> list[Value]:
    """A product that reads the positions of an image one by one, and is put back."""
    value = b.value(lambda shape: len(shape) == 3)
    if value is None:
        return []
    batch, channels, size = value.shape
    width = b.integer(1, MAX_WIDTH)
    turned = b.transpose(value, [0, 2, 1])
    rows = b.reshape(turned, (batch * size, channels)) if b.flip() else turned
    product = b.add("MatMul", [rows.name, b.weight(channels, width)], (*rows.shape[:-1], width))
    back = product if rows is turned else b.reshape(product, (batch, size, width))
    return [b.transpose(back, [0, 2, 1])] if b.flip() else [back]


def fused_matmul(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) == 3)
    if value is None or b.dtype != ir.DataType.FLOAT:
        return []
    width, turn = b.integer(1, MAX_WIDTH), int(b.flip())
    weight = b.weight(*((width, value.shape[-1]) if turn else (value.shape[-1], width)))
    factors = {"alpha": b.choose(1.0, -0.5), "transB": turn}
    shape = (*value.shape[:-1], width)
    return [b.add("FusedMatMul", [value.name, weight], shape, domain="com.microsoft", **factors)]


def embedding(b: Builder) -> list[Value]:
    width = b.integer(1, MAX_WIDTH)
    table = b.weight(ROWS, width)
    found = b.add("Gather", [table, "ids"], (BATCH, SEQ, width))
    head = b.value(lambda shape: shape[-1] == width)
    if head is not None and b.rarely():  # tied: the head reads the table
        turned = b.add("Transpose", [table], (width, ROWS))
        logits = b.add("MatMul", [head.name, turned.name], (*head.shape[:-1], ROWS))
        return [found, logits]
    return [found]


def query(b: Builder) -> list[Value]:
    """A learned query, or zeros, for every input alike."""
    rows, width = b.choose(1, SEQ), b.integer(1, MAX_WIDTH)
    shape = (BATCH, rows, width)
    if b.rarely():
        return [b.add("Expand", [b.hold(b.numbers()), b.ints(*shape)], shape)]
    return [b.add("Expand", [b.weight(rows, width), b.ints(*shape)], shape)]


# --- Operators that may lie inside a stream, and their twins that may not ------------------------


def unary(b: Builder) -> list[Value]:
    value = b.value()
    op = b.choose("Neg", "Identity", "Dropout", "Neg", "Relu", "Tanh", "Sigmoid", "Abs")
    return [b.add(op, [value.name], value.shape)]


def softmax(b: Builder) -> list[Value]:
    value = b.value()
    return [b.add("Softmax", [value.name], value.shape, axis=b.axis(value.shape))]


def cast(b: Builder) -> list[Value]:
    value = b.value()
    wide = ir.DataType.DOUBLE if b.dtype != ir.DataType.DOUBLE else ir.DataType.FLOAT
    if b.dtype == ir.DataType.DOUBLE:
        return []  # there and back it would lose what the test looks at
    there = b.add("Cast", [value.name], value.shape, to=int(wide))
    return [b.add("Cast", [there.name], value.shape, to=int(b.dtype))]


def gain(b: Builder) -> list[Value]:
    value = b.value()
    op = b.choose("Mul", "Mul", "Div")
    kind = b.choose("scalar", "scalar", "channels", "positions", "itself", "computed")
    if kind == "itself":
        return [b.add("Mul", [value.name, value.name], value.shape)]
    if kind == "computed":
        if len(value.shape) < 2 or b.opset < 13:
            return []
        shape = (*value.shape[:-1], 1)
        total = b.with_axes("ReduceSum", value, [-1], shape, 13, keepdims=1)
        bounded = b.add("Tanh", [total.name], shape)
        return [b.add("Mul", [value.name, bounded.name], value.shape)]
    if kind == "scalar":
        factor = b.scalar()
    else:
        shape = (value.shape[-1],) if kind == "channels" else (*value.shape[-2:-1], 1)
        array = 1.0 + np.abs(b.rng.standard_normal(shape))
        factor = b.hold(array.astype(b.dtype.numpy()))
    grown = max(len(b.held[factor].shape) - len(value.shape), 0)
    shape = (1,) * grown + value.shape
    operands = [value.name, factor]
    return [b.add(op, operands if op == "Div" or b.flip() else operands[::-1], shape)]


def total(b: Builder) -> list[Value]:
    value = b.value()
    other = b.value(lambda shape: shape == value.shape or shape == value.shape[1:])
    if other is None:
        return [bias(b, value)] if len(value.shape) > 1 else []
    operands = [value.name, other.name]
    op = b.choose("Add", "Sub", "Sum")
    if op == "Sum" and b.flip():
        operands.append(value.name)
    return [b.add(op, operands if b.flip() else operands[::-1], value.shape)]


def no_norm(b: Builder) -> list[Value]:
    """Gains along a residual chain, each with a bias behind it, as in MobileBERT."""
    stream = b.value(lambda shape: len(shape) > 1)
    if stream is None:
        return []
    d, shape = stream.shape[-1], stream.shape
    for _ in range(b.integer(1, 3)):
        hidden = (*shape[:-1], b.integer(1, MAX_WIDTH))
        h = b.add("MatMul", [stream.name, b.weight(d, hidden[-1])], hidden)
        h = b.add("Relu", [h.name], hidden)
        h = b.add("MatMul", [h.name, b.weight(hidden[-1], d)], shape)
        h = b.add("Add", [(bias(b, h) if b.flip() else h).name, stream.name], shape)
        factors = b.hold((1.0 + np.abs(b.rng.standard_normal(d))).astype(b.dtype.numpy()))
        stream = b.add("Mul", [h.name, factors], shape)
        stream = bias(b, stream) if b.flip() else stream
    return [stream]


def dead_skip(b: Builder) -> list[Value]:
    """A skip connection that a trained gain has switched off."""
    value = b.value()
    other = b.value(lambda shape: shape == value.shape)
    nothing = b.hold(np.zeros(b.choose((), (1,)), b.dtype.numpy()))
    gone = b.add("Mul", [other.name, nothing], other.shape)
    return [b.add("Add", [value.name, gone.name], value.shape)]


def where(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) > 1)
    other = b.value(lambda shape: value is not None and shape == value.shape)
    if value is None or other is None:
        return []
    shape = b.choose((1,), (*value.shape[:-1], 1), value.shape)
    condition = b.hold(b.rng.random(shape) < 0.5)
    return [b.add("Where", [condition, value.name, other.name], value.shape)]


def permute(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) > 1)
    if value is None:
        return []
    order = b.data.draw(st.permutations(range(len(value.shape))))
    turned = b.transpose(value, list(order))
    if b.flip():
        return [turned]
    middle = b.add("Neg", [turned.name], turned.shape) if b.flip() else turned
    return [b.transpose(middle, [order.index(axis) for axis in range(len(order))])]


def regroup(b: Builder) -> list[Value]:
    """Merge or split axes, or count the elements anew; sometimes back again."""
    value = b.value(lambda shape: len(shape) > 1)
    if value is None:
        return []
    at = b.integer(0, len(value.shape) - 2)
    merged = (*value.shape[:at], value.shape[at] * value.shape[at + 1], *value.shape[at + 2 :])
    last = value.shape[-1]
    split = (*value.shape[:-1], last // 2, 2) if last % 2 == 0 and last else merged
    swapped = (*value.shape[:-2], value.shape[-1], value.shape[-2])
    there = b.reshape(value, b.choose(merged, split, swapped, (*value.shape, 1)))
    return [b.reshape(there, value.shape)] if b.flip() else [there]


def axes(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) < 4)
    if value is None:
        return []
    at = b.integer(0, len(value.shape))
    grown = (*value.shape[:at], 1, *value.shape[at:])
    there = b.with_axes("Unsqueeze", value, [at], grown, 13)
    if b.flip():
        return [there]
    if b.flip():
        shape = tuple(size for size in value.shape if size != 1)
        return [b.add("Squeeze", [there.name], shape)] if shape else []
    return [b.with_axes("Squeeze", there, [at], value.shape, 13)]


def repeat(b: Builder) -> list[Value]:
    value = b.value(lambda shape: np.prod(shape) < MAX_SIZE // 2)
    if value is None:
        return []
    axis = b.axis(value.shape)
    shape = tuple(2 * size if i == axis else size for i, size in enumerate(value.shape))
    if value.shape[axis] == 1 and b.flip():
        return [b.add("Expand", [value.name, b.ints(*shape)], shape)]
    times = [2 if i == axis else 1 for i in range(len(shape))]
    return [b.add("Tile", [value.name, b.ints(*times)], shape)]


def part(b: Builder) -> list[Value]:
    value = b.value(lambda shape: max(shape) > 1)
    if value is None:
        return []
    axis = b.choose(*(i for i, size in enumerate(value.shape) if size > 1))
    size = value.shape[axis]
    at = b.integer(1, size - 1)

    def resized(new: int) -> Shape:
        return (*value.shape[:axis], new, *value.shape[axis + 1 :])

    match b.choose("Slice", "Split", "Gather", "Gather one"):
        case "Slice":
            bounds = [b.ints(at), b.ints(size), b.ints(axis - len(value.shape))]
            return [b.add("Slice", [value.name, *bounds], resized(size - at))]
        case "Split":
            sizes = resized(at), resized(size - at)
            if b.opset < 13:
                return b.add("Split", [value.name], *sizes, axis=axis, split=[at, size - at])
            return b.add("Split", [value.name, b.ints(at, size - at)], *sizes, axis=axis)
        case "Gather":
            order = b.data.draw(st.permutations(range(size)))
            shape = value.shape
            return [b.add("Gather", [value.name, b.ints(*order)], shape, axis=axis)]
        case _:
            shape = (*value.shape[:axis], *value.shape[axis + 1 :])
            index = b.hold(np.array(at))
            return [b.add("Gather", [value.name, index], shape, axis=axis)] if shape else []


def parts(b: Builder) -> list[Value]:
    """A layer whose channels go apart, and layers that read some of the parts."""
    value = b.value()
    sizes = [b.integer(1, MAX_WIDTH) for _ in range(b.integer(2, 3))]
    how = b.choose("Split", "Slice", "Gather")
    if how == "Gather":
        sizes = sizes[:1] * len(sizes)

    def layer(x: Value, width: int) -> Value:
        shape = (*x.shape[:-1], width)
        product = b.add("MatMul", [x.name, b.weight(x.shape[-1], width)], shape)
        return bias(b, product) if b.flip() else product

    whole, shapes = layer(value, sum(sizes)), [(*value.shape[:-1], size) for size in sizes]
    ends = np.cumsum([0, *sizes])
    match how:
        case "Gather":  # of an axis of its own
            apart = b.reshape(whole, (*value.shape[:-1], len(sizes), sizes[0]))
            axis, numbers = len(value.shape) - 1, range(len(sizes))
            indices = [b.hold(np.array(i)) for i in numbers]
            pieces = [b.add("Gather", [apart.name, i], shapes[0], axis=axis) for i in indices]
        case "Split" if b.opset < 13:
            pieces = b.add("Split", [whole.name], *shapes, axis=-1, split=sizes)
        case "Split":
            pieces = b.add("Split", [whole.name, b.ints(*sizes)], *shapes, axis=-1)
        case _:
            bounds = [[b.ints(start), b.ints(stop)] for start, stop in pairwise(ends)]
            cuts = zip(bounds, shapes, strict=True)
            pieces = [b.add("Slice", [whole.name, *at, b.ints(-1)], to) for at, to in cuts]
    found = []
    for piece in pieces:
        width = b.integer(1, MAX_WIDTH)
        read = bias(b, piece) if b.rarely() else piece
        found += [layer(read, width) for _ in range(b.choose(0, 1, 1, 2))]
    if len(found) > 1 and found[0].shape == found[-1].shape and b.flip():
        return [b.add("Add", [found[0].name, found[-1].name], found[0].shape)]
    return found or pieces


def join(b: Builder) -> list[Value]:
    value = b.value()
    axis = b.axis(value.shape)
    rest = (*value.shape[:axis], *value.shape[axis + 1 :])
    other = b.value(lambda s: len(s) == len(value.shape) and (*s[:axis], *s[axis + 1 :]) == rest)
    size = value.shape[axis] + other.shape[axis]
    shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
    return [b.add("Concat", [value.name, other.name], shape, axis=axis - len(shape))]


def pad(b: Builder) -> list[Value]:
    value = b.value()
    axis = b.axis(value.shape)
    pads = [0] * (2 * len(value.shape))
    pads[axis] = 1
    shape = tuple(size + (i == axis) for i, size in enumerate(value.shape))
    fill = [b.hold(np.array(b.choose(0.0, 1.0), b.dtype.numpy()))] if b.flip() else []
    return [b.add("Pad", [value.name, b.ints(*pads), *fill], shape)]


def reduce(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) > 1)
    if value is None:
        return []
    axis, keep = b.axis(value.shape), b.flip()
    op, since = b.choose(("ReduceSum", 13), ("ReduceMean", 18))
    shape = tuple(1 if i == axis else s for i, s in enumerate(value.shape) if keep or i != axis)
    return [b.with_axes(op, value, [axis], shape, since, keepdims=int(keep))]


def measure(b: Builder) -> list[Value]:
    """The shape of a value, which may say its width, used to reshape another."""
    value = b.value()
    sizes = b.add("Shape", [value.name], (len(value.shape),))
    other = b.value(lambda shape: np.prod(shape) == np.prod(value.shape))
    return [b.add("Reshape", [other.name, sizes.name], value.shape)]


def branch(b: Builder) -> list[Value]:
    """An If whose branches read outer values and weights."""
    value, name = b.value(), f"inner{len(b.nodes)}"
    info = [helper.make_tensor_value_info(name, int(b.dtype), None)]
    op, operands, shape = "Identity", [value.name], value.shape
    if b.flip():
        width = b.integer(1, MAX_WIDTH)
        op, operands = "MatMul", [value.name, b.weight(value.shape[-1], width)]
        shape = (*value.shape[:-1], width)
    bodies = [
        helper.make_graph([helper.make_node(op, operands, [name])], body, [], info)
        for body in ("yes", "no")
    ]
    bodies[1].node[0].output[0] = bodies[1].output[0].name = f"{name}_no"
    return [b.add("If", ["flag"], shape, then_branch=bodies[0], else_branch=bodies[1])]


def call(b: Builder) -> list[Value]:
    """A model-local function: linear, inside a stream, or neither."""
    value = b.value()
    match b.choose("Linear", "Twice", "Activation"):
        case "Linear":
            width = b.integer(1, MAX_WIDTH)
            operands = [value.name, b.weight(value.shape[-1], width)]
            shape = (*value.shape[:-1], width)
            return [b.add("Linear", operands, shape, domain="local")]
        case name:
            return [b.add(name, [value.name], value.shape, domain="local")]


# --- Blocks of a transformer ---------------------------------------------------------------------


def feed_forward(b: Builder) -> list[Value]:
    """P, gate and up, an activation, O: two streams to fold in front and one behind."""
    value = b.value(lambda shape: len(shape) == 3)
    if value is None:
        return []
    d, hidden = b.integer(2, MAX_WIDTH), b.integer(2, 2 * MAX_WIDTH)
    batch = value.shape[:-1]

    def layer(x: Value, width: int) -> Value:
        return b.add("MatMul", [x.name, b.weight(x.shape[-1], width)], (*batch, width))

    p = layer(value, d)
    up = layer(bias(b, p) if b.flip() else p, hidden)
    if b.flip():
        gate = layer(p, hidden)
        up = b.add("Mul", [b.add("Sigmoid", [gate.name], up.shape).name, up.name], up.shape)
    else:
        up = b.add("Relu", [up.name], up.shape)
    out = layer(up, d)
    return [b.add("Add", [out.name, p.name], p.shape)] if b.rarely() else [out]


HEAD_DIM = 2


def attention(b: Builder) -> list[Value]:
    value = b.value(lambda shape: len(shape) == 3)
    return [] if value is None else [attend(b, value)]


def block(b: Builder) -> list[Value]:
    """A stream that only Q, K and V read, as wide as two heads."""
    value = b.value(lambda shape: len(shape) == 3)
    if value is None:
        return []
    width = 2 * HEAD_DIM
    weight = b.weight(value.shape[-1], width)
    return [attend(b, b.add("MatMul", [value.name, weight], (*value.shape[:-1], width)))]


def attend(b: Builder, value: Value) -> Value:
    """Q, K and V (apart, or fused and split), heads of 2 channels, grouped or not."""
    batch, n, width = value.shape
    heads = b.choose(2, 4)
    kv_heads = b.choose(heads, 1)
    size = heads * HEAD_DIM

    def project(size: int) -> Value:
        y = b.add("MatMul", [value.name, b.weight(width, size)], (batch, n, size))
        return bias(b, y) if b.rarely() else y

    def split(x: Value, count: int) -> Value:
        return b.transpose(b.reshape(x, (batch, n, count, HEAD_DIM)), [0, 2, 1, 3])

    match b.choose("apart", "contiguous", "interleaved") if kv_heads == heads else "apart":
        case "contiguous" if b.opset >= 13:
            sizes = b.ints(size, size, size)
            shapes = ((batch, n, size),) * 3
            parts = b.add("Split", [project(3 * size).name, sizes], *shapes, axis=-1)
            q, k, v = (split(part, heads) for part in parts)
        case "interleaved":
            apart = b.reshape(project(3 * size), (batch, n, heads, 3, HEAD_DIM))
            turned = b.transpose(apart, [3, 0, 2, 1, 4])
            q, k, v = (
                b.add("Gather", [turned.name, b.hold(np.array(i))], turned.shape[1:], axis=0)
                for i in range(3)
            )
        case _:
            counts = (heads, kv_heads, kv_heads)
            q, k, v = (split(project(count * HEAD_DIM), count) for count in counts)
    k = b.transpose(k, [0, 1, 3, 2])
    scores = b.add("MatMul", [q.name, k.name], (batch, heads, n, n))
    probs = b.add("Softmax", [scores.name], scores.shape, axis=3)
    context = b.add("MatMul", [probs.name, v.name], q.shape)
    flat = b.reshape(b.transpose(context, [0, 2, 1, 3]), (batch, n, size))
    return b.add("MatMul", [flat.name, b.weight(size, width)], value.shape)


def experts(b: Builder) -> list[Value]:
    """Two experts side by side, whose outputs are summed; a weight holds the matrices of both."""
    value = b.value(lambda shape: len(shape) == 3)
    if value is None:
        return []
    batch, n, width = value.shape
    count, hidden, out = 2, b.integer(1, MAX_WIDTH), b.integer(1, MAX_WIDTH)
    inputs = b.with_axes("Unsqueeze", value, [1], (batch, 1, n, width), 13)
    up, down = b.numbers(count, width, hidden, scale=0.5), b.numbers(count, hidden, out, scale=0.5)
    h = b.add("MatMul", [inputs.name, b.hold(up, "W")], (batch, count, n, hidden))
    a = b.add("Relu", [h.name], h.shape) if b.flip() else h
    y = b.add("MatMul", [a.name, b.hold(down, "W")], (batch, count, n, out))
    return [b.with_axes("ReduceSum", y, [1], (batch, n, out), 13, keepdims=0)]


LINEAR = (
    *(matmul, matmul, matmul, left_matmul, gemm, einsum, conv, fused_matmul, embedding, pixels),
    query,
)
INSIDE = (
    *(unary, softmax, cast, gain, total, dead_skip, where, permute, regroup, axes, repeat, part),
    *(join, pad, reduce, norm),
)
BLOCKS = (feed_forward, attention, block, experts, no_norm, bottleneck, parts)
OUTSIDE = (measure, branch, call, call)


@st.composite
def models(draw, max_steps: int = 8) -> ir.Model:
    """A valid model whose inputs are ``x`` [2, 3, d], ``ids`` [2, 3] and ``flag`` []."""
    data = draw(st.data())
    dtype = data.draw(st.sampled_from(DTYPES))
    opset = data.draw(st.sampled_from(OPSETS if dtype != ir.DataType.BFLOAT16 else BFLOAT16_OPSETS))
    b = Builder(data, dtype, opset, np.random.default_rng(data.draw(st.integers(0, 10**6))))
    b.values.append(Value("x", (BATCH, SEQ, b.integer(1, MAX_WIDTH))))
    for _ in range(b.integer(2, max_steps)):
        step = b.choose(*b.choose(LINEAR, LINEAR, INSIDE, INSIDE, BLOCKS, OUTSIDE))
        b.values += [value for value in step(b) if np.prod(value.shape) <= MAX_SIZE]
    return finished(b)


def finished(b: Builder) -> ir.Model:
    """The model: values that nothing reads are outputs, and now and then others."""
    read = {name for node in b.nodes for name in node.input}
    made = {name for node in b.nodes for name in node.output}
    ends = [v for v in b.values if v.name in made and (v.name not in read or b.rarely())]
    symbolic = b.flip()
    dims = [("batch", "seq", b.values[0].shape[2]), b.values[0].shape][not symbolic]
    inputs = [helper.make_tensor_value_info("x", int(b.dtype), dims)]
    inputs.append(helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, dims[:2]))
    inputs.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    inputs += [
        helper.make_tensor_value_info(name, int(b.dtype), b.held[name].shape)
        for name in sorted(b.overridable)
    ]
    outputs = [
        helper.make_tensor_value_info(v.name, int(b.dtype), [None] * len(v.shape)) for v in ends
    ]
    tensors = [ir.to_proto(ir.tensor(array, name=name)) for name, array in b.held.items()]
    graph = helper.make_graph(b.nodes, "fuzz", inputs, outputs, tensors)
    if not symbolic and b.flip():
        known = [v for v in b.values[1:] if v not in ends]
        graph.value_info.extend(
            helper.make_tensor_value_info(v.name, int(b.dtype), v.shape) for v in known
        )
    imports = {"": b.opset, "local": 1, "com.microsoft": 1}
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*each) for each in imports.items()],
        functions=functions(b.opset),
        ir_version=10,
    )
    return ir.from_proto(model)


def functions(opset: int) -> list[onnx.FunctionProto]:
    imports = [helper.make_opsetid("", opset)]
    node = helper.make_node

    def make(name: str, inputs: list[str], *nodes: onnx.NodeProto) -> onnx.FunctionProto:
        return helper.make_function("local", name, inputs, ["out"], list(nodes), imports)

    return [
        make("Linear", ["a", "w"], node("MatMul", ["a", "w"], ["out"])),
        make("Twice", ["a"], node("Add", ["a", "a"], ["out"])),
        make("Activation", ["a"], node("Relu", ["a"], ["r"]), node("Mul", ["r", "r"], ["out"])),
    ]
