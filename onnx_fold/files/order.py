"""Graphs as ONNX has them today: writers before readers, and inputs that are none but inputs.

ONNX Runtime takes nodes in any order, and old files list their initializers among the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnx_fold.files.wellformed import MalformedError

_PLACE = "onnx_fold.place"
"""Under this name a node of a sorted copy keeps the place that it had."""


_LISTED = "onnx_fold.listed"
"""Under this name a copy without listed initializers keeps its IR version and inputs."""

_OVERRIDABLE = 4
"""The first IR version in which a caller can override initializers that are inputs, too. Before it
all of them have to be inputs, and ONNX Runtime takes them for constants."""


def without_listed_initializers(model: ir.Model) -> ir.Model:
    """``model``, or if its IR version lists initializers among the inputs a copy that does not."""
    if (model.ir_version or _OVERRIDABLE) >= _OVERRIDABLE:
        return model
    copy, names = model.clone(), [value.name for value in model.graph.inputs]
    inputs = [value for value in copy.graph.inputs if not value.is_initializer()]
    copy.graph.inputs[:] = inputs
    copy.ir_version = _OVERRIDABLE
    copy.graph.meta[_LISTED] = model.ir_version, names
    return copy


def in_order(model: ir.Model) -> ir.Model:
    """``model`` if every value is written before it is read, else a copy with sorted nodes.

    The sort is stable, in the graph, in the bodies of control flow and in functions.

    Raises:
        MalformedError: Nodes wait for each other, read what nothing writes, or do not fit the
            function that they call.
    """
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (each for graph in graphs for each in graph.all_nodes()):
        _check_node(node, model)
    unsorted = [graph for graph in graphs if not _is_sorted(graph)]
    if not unsorted:
        return model
    nodes = {body: list(body) for graph in unsorted for body in (graph, *graph.subgraphs())}
    try:
        for order in nodes.values():
            for place, node in enumerate(order):
                node.meta[_PLACE] = place
        for graph in unsorted:
            graph.sort()
        return model.clone()
    except ValueError:
        raise MalformedError("its nodes form a cycle") from None
    finally:
        for body, order in nodes.items():
            body.extend(order)
            for node in order:
                node.meta.pop(_PLACE, None)


def copied(model: ir.Model) -> ir.Model:
    """A copy of ``model``, whose nodes may stand in any order, with nodes in the same order."""
    ordered = in_order(model)
    copy = ordered.clone()
    if ordered is not model:
        put_back(copy)
    return copy


def put_back(model: ir.Model) -> None:
    """Give a copy of what these functions made the order, inputs and IR version that it had."""
    if _LISTED in model.graph.meta:
        model.ir_version, names = model.graph.meta.pop(_LISTED)
        graph = model.graph
        values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
        graph.inputs[:] = [values[name] for name in names]
    graphs = [*model.graphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.graph.subgraphs()]
    for graph in graphs:
        if all(_PLACE in node.meta for node in graph):
            graph.extend(sorted(graph, key=lambda node: node.meta.pop(_PLACE)))


def _is_sorted(graph: ir.Graph, written: set[ir.Value] | None = None) -> bool:
    """Whether all values are written, in ``graph`` or around it, before they are read."""
    written = set() if written is None else written
    written.update(graph.inputs, graph.initializers.values())
    is_sorted = True
    for node in graph:
        late = [value for value in node.inputs if value is not None and value not in written]
        for value in late:
            if not _is_written(value):
                raise MalformedError(f"{_named(node)} reads '{value.name}', which nothing writes")
        bodies = [_is_sorted(body, written) for body in _bodies(node)]
        is_sorted &= not late and all(bodies)
        written.update(node.outputs)
    for value in graph.outputs:
        if value not in written:
            raise MalformedError(f"nothing writes the output '{value.name}'")
    return is_sorted


def _check_node(node: ir.Node, model: ir.Model) -> None:
    """Refuse calls that do not fit their function, and what cannot be written."""
    function = model.functions.get(node.op_identifier())
    if function is not None and (
        len(node.inputs) > len(function.inputs) or len(node.outputs) != len(function.outputs)
    ):
        raise MalformedError(f"{_named(node)} does not fit the function that it calls")
    if node.device_configurations:
        try:
            ir.to_proto(node)
        except Exception as error:
            raise MalformedError(f"{_named(node)} has a device that is not known") from error


def _is_written(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _named(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'" if node.name else f"a node {node.op_type}"


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()
