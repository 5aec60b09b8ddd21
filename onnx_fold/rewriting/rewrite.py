"""A planned change of the graph: what it would cost can be asked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from onnx_fold.algebra.device import Device
from onnx_fold.algebra.expression import Expression, FoldedTensor, ImpliedTensor, evaluate, sampled
from onnx_fold.graph.constants import FLOATS, Constant, constant
from onnx_fold.graph.edit import Editor, initializer
from onnx_fold.graph.linear import Edge, Linear
from onnx_fold.graph.operators import operator
from onnx_fold.streams.stream import ConstantWriter

_PICKS = frozenset(("Gather", "GatherND"))

Build = Callable[[Editor], ir.Value]
"""Makes, when the change is applied, the value that takes the place of another."""


class CannotRewriteError(Exception):
    """The graph has no way to hold a fold; the message names the node that stands in the way."""


@dataclass(frozen=True)
class Work:
    """What a fold adds for one token.

    Attributes:
        nodes: Operators, less those that go.
        copied: Values that these copy.
        gathered: Values that these pick by index.
    """

    nodes: int
    copied: int = 0
    gathered: int = 0


@dataclass
class Rewrite:
    """New initializers and replaced values.

    Attributes:
        stored: Node inputs that get a new initializer.
        rewired: Node inputs that get a value built for them.
        biases: Values to which a constant is added.
        replaced: Values and what their readers read instead.
        resized: Values whose channel axis gets another width: value → (axis, width).
        added: Further initializers that ``replaced`` makes.
        kept: Constants that ``replaced`` still reads.
        dropped: Further inputs that nothing reads once ``replaced`` is applied.
        reordered: Values whose channels come in another order.
        nodes_added: Operators that ``rewired`` and ``replaced`` build.
        copied: Values that these copy for one token.
        gathered: Values that these pick by index for one token.
    """

    stored: dict[Edge, ir.TensorProtocol] = field(default_factory=dict)
    rewired: dict[Edge, Build] = field(default_factory=dict)
    biases: dict[ir.Value, FoldedTensor] = field(default_factory=dict)
    replaced: dict[ir.Value, ir.Value | Build] = field(default_factory=dict)
    resized: dict[ir.Value, tuple[int, int]] = field(default_factory=dict)
    added: list[FoldedTensor] = field(default_factory=list)
    kept: set[ir.Value] = field(default_factory=set)
    dropped: set[Edge] = field(default_factory=set)
    reordered: list[ir.Value] = field(default_factory=list)
    nodes_added: int = 0
    copied: int = 0
    gathered: int = 0

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that it changes, removes, or gives another value to read."""
        values = (*self.replaced, *self.biases)
        producers = {node for value in values if (node := value.producer()) is not None}
        readers = {node for value in values for node, _ in value.uses()}
        return {node for node, _ in (*self.stored, *self.rewired)} | producers | readers

    @property
    def touched(self) -> set[ir.Value]:
        """Values that may hold something else under their old names; graph outputs do not."""
        nodes = {node for node, _ in (*self.stored, *self.rewired)}
        outputs = {value for node in nodes for value in node.outputs}
        found = outputs | self.biases.keys() | self.resized.keys()
        return {value for value in found if not value.is_graph_output()}

    def weights_removed(self, min_rank: int = 0) -> int:
        """Elements of floating-point initializers that go, less those that come.

        With ``min_rank=2`` matrices are counted and vectors are not.
        """
        come = {id(tensor): tensor for tensor in self._new_tensors()}

        def total(tensors: Iterable[ir.TensorProtocol]) -> int:
            return sum(stored_size(tensor) for tensor in tensors if _rank(tensor) >= min_rank)

        return total(self._gone()) - total(come.values())

    def weights_after(self, member: Linear | ConstantWriter) -> int:
        """Elements that a layer or table weighs once it is applied: 0 if it is the identity."""
        if (tensor := self.stored.get(member.edge)) is not None:
            return stored_size(tensor)
        if isinstance(member, Linear) and member.y in self.replaced:
            return sum(stored_size(tensor) for tensor in self.added if _rank(tensor) >= 2)
        return stored_size(member.weight.tensor)

    @property
    def drops_implied(self) -> bool:
        """Whether a matrix goes that was written out only to be merged."""
        return any(isinstance(tensor, ImpliedTensor) for tensor in self._gone())

    def _gone(self) -> Iterable[ir.TensorProtocol]:
        gone = {held.leaf: held.tensor for held in self._dropped() if self._dies(held.leaf)}
        return gone.values()

    def work(self) -> Work:
        """What it adds for one token."""
        return Work(self.nodes_change(), self.copied, self.gathered)

    def nodes_change(self) -> int:
        """Operators that come, less those that go."""
        producers = {value.producer() for value in self.replaced if not value.is_graph_output()}
        gone = sum(1 for node in producers if node is not None and self._is_dead(node))
        return self.nodes_added + len(self.biases) - gone

    def names(self) -> set[str]:
        """Names of the initializers, nodes and values that it changes or removes."""
        edges = [*self.stored, *self.rewired, *self.dropped]
        nodes = [node for node, _ in edges] + [value.producer() for value in self.replaced]
        values = [node.inputs[index] for node, index in edges if index < len(node.inputs)]
        leaves = [held.leaf for held in map(constant, values) if held is not None]
        found = [*values, *leaves, *self.replaced, *self.biases, *filter(None, nodes)]
        return {each.name for each in found if each is not None and each.name}

    def is_finite(self, device: Device, given: Mapping[Expression, Any]) -> bool:
        """Whether some rows and columns of every new initializer can be stored."""
        generator = np.random.default_rng(0)
        samples = (sampled(tensor.rounded, generator) for tensor in self._new_tensors())
        return all(np.isfinite(evaluate(part, device, given)).all() for part in samples)

    def shared(self) -> list[str]:
        """Names of initializers that have to stay because something else reads them too."""
        staying = (
            c.leaf for c in self._dropped() if not self._dies(c.leaf) and c.value not in self.kept
        )
        return sorted({value.name or "?" for value in staying})

    def _new_tensors(self) -> Iterator[FoldedTensor]:
        yield from (tensor for tensor in self.stored.values() if isinstance(tensor, FoldedTensor))
        yield from self.biases.values()
        yield from self.added

    def _dropped(self) -> Iterator[Constant]:
        """The weights behind the inputs that this change replaces or makes unnecessary."""
        edges = [*self.stored, *self.dropped]
        for value in self.replaced:
            if (node := value.producer()) is not None and self._is_dead(node):
                edges.extend((node, index) for index in range(len(node.inputs)))
        for node, index in edges:
            held = constant(node.inputs[index]) if index < len(node.inputs) else None
            if held is not None and held.dtype in FLOATS:
                yield held

    def _dies(self, value: ir.Value) -> bool:
        """Whether nothing reads ``value`` any more once the change is applied."""
        return _all_hold(value, self._dies_if)

    def _dies_if(self, value: ir.Value) -> Iterable[ir.Value] | None:
        """The values that have to die too so that ``value`` does; None if it stays anyway."""
        if value in self.kept or value.is_graph_output():
            return None
        gone = self.stored.keys() | self.rewired.keys() | self.dropped
        reading = {node for node, index in value.uses() if (node, index) not in gone}
        needed = [self._is_dead_if(node) for node in reading]
        if any(each is None for each in needed):
            return None
        return [each for some in needed if some is not None for each in some]

    def _is_dead(self, node: ir.Node) -> bool:
        """Whether ``node`` is replaced, or makes a constant that dies; data is still read."""
        needed = self._is_dead_if(node)
        return needed is not None and all(map(self._dies, needed))

    def _is_dead_if(self, node: ir.Node) -> Iterable[ir.Value] | None:
        """The constants that have to die so that ``node`` does; None if it stays anyway."""
        needed = [value for value in node.outputs if value not in self.replaced]
        return needed if all(constant(value) is not None for value in needed) else None

    def _resolve(self, value: ir.Value) -> ir.Value:
        """What ``value`` has become, where replacements follow on each other."""
        while isinstance(new := self.replaced.get(value), ir.Value):
            value = new
        return value

    def apply(self, editor: Editor) -> None:
        """Change the graph and remove what nothing reads any more because of it."""
        suspects: list[ir.Value | None] = []
        new: dict[int, tuple[ir.Value, str]] = {}
        for (node, index), tensor in self.stored.items():
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            old = node.inputs[index]
            held = constant(old)
            name = (held and held.leaf.name) or f"{node.name or node.op_type}_weight"
            value, _ = new.setdefault(id(tensor), (initializer(tensor), name))
            node.replace_input_with(index, value)
            suspects.append(old)
            if held is not None and held.shape != value.shape and operator(node) in _PICKS:
                for output in node.outputs:
                    output.shape = None if output not in self.resized else output.shape
        for (node, index), build in self.rewired.items():
            suspects.append(node.inputs[index])
            node.replace_input_with(index, build(editor))
        for value, tensor in self.biases.items():
            bias = initializer(tensor)
            new[id(tensor)] = (bias, f"{value.name}_bias")
            _add_bias(editor, value, bias)
        for value, replacement in self.replaced.items():
            suspects.append(value)
            if isinstance(replacement, ir.Value):
                _replace(editor, value, self._resolve(replacement))
            else:
                _replace(editor, value, replacement(editor))
        for value, (axis, width) in self.resized.items():
            if value.shape is not None:
                dims = list(value.shape)
                dims[axis] = width
                value.shape = ir.Shape(dims)
        editor.remove_dead(suspects)
        for value, name in new.values():
            editor.register(value, name)


def _all_hold(value: ir.Value, needed: Callable[[ir.Value], Iterable[ir.Value] | None]) -> bool:
    """Whether ``value`` and all that it needs, and these need in turn, can be had."""
    queue, seen = [value], {value}
    while queue:
        following = needed(queue.pop())
        if following is None:
            return False
        new = [each for each in following if each not in seen]
        seen.update(new)
        queue.extend(new)
    return True


def stored_size(tensor: ir.TensorProtocol) -> int:
    """Elements that are stored of ``tensor``."""
    return tensor.stored_size if isinstance(tensor, ImpliedTensor) else tensor.size


def _rank(tensor: ir.TensorProtocol) -> int:
    return 1 if isinstance(tensor, ImpliedTensor) else len(tensor.shape)


def _add_bias(editor: Editor, value: ir.Value, bias: ir.Value) -> None:
    """Insert an Add behind ``value``; the sum takes the name if it is a graph output."""
    producer = value.producer()
    assert producer is not None
    add = ir.node("Add", [value, bias], name=editor.unused_node_name(f"{producer.name}_bias"))
    total = add.outputs[0]
    total.type, total.shape = value.type, value.shape
    editor.graph.insert_after(producer, add)
    uses = [use for use in value.uses() if use.node is not add]
    if value.is_graph_output():
        position = list(editor.graph.outputs).index(value)
        editor.graph.outputs[position] = total
        total.name, value.name = value.name, editor.unused_name(f"{value.name}_product")
    else:
        total.name = editor.unused_name(f"{value.name}_biased")
    for node, index in uses:
        node.replace_input_with(index, total)


def _replace(editor: Editor, old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``; a graph output keeps its name."""
    if old.is_graph_output():
        node = old.producer()
        assert node is not None
        identity = ir.node("Identity", [new], name=editor.unused_node_name(f"{node.name}_output"))
        output = identity.outputs[0]
        output.type, output.shape, output.name = old.type, old.shape, old.name
        editor.graph.insert_before(node, identity)
        replace_all_uses_with(old, output, replace_graph_outputs=True)
        old.name = f"{old.name}_unused"
    else:
        replace_all_uses_with(old, new)
