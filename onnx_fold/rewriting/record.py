"""New operators, written down before they are built: what they cost follows from what they are.

A node of the graph would count at once as a reader of what it reads. So a pass states steps, which
are plain data: an operator, what it reads, its attributes. Operators, new weights and the values
that are moved for each token are read off them, and the graph is built from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.algebra.expression import Expression, evaluate
from onnx_fold.graph.constants import constant
from onnx_fold.graph.edit import Editor, initializer
from onnx_fold.graph.linear import Edge
from onnx_fold.graph.operators import operator


@dataclass(frozen=True, eq=False)
class Held:
    """A new initializer.

    Attributes:
        content: What it holds; integers may be an expression that is evaluated when it is built.
        name: What it is called, if that is free.
    """

    content: ir.TensorProtocol | Expression
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        content = self.content
        return tuple(content.shape if isinstance(content, Expression) else content.shape.numpy())


@dataclass(frozen=True)
class Made:
    """One output of a step."""

    step: Step
    index: int = 0


@dataclass(frozen=True)
class Present:
    """What an input of a node holds when the step is built: a new weight, if it is given one."""

    edge: Edge


Operand: TypeAlias = ir.Value | Held | Made | Present
"""What a step can read: a value of the graph (or what takes its place), or something new."""


@dataclass(frozen=True, eq=False)
class Step:
    """An operator that is to be built.

    Attributes:
        before: The node in front of which it comes.
        operator: Its type, in ONNX's own domain.
        inputs: What it reads.
        attributes: Its attributes.
        sizes: The channels of each output, of a Split or a Pad.
        like: A value of which the output has the type and the shape, if that is known.
    """

    before: ir.Node
    operator: str
    inputs: tuple[Operand | None, ...]
    attributes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    like: ir.Value | None = None

    @property
    def outputs(self) -> tuple[Made, ...]:
        """What it makes."""
        return tuple(Made(self, index) for index in range(len(self.sizes) or 1))


Entry: TypeAlias = Held | Step


class Recorder:
    """Notes steps in front of one node, in the order in which they are to be built."""

    def __init__(self, entries: list[Entry], before: ir.Node) -> None:
        """Add to ``entries`` what comes in front of ``before``."""
        self._entries = entries
        self._before = before

    def __call__(
        self,
        operator: str,
        *inputs: Operand | None,
        like: ir.Value | None = None,
        **attributes: int | Sequence[int],
    ) -> Made:
        """Note an operator with one output, which is ``like`` another value."""
        return self._step(Step(self._before, operator, inputs, attributes, like=like))[0]

    def again(self, node: ir.Node, *inputs: Operand | None) -> Made:
        """Note what ``node`` does, which has one output, once more, with other ``inputs``."""
        told = {each.name: each.value for each in node.attributes.values()}
        return self._step(Step(self._before, operator(node), inputs, told))[0]

    def split(self, value: Operand, sizes: Sequence[int], axis: int = -1) -> tuple[Made, ...]:
        """Note a Split of the channel axis of ``value`` into parts of ``sizes``."""
        return self._step(Step(self._before, "Split", (value,), {"axis": axis}, tuple(sizes)))

    def pad(self, value: Operand, rank: int, width: int, more: int, axis: int = -1) -> Made:
        """Note a Pad of the channel axis of ``value``, ``width`` wide, by ``more`` zeros."""
        pads = (*(0,) * (2 * rank + axis), more, *(0,) * (-1 - axis))
        step = Step(self._before, "Pad", (value,), {"pads": pads}, (width + more,))
        return self._step(step)[0]

    def constant(self, tensor: ir.TensorProtocol, name: str) -> Held:
        """Note a new initializer, called ``name`` if that is free."""
        return self._held(tensor, name)

    def integers(self, numbers: npt.ArrayLike | Expression, name: str) -> Held:
        """Note a new initializer of int64; an expression is evaluated when it is built."""
        if isinstance(numbers, Expression):
            return self._held(numbers, name)
        return self._held(_integers(numbers), name)

    def _held(self, content: ir.TensorProtocol | Expression, name: str) -> Held:
        held = Held(content, name)
        self._entries.append(held)
        return held

    def _step(self, step: Step) -> tuple[Made, ...]:
        self._entries.append(step)
        return step.outputs


def _integers(numbers: npt.ArrayLike) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(numbers, dtype=np.int64))


def leading_to(ends: Iterable[Operand]) -> set[Entry]:
    """The steps and new initializers without which ``ends`` cannot be made."""
    queue, found = list(ends), set[Entry]()
    while queue:
        operand = queue.pop()
        entry = operand.step if isinstance(operand, Made) else operand
        if isinstance(entry, Held | Step) and entry not in found:
            found.add(entry)
            inputs = entry.inputs if isinstance(entry, Step) else ()
            queue += [each for each in inputs if each is not None]
    return found


def build(entries: Iterable[Entry], editor: Editor) -> dict[Operand, ir.Value]:
    """Make what ``entries`` say, in their order; new initializers have no name yet."""
    built: dict[Operand, ir.Value] = {}
    for entry in entries:
        if isinstance(entry, Held):
            content = entry.content
            tensor = _integers(evaluate(content)) if isinstance(content, Expression) else content
            built[entry] = initializer(tensor)
            continue
        inputs = [None if each is None else value_of(each, built) for each in entry.inputs]
        if entry.operator == "Split" and entry.sizes:
            axis = entry.attributes["axis"]
            assert isinstance(axis, int)
            assert inputs[0] is not None
            outputs = editor.split(entry.before, inputs[0], entry.sizes, axis)
        elif entry.operator == "Pad":
            pads = entry.attributes["pads"]
            assert isinstance(pads, Sequence)
            assert inputs[0] is not None
            outputs = [editor.pad(entry.before, inputs[0], pads)]
        else:
            node = editor.node(entry.before, entry.operator, inputs, 1, **entry.attributes)
            outputs = node.outputs
        if entry.like is not None:
            outputs[0].type, outputs[0].shape = entry.like.type, entry.like.shape
        built.update(zip(entry.outputs, outputs, strict=True))
    return built


def value_of(operand: Operand, built: Mapping[Operand, ir.Value]) -> ir.Value:
    """The value of the graph that ``operand`` is once the steps are built."""
    if isinstance(operand, ir.Value):
        return operand
    if isinstance(operand, Present):
        node, index = operand.edge
        present = node.inputs[index]
        assert present is not None
        return present
    return built[operand]


def widths(steps: Sequence[Step]) -> dict[Operand, int]:
    """The channels of what ``steps`` read and make, as far as weights, sizes and shapes tell."""
    known: dict[Operand, int] = {}
    for step in steps:
        factor = step.inputs[1] if step.operator in ("MatMul", "Conv") else None
        if isinstance(factor, Held) and step.inputs[0] is not None:
            known[step.inputs[0]] = factor.shape[-2 if step.operator == "MatMul" else 1]
    for step in steps:
        found = step.sizes or [_width(step, known)]
        known |= {o: n for o, n in zip(step.outputs, found, strict=True) if n is not None}
    return known


def _width(step: Step, known: Mapping[Operand, int]) -> int | None:
    """The channels of the only output of ``step``."""
    axis = step.attributes.get("axis", -1)
    assert isinstance(axis, int)
    if axis >= 0:
        return None
    if step.operator == "Conv":
        return step.inputs[1].shape[0] if isinstance(step.inputs[1], Held) else None
    if step.operator in ("MatMul", "Gather"):
        other = step.inputs[1]
        return other.shape[-1] if isinstance(other, Held) else None
    if step.operator == "Slice":
        bounds = [each.content for each in step.inputs[1:] if isinstance(each, Held)]
        numbers = [int(b.numpy()[0]) for b in bounds if not isinstance(b, Expression)]
        start, stop, *axes = numbers if len(numbers) > 2 else (0, 0)
        return stop - start if axes == [-1] else None
    found = [known.get(each, _stated(each, axis)) for each in step.inputs if each is not None]
    sizes = [size for size in found if size is not None]
    if step.operator == "Concat":
        return sum(sizes) if len(sizes) == len(found) else None
    return max(sizes, default=None)


def _stated(operand: Operand, axis: int) -> int | None:
    """One dimension of a value of the graph, if the model states it."""
    shape = operand.shape if isinstance(operand, ir.Value) else None
    size = shape[axis] if shape is not None and len(shape) >= -axis else None
    return size if isinstance(size, int) else None


def moved(steps: Sequence[Step]) -> tuple[int, int]:
    """The values that ``steps`` copy, and those that they pick by index, for one token.

    Split, Slice, Pad and Concat copy each of their channels, and a sum of two computed values costs
    as much. Adding a constant does not count: runtimes do it with the product in front, and it
    takes the place of a sum that was there. Nor does what reshapes.
    """
    known = widths(steps)
    copied = gathered = 0
    for step in steps:
        size = sum(known.get(output, 0) for output in step.outputs)
        if step.operator in ("Split", "Slice", "Pad", "Concat") or is_sum(step):
            copied += size
        elif step.operator == "Gather":
            gathered += size
    return copied, gathered


def is_sum(node: ir.Node | Step) -> bool:
    """Whether it adds values that are both computed."""
    name = node.operator if isinstance(node, Step) else operator(node)
    return name in ("Add", "Sub") and not any(map(_is_constant, node.inputs))


def _is_constant(operand: Operand | None) -> bool:
    if isinstance(operand, ir.Value):
        return constant(operand) is not None
    return isinstance(operand, Held | Present)


_ON_SIZES = frozenset(
    (
        *("Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"),
        *("Add", "Sub", "Mul", "Div", "Mod", "Where", "Equal", "Min", "Max", "ReduceProd"),
    )
)
"""Operators by which a size is computed from others."""


def makes_sizes(node: ir.Node | Step) -> bool:
    """Whether an operator computes sizes from those of values: it reads a few integers."""
    queue: list[ir.Node | Step] = [node]
    seen: set[ir.Node | Step] = {node}
    while queue:
        current = queue.pop()
        name = current.operator if isinstance(current, Step) else operator(current)
        if name in ("Shape", "Size"):
            continue
        if name not in _ON_SIZES:
            return False
        for operand in current.inputs:
            if operand is None or _is_constant(operand):
                continue
            maker = _maker(operand)
            if maker is None:
                return False
            if maker not in seen:
                seen.add(maker)
                queue.append(maker)
    return True


def _maker(operand: Operand) -> ir.Node | Step | None:
    if isinstance(operand, Made):
        return operand.step
    return operand.producer() if isinstance(operand, ir.Value) else None
