"""Hide nodes of :mod:`traps`: in functions, in other domains, in the bodies of an If."""

from __future__ import annotations

import onnx
from onnx import helper
from traps import Graph

_INTEGERS = ("Shape", "Slice", "Concat", "Unsqueeze", "Gather")


def disguise(g: Graph) -> None:
    """Hide some nodes of ``g``, seldom more than one."""
    for hide in (as_other_domain, as_function, in_body):
        if g.nodes and g.chance(0.12):
            index = int(g.rng.integers(len(g.nodes)))
            node = g.nodes[index]
            if not node.domain and len(node.output) == 1 and _is_float(g, node):
                g.nodes[index] = hide(g, node)


def _is_float(g: Graph, node: onnx.NodeProto) -> bool:
    """Whether what ``node`` makes is one of the values that flow, or a weight."""
    if node.op_type not in _INTEGERS:
        return True
    return any(value.name == node.output[0] for value in g.values)


def as_other_domain(g: Graph, node: onnx.NodeProto) -> onnx.NodeProto:
    """The operator of the same name in another domain, which does something more."""
    return _called(g, node, "custom", node.op_type, is_same=False)


def as_function(g: Graph, node: onnx.NodeProto) -> onnx.NodeProto:
    """A function that does the same; its attributes are those of the call."""
    return _called(g, node, "custom", f"Call{len(g.functions)}", is_same=True)


def _called(
    g: Graph, node: onnx.NodeProto, domain: str, name: str, *, is_same: bool
) -> onnx.NodeProto:
    if (domain, name) in g.functions:
        return node
    inputs = [f"a{i}" if used else "" for i, used in enumerate(node.input)]
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.ClearField("input")
    inner.input.extend(inputs)
    inner.output[0] = "out" if is_same else "t"
    names = [attribute.name for attribute in node.attribute]
    for attribute in inner.attribute:
        kind, label = attribute.type, attribute.name
        attribute.Clear()
        attribute.name, attribute.type, attribute.ref_attr_name = label, kind, label
    body = [inner]
    if not is_same:
        body.append(helper.make_node("Abs", ["t"], ["out"]))
    imports = [helper.make_opsetid("", g.opset)]
    g.functions[domain, name] = helper.make_function(
        domain, name, [i for i in inputs if i], ["out"], body, imports, names
    )
    call = onnx.NodeProto()
    call.CopyFrom(node)
    call.ClearField("input")
    call.input.extend(i for i in node.input if i)
    call.domain, call.op_type = domain, name
    return call


def in_body(g: Graph, node: onnx.NodeProto) -> onnx.NodeProto:
    """An If whose branches both do what ``node`` did."""
    g.inputs["flag"] = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    bodies = []
    for branch in ("then", "else"):
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.output[0] = f"{node.output[0]}_{branch}"
        info = helper.make_tensor_value_info(inner.output[0], g.element, None)
        bodies.append(helper.make_graph([inner], branch, [], [info]))
    return helper.make_node(
        "If", ["flag"], list(node.output), node.name, then_branch=bodies[0], else_branch=bodies[1]
    )
