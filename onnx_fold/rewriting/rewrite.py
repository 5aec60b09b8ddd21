"""A planned change of the graph: what it would cost can be asked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Device
from onnx_fold.algebra.expression import Expression, FoldedTensor, ImpliedTensor, evaluate, sampled
from onnx_fold.graph.constants import FLOATS, constant
from onnx_fold.graph.edit import Editor, initializer
from onnx_fold.graph.linear import Edge
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.record import (
    Entry,
    Held,
    Made,
    Operand,
    Present,
    Recorder,
    Step,
    build,
    is_sum,
    leading_to,
    makes_sizes,
    moved,
    value_of,
    widths,
)
from onnx_fold.streams.ends import ConstantWriter, End

_PICKS = frozenset(("Gather", "GatherND"))

_MOVES = _PICKS | {"Split", "Slice", "Pad", "Concat", "SequenceAt"}
"""Operators that copy what they put out."""


class CannotRewriteError(Exception):
    """The graph has no way to hold a fold; the message names the node that stands in the way."""


@dataclass(frozen=True)
class Work:
    """What a fold adds for one token.

    Attributes:
        nodes: Operators, less those that go; those that compute sizes, a few integers, not counted.
        copied: Values that these copy, less those that were copied before.
        gathered: Values that these pick by index.
    """

    nodes: int
    copied: int = 0
    gathered: int = 0


@dataclass
class Unread:
    """What nothing reads any more.

    Attributes:
        nodes: Nodes.
        values: What these make, and initializers.
    """

    nodes: set[ir.Node] = field(default_factory=set)
    values: set[ir.Value] = field(default_factory=set)


@dataclass
class Rewrite:
    """New initializers, steps to build, and values that others take the place of.

    What it costs is read off that, and so is what nothing reads any more once it is applied.

    Attributes:
        stored: Node inputs that get a new initializer.
        rewired: Node inputs that read something else.
        biases: Values to which a constant is added.
        replaced: Values and what their readers read instead.
        resized: Values whose channel axis gets another width: value → (axis, width).
        reordered: Values whose channels come in another order: value → the order.
        mixed: Other values in which the channels are not what they were.
        parted: Values of which a part goes another way: value → what is the whole again. It is
            never built, the probe alone reads it.
        recorded: New operators and their initializers, in the order in which they are built; of
            these only what ``rewired`` and ``replaced`` need.
    """

    stored: dict[Edge, ir.TensorProtocol] = field(default_factory=dict)
    rewired: dict[Edge, Operand] = field(default_factory=dict)
    biases: dict[ir.Value, FoldedTensor] = field(default_factory=dict)
    replaced: dict[ir.Value, Operand] = field(default_factory=dict)
    resized: dict[ir.Value, tuple[int, int]] = field(default_factory=dict)
    reordered: dict[ir.Value, Expression] = field(default_factory=dict)
    mixed: list[ir.Value] = field(default_factory=list)
    parted: dict[ir.Value, Operand] = field(default_factory=dict)
    recorded: list[Entry] = field(default_factory=list)

    def before(self, node: ir.Node) -> Recorder:
        """What notes new operators in front of ``node``."""
        return Recorder(self.recorded, node)

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that it changes, removes, or gives another value to read."""
        values = (*self.replaced, *self.biases)
        producers = {node for value in values if (node := value.producer()) is not None}
        readers = {node for value in values for node, _ in value.uses()}
        changed = {node for node, _ in (*self.stored, *self.rewired)}
        return changed | producers | readers | self._unread().nodes

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

        return total(self._gone().values()) - total(come.values())

    def reads_removed(self, min_rank: int = 0) -> int:
        """The same of what one token reads: of a table that rows are picked from, one row."""
        tables = self._new_tables()
        come = {id(tensor): tensor for tensor in self._new_tensors() if _rank(tensor) >= min_rank}
        read = sum(
            read_size(leaf, tensor, stored_size(tensor))
            for leaf, tensor in self._gone().items()
            if _rank(tensor) >= min_rank
        )
        for key, tensor in come.items():
            read -= stored_size(tensor) // (tensor.shape.numpy()[0] if key in tables else 1)
        return read

    def weights_after(self, member: End) -> int:
        """Elements that a layer or table weighs once it is applied: 0 if it is the identity."""
        if (tensor := self.stored.get(member.edge)) is not None:
            return stored_size(tensor)
        if not isinstance(member, ConstantWriter) and member.y in self.replaced:
            return self.weights_in_place_of(member.y)
        return stored_size(member.weight.tensor)

    def weights_in_place_of(self, value: ir.Value) -> int:
        """Elements of the new matrices by which what takes its place is made."""
        entries = leading_to([self.replaced[value]])
        tensors = [entry.content for entry in entries if isinstance(entry, Held)]
        matrices = [t for t in tensors if isinstance(t, FoldedTensor) and _rank(t) >= 2]
        return sum(map(stored_size, matrices))

    @property
    def drops_implied(self) -> bool:
        """Whether a matrix goes that was written out only to be merged."""
        return any(isinstance(tensor, ImpliedTensor) for tensor in self._gone().values())

    def _gone(self) -> dict[ir.Value, ir.TensorProtocol]:
        """The weights that go, by what holds them."""
        values = self._unread().values
        held = {each.leaf: each for each in map(constant, values) if each is not None}
        gone = {leaf: each for leaf, each in held.items() if leaf in values}
        return {leaf: each.tensor for leaf, each in gone.items() if each.dtype in FLOATS}

    def work(self) -> Work:
        """What it adds for one token."""
        steps = self._steps()
        copied, gathered = moved(steps)
        known, gone = widths(steps), self._unread().nodes
        for value, new in self.replaced.items():
            maker = value.producer()
            if maker in gone and maker is not None and operator(maker) in _MOVES:
                copied -= known.get(new, 0)
        sums = sorted(
            (known.get(step.outputs[0], 0) for step in steps if is_sum(step)), reverse=True
        )
        copied -= sum(sums[: sum(map(is_sum, gone))])  # those that go did the same
        come = [step for step in steps if not makes_sizes(step)]
        left = [node for node in gone if not _makes_constant(node) and not makes_sizes(node)]
        return Work(len(come) + self._sums_and_names() - len(left), copied, gathered)

    def nodes_change(self) -> int:
        """Operators that come, less those that go; what only makes constants does not count."""
        gone = [node for node in self._unread().nodes if not _makes_constant(node)]
        return len(self._steps()) + self._sums_and_names() - len(gone)

    def _sums_and_names(self) -> int:
        """An Add for each bias, and an Identity for outputs of the graph that exist already."""
        ends = [self._resolve(value) for value in self.replaced if value.is_graph_output()]
        made = {end for end in ends if isinstance(end, Made)}
        return len(self.biases) + len(ends) - len(made)

    def names(self) -> set[str]:
        """Names of the initializers, nodes and values that it changes or removes."""
        gone, edges = self._unread(), [*self.stored, *self.rewired]
        nodes = {node for node, _ in edges} | {value.producer() for value in self.replaced}
        values = [node.inputs[index] for node, index in edges if index < len(node.inputs)]
        leaves = [held.leaf for held in map(constant, values) if held is not None]
        found = [*values, *leaves, *self.replaced, *self.biases, *nodes, *gone.nodes, *gone.values]
        return {each.name for each in found if each is not None and each.name}

    def is_finite(self, device: Device, given: Mapping[Expression, Any]) -> bool:
        """Whether some rows and columns of every new initializer can be stored."""
        generator = np.random.default_rng(0)
        samples = (sampled(tensor.rounded, generator) for tensor in self._new_tensors())
        return all(np.isfinite(evaluate(part, device, given)).all() for part in samples)

    def shared(self) -> list[str]:
        """Names of initializers that have to stay because something else reads them too."""
        gone, read = self._unread(), self._read_by_steps()
        values = [node.inputs[index] for node, index in self.stored if index < len(node.inputs)]
        held = map(constant, [*values, *(value for node in gone.nodes for value in node.inputs)])
        staying = {
            each.leaf.name or "?"
            for each in held
            if each is not None and each.dtype in FLOATS
            if each.leaf not in gone.values and each.value not in read
        }
        return sorted(staying)

    def _new_tensors(self) -> Iterator[FoldedTensor]:
        held = (entry.content for entry in self._entries() if isinstance(entry, Held))
        for tensor in (*self.stored.values(), *self.biases.values(), *held):
            if isinstance(tensor, FoldedTensor):
                yield tensor

    def _new_tables(self) -> set[int]:
        """Ids of the new tensors from which nothing but rows is picked."""
        picked: dict[int, list[bool]] = defaultdict(list)
        for (node, index), tensor in self.stored.items():
            picked[id(tensor)].append(_picks_rows(node, index))
        for step in self._steps():
            for index, operand in enumerate(step.inputs):
                if isinstance(operand, Held):
                    picked[id(operand.content)].append(_picks_rows(step, index))
        return {key for key, picks in picked.items() if all(picks)}

    def _entries(self) -> list[Entry]:
        """What has to be built, in order."""
        needed = leading_to([*self.rewired.values(), *self.replaced.values()])
        return [entry for entry in self.recorded if entry in needed]

    def _steps(self) -> list[Step]:
        return [entry for entry in self._entries() if isinstance(entry, Step)]

    def _resolve(self, value: ir.Value) -> Operand:
        """What ``value`` has become, where replacements follow on each other."""
        new: Operand = value
        while isinstance(new, ir.Value) and new in self.replaced:
            new = self.replaced[new]
        return new

    def _read_by_steps(self) -> set[ir.Value]:
        """The values that new operators read once the change is applied.

        They read what takes the place of a value, but for those that make just that.
        """
        own = {value: leading_to([new]) for value, new in self.replaced.items()}
        read: set[ir.Value] = set()
        for step in self._steps():
            for operand in step.inputs:
                if isinstance(operand, Present):
                    node, index = operand.edge
                    operand = None if operand.edge in self.stored else node.inputs[index]
                if isinstance(operand, ir.Value) and step not in own.get(operand, ()):
                    operand = self._resolve(operand)
                if isinstance(operand, ir.Value):
                    read.add(operand)
        return read

    def _unread(self) -> Unread:
        """What nothing reads any more once the change is applied."""
        read = self._read_by_steps() | (self.biases.keys() - self.replaced.keys())
        stand_in: dict[ir.Value, list[ir.Value]] = defaultdict(list)
        for value in self.replaced:
            if isinstance(new := self._resolve(value), ir.Value):
                stand_in[new].append(value)
        edges = self.stored.keys() | self.rewired.keys()
        gone = Unread()

        def stays(value: ir.Value) -> bool:
            uses = value.uses()
            is_used = any(u.node not in gone.nodes and (u.node, u.idx) not in edges for u in uses)
            return is_used or value.is_graph_output()

        def is_read(value: ir.Value) -> bool:
            own = () if value in self.replaced else (value,)
            return value in read or any(map(stays, (*own, *stand_in[value])))

        suspects = [node.inputs[index] for node, index in edges if index < len(node.inputs)]
        queue = [*filter(None, suspects), *self.replaced]
        while queue:
            suspect = queue.pop()
            if is_read(suspect):
                continue
            node = suspect.producer()
            if node is None:
                if suspect.is_initializer() and not suspect.is_graph_input():
                    gone.values.add(suspect)
            elif node not in gone.nodes and not any(map(is_read, node.outputs)):
                gone.nodes.add(node)
                gone.values.update(node.outputs)
                inputs = [value for value in node.inputs if value is not None]
                became = map(self._resolve, inputs)
                queue += [*inputs, *(value for value in became if isinstance(value, ir.Value))]
        return gone

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
        entries = self._entries()
        built = build(entries, editor)
        for (node, index), operand in self.rewired.items():
            suspects.append(node.inputs[index])
            node.replace_input_with(index, value_of(operand, built))
        for value, tensor in self.biases.items():
            bias = initializer(tensor)
            new[id(tensor)] = (bias, f"{value.name}_bias")
            _add_bias(editor, value, bias)
        for value in self.replaced:
            suspects.append(value)
            end = self._resolve(value)
            own = {built[made].producer() for made in _ends(leading_to([end]))}
            _replace(editor, value, value_of(end, built), own)
        for value, (axis, width) in self.resized.items():
            if value.shape is not None:
                dims = list(value.shape)
                dims[axis] = width
                value.shape = ir.Shape(dims)
        editor.remove_dead(suspects)
        for value, name in new.values():
            editor.register(value, name)
        for entry in entries:
            if isinstance(entry, Held):
                editor.register(built[entry], entry.name)


def stored_size(tensor: ir.TensorProtocol) -> int:
    """Elements that are stored of ``tensor``."""
    return tensor.stored_size if isinstance(tensor, ImpliedTensor) else tensor.size


def read_size(value: ir.Value, tensor: ir.TensorProtocol, size: int) -> int:
    """How much of the ``size`` of a constant, ``tensor``, one token reads: a row of a table."""
    is_table = bool(value.uses()) and all(_picks_rows(node, index) for node, index in value.uses())
    dims = tensor.shape.numpy()
    return size // max(1, dims[0]) if is_table and dims else size


def _picks_rows(node: ir.Node | Step, index: int) -> bool:
    """Whether an input is a table, of which ``node`` picks rows."""
    name = node.operator if isinstance(node, Step) else operator(node)
    axis = node.attributes.get("axis", 0)
    number = axis.as_int() if isinstance(axis, ir.Attr) else axis
    return name == "Gather" and index == 0 and number == 0


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


def _makes_constant(node: ir.Node) -> bool:
    return all(constant(output) is not None for output in node.outputs)


def _ends(entries: Iterable[Entry]) -> list[Made]:
    return [Made(entry) for entry in entries if isinstance(entry, Step)]


def _replace(editor: Editor, old: ir.Value, new: ir.Value, own: Set[ir.Node | None]) -> None:
    """Let everything that reads ``old`` read ``new``, but for its ``own`` nodes, which make it.

    A graph output keeps its name.
    """
    uses = [use for use in old.uses() if use.node not in own]
    if old.is_graph_output() and new.producer() in own and not new.is_graph_output():
        new.type, new.shape, new.name = old.type, old.shape, old.name
        outputs = editor.graph.outputs
        outputs[:] = [new if each is old else each for each in outputs]
        old.name = f"{old.name}_unused"
    elif old.is_graph_output():
        node, maker = old.producer(), new.producer()
        assert node is not None
        identity = ir.node("Identity", [new], name=editor.unused_node_name(f"{node.name}_output"))
        output = identity.outputs[0]
        output.type, output.shape, output.name = old.type, old.shape, old.name
        if maker is not None and len(uses) < len(old.uses()):
            editor.graph.insert_after(maker, identity)
        else:
            editor.graph.insert_before(node, identity)
        outputs = editor.graph.outputs
        outputs[:] = [output if each is old else each for each in outputs]
        old.name = f"{old.name}_unused"
        new = output
    for user, index in uses:
        user.replace_input_with(index, new)
