"""Model-local functions that hide a stream: their calls are replaced by their bodies.

Only functions that hold a linear layer, or nothing but operators that may lie inside a stream, are
inlined; an activation or a norm ends a stream inlined or not.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

from onnx_fold.graph.channels import OPERATORS as CHANNELS
from onnx_fold.graph.channels import Group
from onnx_fold.graph.linear import OPERATORS
from onnx_fold.graph.operators import operator

_INERT = {"Constant", "Shape", "Size"} | {
    name for name, each in CHANNELS.items() if each.group == Group.GENERAL
}


def inline(model: ir.Model) -> ir.Model:
    """A copy of ``model`` in which no function call hides a stream; ``model`` if none does."""
    chosen = _hiding(model)
    if not chosen:
        return model
    copy = model.clone()
    InlinePass(lambda function: function.identifier() in chosen)(copy)
    return copy


def inline_all(model: ir.Model) -> None:
    """Replace all calls in ``model`` but those of functions that are for other opsets.

    Functions that are called nowhere are removed.
    """
    if model.functions:
        InlinePass(lambda function: _has_opsets_of(model, function))(model)
        unused = RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
        unused(model)


def _has_opsets_of(model: ir.Model, function: ir.Function) -> bool:
    own = model.opset_imports
    return all(own.get(domain, v) == v for domain, v in function.opset_imports.items())


def _hiding(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """The functions that a stream may run into, those that they call among them."""
    chosen: set[ir.OperatorIdentifier] = set()
    while True:
        new = {
            name
            for name, function in model.functions.items()
            if name not in chosen and _hides(function, model, chosen)
        }
        if not new:
            return chosen
        chosen |= new


def _hides(function: ir.Function, model: ir.Model, chosen: set[ir.OperatorIdentifier]) -> bool:
    """Whether a stream may run into ``function``, and its body can stand in the graph."""
    nodes = list(function.all_nodes())
    if not _has_opsets_of(model, function):
        return False
    if any(_holds_weight(node) or _holds_graph(node) for node in nodes):
        return False
    is_call = [node.op_identifier() in chosen for node in nodes]
    if any(call or operator(node) in OPERATORS for node, call in zip(nodes, is_call, strict=True)):
        return True
    return all(operator(node) in _INERT for node in nodes)


def _holds_weight(node: ir.Node) -> bool:
    """Whether ``node`` is a matrix, of which every call would get a copy."""
    value = node.attributes.get("value") if operator(node) == "Constant" else None
    return value is not None and not value.is_ref() and len(value.as_tensor().shape) > 1


def _holds_graph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())
