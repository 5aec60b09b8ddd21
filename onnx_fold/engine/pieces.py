"""Streams cut out of a model, before and after they were folded.

A fold changes the values of its stream, and nothing else. So a stream is cut out of both models at
values that mean the same in both: from its outputs, the nearest such values behind its readers,
back to the nearest such values in front of its writers. Both pieces are then models with the same
inputs and outputs, which compute the same function if the fold is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_fold.engine.outcome import StreamReport
from onnx_fold.graph.constants import FLOATS

__all__ = ["cut", "typed"]


def typed(model: ir.Model) -> ir.Model:
    """``model`` with the types and shapes of its values, inferred where they are missing."""
    values = [value for node in model.graph for value in node.outputs if value.name]
    if all(value.type is not None and value.shape is not None for value in values):
        return model
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    return copy


def cut(
    models: tuple[ir.Model, ir.Model], stream: StreamReport, changed: frozenset[str]
) -> tuple[ir.Model, ir.Model] | None:
    """The part around ``stream`` of both models; None if they cannot be cut at the same values."""
    before, after = (_values(model) for model in models)
    same = {name for name in before.keys() & after.keys() if name not in changed}
    ends = {
        name
        for name in same
        if before[name].is_graph_input() or (_is_cut(before[name]) and _is_cut(after[name]))
    }
    outputs = _behind([before[name] for name in stream.changed if name in before], same) & ends
    if not outputs:
        return None
    while True:
        inputs = [
            _in_front((values[name] for name in outputs), ends - outputs)
            for values in (before, after)
        ]
        apart = {name for name in inputs[0] ^ inputs[1] if not before[name].is_graph_input()}
        if not apart:
            break
        ends -= apart  # one of them does without: what both read lies in front of it
    if inputs[0] != inputs[1]:
        return None
    first, second = (_extract(model, sorted(inputs[0]), sorted(outputs)) for model in models)
    return first, second


def _values(model: ir.Model) -> dict[str, ir.Value]:
    outputs = (value for node in model.graph for value in node.outputs)
    return {value.name: value for value in (*model.graph.inputs, *outputs) if value.name}


def _is_cut(value: ir.Value) -> bool:
    """Whether inputs can be made in the place of ``value``: floats of a known shape."""
    shape = value.shape
    return (
        value.dtype in FLOATS
        and bool(shape)
        and all(isinstance(dim, int) or dim.value is not None for dim in shape or ())
    )


def _behind(values: Iterable[ir.Value], same: set[str]) -> set[str]:
    """The first values of the original behind ``values`` that are the ``same`` in both models."""
    found, todo = set(), list(values)
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().uses():
            for value in node.outputs:
                if value.name in same:
                    found.add(value.name)
                elif value not in seen:
                    seen.add(value)
                    todo.append(value)
    return {name for name in found if name}


def _in_front(values: Iterable[ir.Value], ends: set[str]) -> set[str]:
    """The nearest of ``ends`` that ``values`` are computed from."""
    return {value.name for value in _needed(values, ends) if value.name in ends and value.name}


def _needed(values: Iterable[ir.Value], ends: set[str]) -> Iterator[ir.Value]:
    todo = list(values)
    seen = set(todo)
    while todo:
        value = todo.pop()
        yield value
        node = None if value.name in ends else value.producer()
        for each in _read(node):
            if each not in seen:
                seen.add(each)
                todo.append(each)


def _read(node: ir.Node | None) -> Iterator[ir.Value]:
    """What ``node`` reads, the bodies of its control flow included."""
    if node is None:
        return
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        bodies = attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = (attribute.as_graph(),)
        for body in bodies:
            for inner in body.all_nodes():
                yield from (value for value in inner.inputs if value is not None)


def _extract(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
