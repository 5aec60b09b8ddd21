"""Attention cores, seen from the projections in front: which is Q, K or V, and its heads."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_fold.graph.channels import channels
from onnx_fold.graph.constants import constant
from onnx_fold.graph.linear import as_linear
from onnx_fold.graph.operators import contrib, operator
from onnx_fold.graph.shapes import Dims, Shapes

_ATTENTION_OPERATORS = frozenset(("Attention",)) | contrib(
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention"),
    *("DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention"),
)
_PRODUCTS = frozenset(("MatMul", "Gemm", "Einsum")) | contrib("FusedMatMul")
_AFTER_SCORES = frozenset(
    ("Cast", "Where", "IsNaN", "Identity", "Dropout", "Mul", "Div", "Add", "Reshape", "Transpose")
)


def role(value: ir.Value) -> str | None:
    """``"q"``, ``"k"`` or ``"v"`` if ``value`` flows into that side of attention cores, else None.

    None too if it flows into several, as a fused projection does.
    """
    found = roles(value)
    return next(iter(found)) if len(found) == 1 else None


def roles(value: ir.Value) -> frozenset[str]:
    """The sides of attention cores, of ``"q"``, ``"k"``, ``"v"``, that ``value`` flows into.

    Followed forwards to the first product of two computed values: the scores (Q on the left, K on
    the right) or the product of probabilities and V; or to an attention operator.
    """
    found: set[str] = set()
    queue, seen = [value], {value}
    while queue:
        current = queue.pop(0)
        for node, index in current.uses():
            if operator(node) in _ATTENTION_OPERATORS:
                if index > 2:
                    return frozenset()
                is_packed = len(node.inputs) > 1 and node.inputs[1] is None
                found |= set("qkv" if is_packed else "qkv"[index])
            elif operator(node) in _PRODUCTS and len(node.inputs) > 1:
                left, right = node.inputs[0], node.inputs[1]
                if left is None or right is None or _multiplies_weights(node):
                    return frozenset()  # another linear layer: no attention between
                is_value = index == 1 and _is_probability(left)
                found.add("v" if is_value else "k" if index == 1 else "q")
            elif operator(node) == "Softmax":
                return frozenset()
            else:
                onward = [v for v in node.outputs if v not in seen]
                is_type = operator(node) == "CastLike" and index == 1
                if operator(node) not in ("Shape", "Size") and not is_type:
                    seen.update(onward)
                    queue.extend(onward)
    return frozenset(found)


def _multiplies_weights(node: ir.Node) -> bool:
    return as_linear(node) is not None or any(map(constant, node.inputs))


def _is_probability(value: ir.Value) -> bool:
    """Whether ``value`` comes out of a Softmax, a few harmless operators back."""
    queue = [value]
    for _ in range(16):
        if not queue:
            return False
        node = queue.pop(0).producer()
        if node is None:
            continue
        if operator(node) == "Softmax":
            return True
        if operator(node) in _AFTER_SCORES:
            queue.extend(operand for operand in node.inputs if operand is not None)
    return False


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one projection: ``heads`` of ``head_dim`` channels each."""

    heads: int
    head_dim: int


def head_layout(value: ir.Value, width: int, shapes: Shapes) -> HeadLayout | None:
    """How the ``width`` channels of ``value`` are cut into heads: by a Reshape, or in the core."""
    for _ in range(8):
        for node, index in value.uses():
            if operator(node) in _ATTENTION_OPERATORS and index < 3:
                heads = _heads_of(node, index)
                return _layout((heads, None), width) if heads else None
            dims = shapes(node.outputs[0]) if operator(node) == "Reshape" and index == 0 else None
            if dims is not None and len(dims) == 4 and (found := _layout(dims, width)) is not None:
                return found
        onward = [node for node, index in value.uses() if _leads_to_heads(node, index)]
        if not onward:
            return None
        value = onward[0].outputs[0]
    return None


def _leads_to_heads(node: ir.Node, index: int) -> bool:
    """Whether that input of ``node`` is what it passes on."""
    return channels(node).leads_to_heads and (index == 0 or operator(node) == "Add")


def _heads_of(core: ir.Node, index: int) -> int:
    """Heads of an input of an attention operator of three dimensions, where the heads are one."""
    queries = core.attributes.get_int("num_heads", core.attributes.get_int("q_num_heads", 0))
    return queries if index == 0 else core.attributes.get_int("kv_num_heads", queries)


def _layout(dims: Dims, width: int) -> HeadLayout | None:
    """The layout from ``[..., heads, head_dim]``, one of which may be known at run time only."""
    heads, head_dim = dims[-2:]
    if isinstance(heads, int) and not isinstance(head_dim, int):
        head_dim = width // heads
    elif isinstance(head_dim, int) and not isinstance(heads, int):
        heads = width // head_dim
    if isinstance(heads, int) and isinstance(head_dim, int) and heads * head_dim == width:
        return HeadLayout(heads, head_dim)
    return None


def attention_kind(num_heads: int, num_kv_heads: int) -> str:
    """MHA (as many key/value heads as query heads), MQA (one), or GQA (between)."""
    if num_heads == num_kv_heads:
        return "MHA"
    return "MQA" if num_kv_heads == 1 else "GQA"
