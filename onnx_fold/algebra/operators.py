"""ONNX operators on arrays, by ``onnx.reference``: what a matrix becomes that is no product."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy import special

from onnx_fold.algebra.device import Array

__all__ = ["Erf", "Gelu", "on_rows"]

_BLOCK = 2**22
"""Elements of rows that go through an operator at a time."""


class Erf(OpRun):
    """The error function, in the type of its input; that of ``onnx.reference`` is in float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(special.erf(x)).astype(x.dtype),)


class Gelu(OpRun):
    """``x Φ(x)``, in the type of its input; that of ``onnx.reference`` is exact to float32 only."""

    op_domain = ""

    def _run(self, x: Array, approximate: str | None = None) -> tuple[Array]:
        if approximate == "tanh":
            gate = 1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
        else:
            gate = 1.0 + special.erf(x / math.sqrt(2.0))
        return (np.asarray(0.5 * x * gate).astype(x.dtype),)


def on_rows(
    proto: bytes, opset: int, operands: Sequence[Array | None], ranks: Sequence[int | None]
) -> Array:
    """What an operator makes of each row by itself.

    Args:
        proto: A ``NodeProto`` of ONNX's own domain, serialised; it has one output.
        opset: The version of the domain.
        operands: What it reads: rows ``[n, width]``, all with the same ``n``, and constants; None
            for an input that is left out.
        ranks: The rank that the operator is to see of each operand that is rows, ``[n, 1, ...,
            width]``, so that axes are what they are in the graph; None for a constant.

    Returns:
        ``[n, width]``, in the type of the rows.
    """
    rows = [x for x, rank in zip(operands, ranks, strict=True) if x is not None and rank]
    count, widest = len(rows[0]), max(x.shape[1] for x in rows)
    step = max(1, _BLOCK // max(1, widest))
    run, names = _evaluator(proto, opset)
    parts = []
    for start in range(0, count, step):
        feed = {}
        for x, rank, name in zip(operands, ranks, names, strict=True):
            if x is None:
                continue
            if rank:
                part = x[start : start + step]
                x = part.reshape(len(part), *(1,) * (rank - 2), x.shape[1])
            feed[name] = x
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (made,) = run.run(None, feed)
        parts.append(np.asarray(made).reshape(min(step, count - start), -1))
    return np.concatenate(parts).astype(rows[0].dtype, copy=False)


@lru_cache(maxsize=64)
def _evaluator(node: bytes, opset: int) -> tuple[ReferenceEvaluator, list[str]]:
    """What runs one operator, and the names of what it reads."""
    proto = onnx.NodeProto.FromString(node)
    names = [f"i{index}" if name else "" for index, name in enumerate(proto.input)]
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.append("o")
    infos = [onnx.helper.make_empty_tensor_value_info(name) for name in (*filter(None, names), "o")]
    graph = onnx.helper.make_graph([proto], "node", infos[:-1], infos[-1:])
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    return ReferenceEvaluator(model, new_ops=[Erf, Gelu]), names
