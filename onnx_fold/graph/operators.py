"""Which operator a node is: its name says nothing without its domain."""

from __future__ import annotations

import onnx_ir as ir

STANDARD = ("", "ai.onnx")
"""The names of ONNX's own domain."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's operators."""


def operator(node: ir.Node) -> str:
    """``"Add"`` for an operator of ONNX's own domain, ``"domain::Add"`` for any other."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads ``value``, if it does so once and nothing else needs it."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return next(iter(value.uses())).node


def contrib(*names: str) -> frozenset[str]:
    """What :func:`operator` calls the operators of ONNX Runtime that have these names."""
    return frozenset(f"{MICROSOFT}::{name}" for name in names)
