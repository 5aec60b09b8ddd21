"""Which execution provider runs each node, as the session itself tells.

A session of the CUDA provider may run any node on the CPU, without a word. For shape arithmetic
that is right: ONNX Runtime keeps what it computes from shapes and small constants there. A layer
with weights, or an attention core, belongs on the device.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

from onnx_fold.graph.constants import FLOATS, constant
from onnx_fold.graph.widen import precision

RECORD = "session.record_ep_graph_assignment_info"
"""Key of the session configuration that makes a session remember where its nodes run."""

CPU = "CPUExecutionProvider"

PRODUCTS = frozenset(
    [
        "MatMul",
        "Gemm",
        "Einsum",
        "Conv",
        "ConvTranspose",
        "FusedMatMul",
        "FusedGemm",
        "FusedConv",
        "GemmFastGelu",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulInteger",
        "QLinearMatMul",
        "ConvInteger",
        "QLinearConv",
    ]
)
"""Operators that belong on the device if they read a weight."""

CORES = frozenset(
    [
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "DecoderMaskedMultiHeadAttention",
        "QAttention",
        "MoE",
        "QMoE",
        "LSTM",
        "GRU",
        "RNN",
    ]
)
"""Operators that belong on the device."""

SMALL = 100
"""Elements of a constant up to which ONNX Runtime may keep what reads it on the CPU."""


def placement(session: Any) -> dict[str, Counter[str]] | None:
    """Return how many operators of each type every execution provider runs.

    ``{"CUDAExecutionProvider": {"MatMul": 24}, "CPUExecutionProvider": {"Gather": 2}}``, in the
    graph as ONNX Runtime partitioned it: constants are folded, some nodes are fused.

    Args:
        session: An ``onnxruntime.InferenceSession`` of :func:`onnx_fold.runtime.sessions.session`.

    Returns:
        The counts, or None where ONNX Runtime is too old to tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for provider, node in _assigned(session):
        counts[provider][node.op_type] += 1
    return dict(counts)


def misplaced(session: Any, model: Callable[[], ir.Model]) -> list[str]:
    """Return the nodes on the CPU that belong on the device: ``MatMul 'fc_in' (bfloat16)``.

    Args:
        session: A session for which :func:`placement` is known.
        model: Loads the model of the session; is called only if a node may be misplaced.
    """
    found = [
        node
        for provider, node in _assigned(session)
        if provider == CPU and node.op_type in PRODUCTS | CORES
    ]
    if not found:
        return []
    loaded = model()
    known = defaultdict(list)
    for node in loaded.graph.all_nodes():
        known[node.op_type, node.name or ""].append(node)
    described = []
    for node in found:
        origin = known[node.op_type, node.name]
        if node.op_type in CORES or not origin or any(map(_reads_weight, origin)):
            dtype = _float_type(origin) or precision(loaded)
            described.append(f"{node.op_type} '{node.name}' ({dtype.name.lower()})")
    return described


def _assigned(session: Any) -> Iterator[tuple[str, Any]]:
    for subgraph in session.get_provider_graph_assignment_info():
        for node in subgraph.get_nodes():
            yield subgraph.ep_name, node


def _reads_weight(node: ir.Node) -> bool:
    return any((held := constant(value)) and held.size > SMALL for value in node.inputs)


def _float_type(nodes: Sequence[ir.Node]) -> ir.DataType | None:
    values = (value for node in nodes for value in (*node.inputs, *node.outputs) if value)
    return next((value.dtype for value in values if value.dtype in FLOATS), None)
