"""Small changes of one graph: new nodes and initializers, free names, dead ends removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def initializer(tensor: ir.TensorProtocol) -> ir.Value:
    """A nameless constant value that holds ``tensor``."""
    value = ir.Value(shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    value.type = ir.TensorType(tensor.dtype)
    return value


class Editor:
    """Changes one graph, which nothing else changes meanwhile, and knows which names are taken.

    Attributes:
        graph: The graph.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._nodes = {node.name for node in graph}
        self._values = {value.name for node in graph.all_nodes() for value in node.outputs}
        for each in (graph, *graph.subgraphs()):
            self._values |= set(each.initializers) | {value.name for value in each.inputs}

    def constant(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """Add an initializer that holds ``tensor``, called ``name`` if that is free."""
        value = initializer(tensor)
        self.register(value, name)
        return value

    def integers(self, numbers: npt.ArrayLike, name: str) -> ir.Value:
        """Add an initializer that holds ``numbers`` as int64, called ``name`` if that is free."""
        return self.constant(ir.tensor(np.asarray(numbers, dtype=np.int64)), name)

    def register(self, value: ir.Value, name: str) -> None:
        """Add a constant value to the initializers, called ``name`` if that is free."""
        value.name = self.unused_name(name)
        self.graph.register_initializer(value)

    def node(
        self,
        before: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        num_outputs: int = 1,
        **attributes: int | Sequence[int],
    ) -> ir.Node:
        """Insert an operator in front of ``before``, named after it."""
        name = self.unused_node_name(f"{before.name or before.op_type}_{operator}")
        node = ir.node(operator, inputs, attributes=attributes, num_outputs=num_outputs, name=name)
        self.graph.insert_before(before, node)
        for index, value in enumerate(node.outputs):
            value.name = self.unused_name(name if num_outputs == 1 else f"{name}_{index}")
        return node

    def split(
        self, before: ir.Node, value: ir.Value, sizes: Sequence[int], axis: int = -1
    ) -> Sequence[ir.Value]:
        """Split one axis of ``value`` into parts of ``sizes``."""
        count = len(sizes)
        if self.graph.opset_imports.get("", 13) < 13:
            return self.node(before, "Split", [value], count, axis=axis, split=list(sizes)).outputs
        held = self.integers(sizes, f"{before.name or before.op_type}_sizes")
        return self.node(before, "Split", [value, held], count, axis=axis).outputs

    def pad(self, before: ir.Node, value: ir.Value, pads: Sequence[int]) -> ir.Value:
        """Pad ``value`` with zeros: ``pads`` in front of each axis, and then behind each."""
        if self.graph.opset_imports.get("", 13) < 11:
            return self.node(before, "Pad", [value], pads=list(pads)).outputs[0]
        held = self.integers(pads, f"{before.name or before.op_type}_pads")
        return self.node(before, "Pad", [value, held]).outputs[0]

    def remove_dead(self, suspects: Iterable[ir.Value | None]) -> None:
        """Remove what makes ``suspects`` if nothing reads it, and then what only that read."""
        queue = list(suspects)
        while queue:
            value = queue.pop()
            if value is None or value.uses() or value.is_graph_output():
                continue
            node = value.producer()
            if node is None:
                if value.is_initializer() and not value.is_graph_input() and value.name:
                    self.graph.initializers.pop(value.name, None)
                    self._values.discard(value.name)
                continue
            is_read = any(output.uses() or output.is_graph_output() for output in node.outputs)
            if node.graph is None or is_read:
                continue
            queue.extend(node.inputs)
            self.graph.remove(node, safe=True)
            self._nodes.discard(node.name)
            self._values.difference_update(output.name for output in node.outputs)

    def unused_name(self, name: str) -> str:
        """``name``, or ``name_folded``, ``name_folded_1``, ... if it is taken here or in a body."""
        candidate, count = name, 0
        while candidate in self._values:
            candidate = f"{name}_folded" + (f"_{count}" if count else "")
            count += 1
        self._values.add(candidate)
        return candidate

    def unused_node_name(self, name: str) -> str:
        """``name``, or ``name_1``, ``name_2``, ... if a node is called so."""
        candidate, count = name, 0
        while candidate in self._nodes:
            count += 1
            candidate = f"{name}_{count}"
        self._nodes.add(candidate)
        return candidate
