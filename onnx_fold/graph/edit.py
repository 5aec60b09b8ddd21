"""Small changes of a graph: new nodes and initializers, names that are free, dead ends removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def initializer(tensor: ir.TensorProtocol) -> ir.Value:
    """A nameless constant value that holds ``tensor``."""
    value = ir.Value(shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    value.type = ir.TensorType(tensor.dtype)
    return value


def remove_dead(graph: ir.Graph, suspects: Iterable[ir.Value | None]) -> None:
    """Remove what makes ``suspects`` if nothing reads it, and then what only that read."""
    queue = list(suspects)
    while queue:
        value = queue.pop()
        if value is None or value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer() and not value.is_graph_input() and value.name:
                graph.initializers.pop(value.name, None)
                _value_names(graph).discard(value.name)
            continue
        if node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        queue.extend(node.inputs)
        graph.remove(node, safe=True)
        _node_names(graph).discard(node.name)
        _value_names(graph).difference_update(output.name for output in node.outputs)


def new_constant(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Add an initializer that holds ``tensor``, called ``name`` if that is free."""
    value = initializer(tensor)
    value.name = unused_name(graph, name)
    graph.register_initializer(value)
    return value


def new_integers(graph: ir.Graph, numbers: npt.ArrayLike, name: str) -> ir.Value:
    """Add an initializer that holds ``numbers`` as int64, called ``name`` if that is free."""
    return new_constant(graph, ir.tensor(np.asarray(numbers, dtype=np.int64)), name)


def new_node(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    num_outputs: int = 1,
    **attributes: int | Sequence[int],
) -> ir.Node:
    """Insert an operator in front of ``before``, named after it."""
    name = unused_node_name(graph, f"{before.name or before.op_type}_{operator}")
    node = ir.node(operator, inputs, attributes=attributes, num_outputs=num_outputs, name=name)
    graph.insert_before(before, node)
    for index, value in enumerate(node.outputs):
        value.name = unused_name(graph, name if num_outputs == 1 else f"{name}_{index}")
    return node


def new_split(
    graph: ir.Graph, before: ir.Node, value: ir.Value, sizes: Sequence[int]
) -> Sequence[ir.Value]:
    """Split the last axis of ``value`` into parts of ``sizes``."""
    if graph.opset_imports.get("", 13) < 13:
        node = new_node(graph, before, "Split", [value], len(sizes), axis=-1, split=list(sizes))
    else:
        held = new_integers(graph, sizes, f"{before.name or before.op_type}_sizes")
        node = new_node(graph, before, "Split", [value, held], len(sizes), axis=-1)
    return node.outputs


def unused_name(graph: ir.Graph, name: str) -> str:
    """``name``, or ``name_folded``, ``name_folded_1``, ... if it is taken, here or in a body."""
    taken = _value_names(graph)
    candidate, count = name, 0
    while candidate in taken:
        candidate = f"{name}_folded" + (f"_{count}" if count else "")
        count += 1
    taken.add(candidate)
    return candidate


def unused_node_name(graph: ir.Graph, name: str) -> str:
    """``name``, or ``name_1``, ``name_2``, ... if a node is called so."""
    taken = _node_names(graph)
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


_VALUES, _NODES = "onnx_fold.value_names", "onnx_fold.node_names"


@contextlib.contextmanager
def remembered_names(graph: ir.Graph) -> Iterator[None]:
    """Look for the names of ``graph`` once, while only :class:`Rewrite` changes it."""
    graph.meta[_VALUES], graph.meta[_NODES] = _value_names(graph), _node_names(graph)
    try:
        yield
    finally:
        del graph.meta[_VALUES], graph.meta[_NODES]


def _value_names(graph: ir.Graph) -> set[str | None]:
    if (known := graph.meta.get(_VALUES)) is not None:
        return cast(set[str | None], known)
    names = {value.name for node in graph.all_nodes() for value in node.outputs}
    for each in (graph, *graph.subgraphs()):
        names |= set(each.initializers) | {value.name for value in each.inputs}
    return names


def _node_names(graph: ir.Graph) -> set[str | None]:
    if (known := graph.meta.get(_NODES)) is not None:
        return cast(set[str | None], known)
    return {node.name for node in graph}
