"""Runs a graph in float64, node by node, without evaluating its large weights.

Linear operators multiply by weights as they are before rounding, see
:mod:`onnx_fold.algebra.exact`: so a piece of a model of any size runs in little memory. They are
written here from the ONNX specification, and know nothing of what the fold made of the graph. Every
other operator is run by ``onnx.reference``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.exact import Multiplier, exact, values
from onnx_fold.algebra.expression import Expression, literal, of_tensor, take, transpose
from onnx_fold.algebra.precision import is_float
from onnx_fold.check import kernels
from onnx_fold.graph.widen import widen
from onnx_fold.runtime.sessions import RunFailedError

__all__ = ["Interpreter"]

LARGE = 2**20
"""Elements from which a weight is not evaluated whole."""

Operand: TypeAlias = Array | Expression


class Interpreter:
    """Runs models; weights and LU factors that one of them needed may serve the next."""

    def __init__(self) -> None:
        self._multiplier = Multiplier()
        self._weights: dict[ir.TensorProtocol, Expression] = {}

    def run(self, model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of ``model``, by name, floats in float64.

        Args:
            model: Its floats may be of any type; folded weights are not rounded.
            inputs: By name.

        Raises:
            RunFailedError: It holds what cannot be run so: control flow, an operator that
                onnx.reference does not know, or one that needs a large weight whole.
        """
        weights = {
            value.name: self._weight(value.const_value)
            for value in model.graph.initializers.values()
            if value.const_value is not None
        }
        graph = widen(model, ir.DataType.DOUBLE).graph
        known: dict[ir.Value, Operand] = {
            value: weights[value.name] for value in graph.initializers.values()
        }
        known |= {value: _wide(inputs[str(value.name)]) for value in graph.inputs}
        for node in graph:
            operands = [None if value is None else known[value] for value in node.inputs]
            results = self._node(node, operands, graph.opset_imports)
            known.update(zip(node.outputs, results, strict=False))
        return {str(value.name): _whole(known[value], "the graph") for value in graph.outputs}

    def _weight(self, tensor: ir.TensorProtocol) -> Operand:
        if tensor.dtype == ir.DataType.STRING:
            return tensor.numpy()
        if tensor.size < LARGE or len(tensor.shape) < 2:
            return values(exact(of_tensor(tensor)))
        if tensor not in self._weights:
            self._weights[tensor] = exact(of_tensor(tensor))
        return self._weights[tensor]

    def _node(
        self, node: ir.Node, operands: Sequence[Operand | None], opsets: Mapping[str, int]
    ) -> Sequence[Operand]:
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is not None and any(isinstance(each, Expression) for each in operands):
            result = rule(self._multiplier, node, operands)
            if result is not None:
                return [result]
        arrays = [None if each is None else _whole(each, node.op_type) for each in operands]
        return _by_reference(node, arrays, opsets)


def _by_reference(
    node: ir.Node, arrays: Sequence[Array | None], opsets: Mapping[str, int]
) -> list[Array]:
    """The outputs of one node, empty where it has no name for one."""
    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend("" if array is None else f"i{i}" for i, array in enumerate(arrays))
    proto.output.extend(f"o{i}" if value.name else "" for i, value in enumerate(node.outputs))
    inputs, outputs = (
        [onnx.helper.make_empty_tensor_value_info(name) for name in names if name]
        for names in (proto.input, proto.output)
    )
    graph = onnx.helper.make_graph([proto], "node", inputs, outputs)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(*each) for each in opsets.items()]
    )
    feeds = {name: array for name, array in zip(proto.input, arrays, strict=True) if name}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            results = iter(kernels.run(kernels.evaluator(model), feeds))
        except Exception as error:  # whatever the NumPy code of an operator raises
            raise RunFailedError(f"onnx.reference cannot run {node.op_type}: {error}") from error
    return [np.asarray(next(results)) if name else np.zeros(0) for name in proto.output]


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if is_float(array) else array


def _whole(operand: Operand, reader: str) -> Array:
    if isinstance(operand, Expression):
        raise RunFailedError(f"{reader} reads a large weight whole")
    return operand


# --- Operators that multiply by a weight, or pass it on ------------------------------------------


def _matmul(
    multiplier: Multiplier, node: ir.Node, operands: Sequence[Operand | None]
) -> Operand | None:
    x, w = operands
    if isinstance(x, Expression) or not isinstance(w, Expression) or len(w.shape) != 2:
        return None
    assert x is not None
    product = multiplier.times(x.reshape(-1, x.shape[-1]), w)
    return product.reshape(*x.shape[:-1], w.shape[1])


def _gemm(
    multiplier: Multiplier, node: ir.Node, operands: Sequence[Operand | None]
) -> Operand | None:
    a, b, *rest = operands
    c = rest[0] if rest else None
    if isinstance(a, Expression) or not isinstance(b, Expression) or isinstance(c, Expression):
        return None
    assert a is not None
    attributes = node.attributes
    rows = a.T if attributes.get_int("transA", 0) else a
    transposed = bool(attributes.get_int("transB", 0))
    total = attributes.get_float("alpha", 1.0) * multiplier.times(rows, b, transposed=transposed)
    return total if c is None else total + attributes.get_float("beta", 1.0) * c


def _gather(
    multiplier: Multiplier, node: ir.Node, operands: Sequence[Operand | None]
) -> Operand | None:
    table, indices = operands
    if not isinstance(table, Expression) or not isinstance(indices, np.ndarray):
        return None
    axis = node.attributes.get_int("axis", 0) % len(table.shape)
    flat = np.where(indices < 0, indices + table.shape[axis], indices).ravel()
    taken = values(take(table, literal(flat.astype(np.intp)), axis))
    shape = table.shape
    return taken.reshape(*shape[:axis], *indices.shape, *shape[axis + 1 :])


def _transpose(
    multiplier: Multiplier, node: ir.Node, operands: Sequence[Operand | None]
) -> Operand | None:
    (x,) = operands
    assert isinstance(x, Expression)
    rank = len(x.shape)
    return transpose(x, node.attributes.get_ints("perm", tuple(reversed(range(rank)))))


def _same(
    multiplier: Multiplier, node: ir.Node, operands: Sequence[Operand | None]
) -> Operand | None:
    return operands[0]


def _cast(
    multiplier: Multiplier, node: ir.Node, operands: Sequence[Operand | None]
) -> Operand | None:
    is_wide = node.attributes.get_int("to", 0) == ir.DataType.DOUBLE
    return operands[0] if is_wide else None


_RULES: Mapping[str, Callable[[Multiplier, ir.Node, Sequence[Operand | None]], Operand | None]] = {
    "Cast": _cast,
    "Gather": _gather,
    "Gemm": _gemm,
    "Identity": _same,
    "MatMul": _matmul,
    "Transpose": _transpose,
}
