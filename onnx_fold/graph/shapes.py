"""Shapes and types of every value, found without touching the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from functools import cache, partial

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript.optimizer import fold_constants

from onnx_fold.algebra.device import Array
from onnx_fold.base.silence import silenced
from onnx_fold.graph.constants import constant, integers
from onnx_fold.graph.operators import MICROSOFT, contrib, operator

Dim = int | str | None
"""A size: a number, a symbol, or unknown."""

Dims = tuple[Dim, ...]


_INFERRED = " inferred"

_LOGGERS = (
    "onnx_ir.passes.common.shape_inference",
    "onnx_ir.passes.common._c_api_utils",
    "onnxscript.optimizer._constant_folding",
)

MAX_INTEGERS = 64
"""Integers that a computed shape or bound has at most."""


class Shapes:
    """Shapes by value: freshly inferred, else as the model states them.

    Stated shapes can be stale, so inference starts without them and wins where the two differ.

    Attributes:
        fixed: Values that are computed from constants alone, once they were looked at.
        named: The same shapes, where sizes that inference does not know are compared by name; they
            are worked out when they are first asked for.
    """

    def __init__(self, model: ir.Model) -> None:
        self._inferred, self._types, self._integers = _infer(model)
        self._known: dict[tuple[ir.Value, int], int] = {}
        self._symbols: dict[str, int] = {}
        self.fixed: dict[ir.Value, Array | None] = {}
        self.named: Callable[[], Shapes] = cache(partial(self._named, model.clone()))

    def without_facts(self) -> Shapes:
        """The same shapes, without what was noted by :meth:`know`."""
        other = copy.copy(self)
        other._known, other._symbols = {}, {}
        return other

    def _named(self, model: ir.Model) -> Shapes:
        """Shapes with what :func:`_by_cases` finds where inference found nothing."""
        other, cases = copy.copy(self), _by_cases(model)
        other._inferred = {
            name: tuple(
                b if a is None or _is_inferred(a) else a
                for a, b in zip(dims, cases.get(name, dims), strict=True)
            )
            for name, dims in self._inferred.items()
        }
        return other

    def know(self, value: ir.Value, axis: int, size: int) -> None:
        """Note the size of one axis, counted from the end, that an operator implies."""
        self._known[value, axis] = size
        dims = self._inferred.get(value.name or "")
        symbol = dims[axis] if dims is not None and -axis <= len(dims) else None
        if isinstance(symbol, str) and _is_inferred(symbol):
            self._symbols[symbol] = size

    def __call__(self, value: ir.Value) -> Dims | None:
        """Dimensions of ``value``, or None if not even its rank is known."""
        if (held := constant(value)) is not None:
            return held.shape
        inferred = self._inferred.get(value.name or "")
        if inferred is not None:
            inferred = tuple(self._symbols.get(d, d) if isinstance(d, str) else d for d in inferred)
        stated = None if value.shape is None else _dims(value.shape)
        if inferred is None or stated is None or len(inferred) != len(stated):
            return inferred if inferred is not None else stated
        return tuple(b if a is None else a for a, b in zip(inferred, stated, strict=True))

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Type of ``value``, if known."""
        return value.dtype or self._types.get(value.name or "")

    def rank(self, value: ir.Value) -> int | None:
        """Number of dimensions of ``value``, if known."""
        dims = self(value)
        return None if dims is None else len(dims)

    def integers(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The integers that ``value`` holds, or that are computed from constants and shapes."""
        if value is None:
            return None
        if (held := integers(value)) is not None:
            return held
        node = value.producer()
        if node is not None and operator(node) == "Shape" and node.inputs[0] is not None:
            dims = self(node.inputs[0]) or (None,)
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            sizes = tuple(dim for dim in dims[start:end] if isinstance(dim, int))
            return sizes if len(sizes) == len(dims[start:end]) else None
        return self._integers.get(value.name or "")

    def broadcasts_to(self, value: ir.Value, other: ir.Value) -> bool:
        """Whether ``value`` broadcasts to the shape of ``other``, whatever the sizes."""
        dims, target = self(value), self(other)
        if dims is None or target is None or len(dims) > len(target):
            return False
        pairs = zip(reversed(dims), reversed(target), strict=False)
        return all(a == 1 or (a is not None and a == b) for a, b in pairs)

    def dim(self, value: ir.Value, axis: int) -> Dim:
        """Size of one axis of ``value``; 1 for an axis that broadcasting would add in front."""
        if (value, axis) in self._known:
            return self._known[value, axis]
        dims = self(value)
        if dims is None:
            return None
        return dims[axis] if -len(dims) <= axis < len(dims) else 1


def _infer(
    model: ir.Model,
) -> tuple[Mapping[str, Dims], Mapping[str, ir.DataType | None], Mapping[str, tuple[int, ...]]]:
    """Shapes, types and computed integers, by name."""
    scratch = _inferred(model, {})
    ends = (*scratch.graph.inputs, *scratch.graph.outputs)
    stated = {dim for value in ends if value.shape is not None for dim in _dims(value.shape)}

    def dims(shape: ir.Shape) -> Dims:
        """Inference calls what it does not know `unk__0`; so may the model, and mean another."""
        return tuple(
            f"{dim}{_INFERRED}" if isinstance(dim, str) and dim not in stated else dim
            for dim in _dims(shape)
        )

    return (
        {v.name: dims(v.shape) for v in _values(scratch) if v.name and v.shape is not None},
        {v.name: v.dtype for v in _values(scratch) if v.name},
        {
            value.name: found
            for value in scratch.graph.initializers.values()
            if value.name
            and value.const_value is not None
            and value.const_value.size <= MAX_INTEGERS
            and (found := integers(value)) is not None
        },
    )


def _inferred(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """A copy of ``model`` with inferred shapes; symbols of its inputs have these ``sizes``."""
    scratch = model.clone()
    for value in scratch.graph.inputs:
        if value.is_initializer():  # what a caller can override is not known
            scratch.graph.initializers.pop(value.name or "")
            value.const_value = None
        if value.shape is not None and sizes:
            value.shape = ir.Shape([sizes.get(str(dim), dim) for dim in _dims(value.shape)])
    for node in scratch.graph.all_nodes():
        for value in node.outputs:
            if sizes or not value.is_graph_output():
                value.shape = None
    for node in list(scratch.graph):
        _stand_in(node)
    with silenced(*_LOGGERS):  # what cannot be inferred is simply not known
        ShapeInferencePass(check_type=False, strict_mode=False)(scratch)
        if any(map(_computes_integers, scratch.graph)):
            with contextlib.suppress(Exception):
                fold_constants(scratch)  # what is computed from constants and shapes
            ShapeInferencePass(check_type=False, strict_mode=False)(scratch)
    return scratch


def _is_inferred(dim: Dim) -> bool:
    return isinstance(dim, str) and dim.endswith(_INFERRED)


def _values(scratch: ir.Model) -> list[ir.Value]:
    return [
        *scratch.graph.initializers.values(),  # nodes that were folded to constants
        *(value for node in scratch.graph for value in node.outputs),
    ]


_CASES = (
    (41, 67, 103, 151, 199, 251, 307, 367),
    (313, 173, 89, 431, 61, 227, 139, 283),
    (3, 5, 2, 7, 13, 11, 19, 17),
)
"""Primes that stand for the symbols of the inputs."""


def _by_cases(model: ir.Model) -> dict[str, Dims]:
    """Sizes of all values, each named by what it is for several sizes of the inputs.

    A size is a polynomial in the symbols of the inputs: two that are equal at several points are
    one (J. Schwartz, "Fast probabilistic algorithms for verification of polynomial identities",
    1980), and one that is the same at all of them is that number.
    """
    inputs = [value.shape for value in model.graph.inputs if value.shape is not None]
    symbols = {dim: None for shape in inputs for dim in _dims(shape) if isinstance(dim, str)}
    if not 0 < len(symbols) <= len(_CASES[0]):
        return {}
    cases = [dict(zip(symbols, case, strict=False)) for case in _CASES]
    names: dict[tuple[Dim, ...], Dim] = {
        tuple(case[symbol] for case in cases): symbol for symbol in symbols
    }

    def name_of(sizes: tuple[Dim, ...]) -> Dim:
        if not all(isinstance(size, int) for size in sizes):
            return None
        return sizes[0] if len(set(sizes)) == 1 else names.get(sizes, "/".join(map(str, sizes)))

    first, *others = (
        {v.name: _dims(v.shape) for v in _values(_inferred(model, case)) if v.shape is not None}
        for case in cases
    )
    found = {name: [dims, *(case.get(name, ()) for case in others)] for name, dims in first.items()}
    return {
        name: tuple(map(name_of, zip(*each, strict=True)))
        for name, each in found.items()
        if name and len({len(dims) for dims in each}) == 1
    }


def _computes_integers(node: ir.Node) -> bool:
    """Whether what ``node`` makes may be a shape, an index or a bound."""
    if operator(node) == "Constant":
        return False
    return any(value.dtype is None or value.dtype.is_integer() for value in node.outputs)


_ELEMENTWISE = frozenset(("SimplifiedLayerNormalization",)) | contrib(
    *("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding"),
)
_SKIP_NORMS = contrib("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def _stand_in(node: ir.Node) -> None:
    """Let a standard operator whose output has the same shape stand for one of ONNX Runtime's."""
    if operator(node) in _SKIP_NORMS:
        _let_sums_stand_in(node)
    if len(node.outputs) != 1:
        return
    if operator(node) in _ELEMENTWISE:
        node.resize_inputs(1)
        node.domain, node.op_type = "", "Identity"
        node.attributes.clear()
    elif operator(node) == f"{MICROSOFT}::FusedMatMul" and len(node.inputs) == 2:
        for index, name in enumerate(("transA", "transB")):
            if not node.attributes.get_int(name, 0):
                continue
            value = node.inputs[index]
            held = constant(value)
            if held is None or len(held.shape) != 2 or node.graph is None:
                return
            transpose = ir.node("Transpose", [value])
            node.graph.insert_before(node, transpose)
            node.replace_input_with(index, transpose.outputs[0])
        node.domain, node.op_type = "", "MatMul"
        node.attributes.clear()


def _let_sums_stand_in(node: ir.Node) -> None:
    """The norm of a sum, and the sum where that is an output, have the shape of the sum."""
    graph, outputs = node.graph, [node.outputs[0], *node.outputs[3:]]
    if graph is None or any(output.is_graph_output() for output in outputs):
        return
    for output in outputs:
        total = ir.node("Add", node.inputs[:2])
        graph.insert_before(node, total)
        name, output.name = output.name, None
        total.outputs[0].name = name
        output.replace_all_uses_with(total.outputs[0])


def _dims(shape: ir.Shape) -> Dims:
    return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)
