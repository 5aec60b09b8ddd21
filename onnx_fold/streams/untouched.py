"""Layers that are left alone: quantised ones, and those whose weight comes at run time.

A weight is quantised if its operator takes integers (MatMulNBits, MatMulInteger, QLinearMatMul), or
if it reaches an ordinary operator through a DequantizeLinear; a folded one would be rounded anew. A
weight that is a graph input, as adapters are that a server changes from call to call, is not known;
nor is an initializer that is one too, as older exporters write them, which a caller can override.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_fold.graph.constants import constant
from onnx_fold.graph.linear import described
from onnx_fold.graph.operators import contrib, operator

_OPERATORS = frozenset(("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")) | contrib(
    *("DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4"),
    *("MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QEmbedLayerNormalization"),
    *("QGemm", "QMoE"),
)
_DEQUANTIZE = frozenset(("DequantizeLinear",)) | contrib("DequantizeLinear")
_VIEWS = frozenset(("Cast", "Identity", "Reshape", "Transpose"))
_PRODUCTS = frozenset(("Gemm", "MatMul")) | contrib("FusedMatMul")
_MIN_RANK = 2  # of a weight; vectors are biases


def is_quantised(node: ir.Node) -> bool:
    """Whether ``node`` multiplies by, or looks up, a quantised weight."""
    return operator(node) in _OPERATORS or any(map(_is_dequantised, node.inputs))


def find_quantised(graph: ir.Graph) -> list[str]:
    """Names of the layers of ``graph`` whose weights are quantised, in graph order."""
    return [described(node) for node in graph if _is_layer(node)]


def is_given(node: ir.Node) -> bool:
    """Whether ``node`` multiplies by a matrix that is a graph input."""
    if operator(node) not in _PRODUCTS or constant(node.inputs[0]) is not None:
        return False
    value = _source(node.inputs[1])
    if value is None or not value.is_graph_input() or value.is_initializer():
        return False
    return value.shape is not None and len(value.shape) == _MIN_RANK and value.shape.is_static()


def is_overridable(node: ir.Node) -> bool:
    """Whether ``node`` multiplies by an initializer that is a graph input, too."""
    value = _source(node.inputs[1]) if operator(node) in (*_PRODUCTS, "Conv") else None
    return value is not None and value.is_graph_input() and value.is_initializer()


def find_given(graph: ir.Graph) -> list[str]:
    """Names of the layers of ``graph`` whose weights are graph inputs, in graph order."""
    return [described(node) for node in graph if is_given(node)]


def find_overridable(graph: ir.Graph) -> list[str]:
    """Names of the layers of ``graph`` whose weights a caller can override, in graph order."""
    return [described(node) for node in graph if is_overridable(node)]


def _is_layer(node: ir.Node) -> bool:
    return operator(node) not in _VIEWS and is_quantised(node)


def _source(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is a view of."""
    node = value.producer() if value is not None else None
    while node is not None and operator(node) in _VIEWS:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value


def _is_dequantised(value: ir.Value | None) -> bool:
    source = _source(value)
    node = source.producer() if source is not None else None
    if node is None or operator(node) not in _DEQUANTIZE:
        return False
    stored = constant(node.inputs[0])
    return stored is not None and len(stored.shape) >= _MIN_RANK
