"""Values that a model computes anew in every run, from constants alone: the gains of DoRA.

``m / ‖W + s (A B)ᵀ‖`` (S. Liu et al., "DoRA", arXiv 2402.09353) is one number a channel once the
adapter is trained, but exporters leave its formula in the graph.
"""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.exact import exact, values
from onnx_fold.algebra.expression import FoldedTensor
from onnx_fold.graph.constants import FLOATS, constant
from onnx_fold.graph.operators import STANDARD, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.graph.widen import widen

__all__ = ["fixed"]

MAX_NODES = 32
"""Operators by which such a value is computed."""

MAX_SIZE = 2**16
"""Elements that it has."""

_RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform")
) | {"RandomUniformLike", "Dropout"}


def fixed(value: ir.Value, shapes: Shapes) -> Array | None:
    """What ``value`` is in every run, float64, if it is computed from constants; else None."""
    if constant(value) is not None or value.producer() is None:
        return None
    if value not in shapes.fixed:
        shapes.fixed[value] = _computed(value, shapes)
    return shapes.fixed[value]


def _computed(value: ir.Value, shapes: Shapes) -> Array | None:
    dims = shapes(value)
    sizes = [size for size in dims or () if isinstance(size, int)]
    is_small = dims is not None and len(sizes) == len(dims) and np.prod(sizes) <= MAX_SIZE
    if not is_small or shapes.dtype(value) not in FLOATS or not _is_fixed(value):
        return None
    node = value.producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    graph = ir.convenience.extract(node.graph, [], [value.name or ""])
    for each in graph.initializers.values():
        if isinstance(each.const_value, FoldedTensor):
            numbers = values(exact(each.const_value.expression))
            each.const_value = ir.tensor(np.ascontiguousarray(numbers))
            each.type = ir.TensorType(ir.DataType.DOUBLE)  # the old one is the model's own
    model = ir.Model(graph, ir_version=10)
    try:
        wide = ir.to_proto(ir.external_data.load_to_model(widen(model, ir.DataType.DOUBLE)))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = ReferenceEvaluator(wide).run(None, {})
    except Exception:  # whatever the NumPy code of an operator raises
        return None
    return np.asarray(found, np.float64) if np.isfinite(found).all() else None


def _is_fixed(value: ir.Value) -> bool:
    """Whether everything that ``value`` is computed from is constant."""
    queue, seen = [value], set[ir.Node]()
    while queue:
        current = queue.pop()
        if constant(current) is not None:
            continue
        node = current.producer()
        if node is None:
            return False
        if node in seen:
            continue
        seen.add(node)
        kinds = {attribute.type for attribute in node.attributes.values()}
        bodies = kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
        if node.domain not in STANDARD or operator(node) in _RANDOM or bodies:
            return False
        if len(seen) > MAX_NODES or not node.inputs:
            return False
        queue.extend(each for each in node.inputs if each is not None)
    return True
