"""One linear layer in the graph, ``y = x W (+ b)``: how it is read and how it is written back.

Row-vector convention: ``W`` is ``[in, out]`` whatever the node stores. ``x`` and ``y`` are values
of any rank; the axis that ``W`` contracts or produces is the channel axis, counted from the end.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fold.constants import FLOATS, Constant, constant
from onnx_fold.expression import Expression, scale, transpose


@dataclass(frozen=True)
class Linear:
    """A node that multiplies a value by a constant matrix.

    Attributes:
        node: The MatMul or Gemm.
        index: Which input of ``node`` is the weight.
        weight: The constant behind that input.
        transposed: The node multiplies by the transpose of what ``weight`` holds.
        alpha: Factor that the node applies to the product.
        x: The value read, with its channel axis ``x_axis``.
        y: The value written, with its channel axis ``y_axis``.
    """

    node: ir.Node
    index: int
    weight: Constant
    transposed: bool
    alpha: float
    x: ir.Value
    x_axis: int
    y: ir.Value
    y_axis: int

    @property
    def in_features(self) -> int:
        """Width of the channel axis of ``x``."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def out_features(self) -> int:
        """Width of the channel axis of ``y``."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def is_square(self) -> bool:
        """Whether it has as many inputs as outputs."""
        return self.in_features == self.out_features

    @property
    def edge(self) -> tuple[ir.Node, int]:
        """The input that holds the weight."""
        return self.node, self.index

    @property
    def keeps_layout(self) -> bool:
        """Whether ``x`` could stand in the place of ``y`` if ``W`` were the identity."""
        return self.x_axis == self.y_axis

    def matrix(self, dtype: npt.DTypeLike = np.float64) -> Expression:
        """``W``, alpha included, ``[in_features, out_features]`` in ``dtype``."""
        return self.unpack(self.weight.wide(dtype))

    def unpack(self, stored: Expression) -> Expression:
        """What the node multiplies by when it stores ``stored``: the inverse of :meth:`pack`."""
        return scale(transpose(stored) if self.transposed else stored, self.alpha)

    def pack(self, matrix: Expression) -> Expression:
        """What the node has to store so that :meth:`matrix` gives ``matrix``."""
        scaled = scale(matrix, 1.0 / self.alpha)
        return transpose(scaled) if self.transposed else scaled

    @property
    def is_plain(self) -> bool:
        """Whether the channels come last on both sides."""
        return self.x_axis == self.y_axis == -1

    @property
    def label(self) -> str:
        """The name a person knows it by: its module, its initializer or its node."""
        return label(self.node, self.weight)


def find_linears(graph: ir.Graph) -> list[Linear]:
    """All linear layers of ``graph`` (not of the bodies of its control flow), in graph order."""
    return [linear for node in graph if (linear := as_linear(node)) is not None]


def as_linear(node: ir.Node) -> Linear | None:
    """Read ``node`` as a linear layer, if it is one."""
    recognise = _RECOGNISERS.get((node.domain, node.op_type))
    return recognise(node) if recognise is not None else None


def _weight(node: ir.Node, index: int) -> Constant | None:
    found = constant(node.inputs[index])
    return found if found is not None and found.dtype in FLOATS and len(found.shape) == 2 else None


def _matmul(node: ir.Node) -> Linear | None:
    if len(node.inputs) != 2:
        return None
    x, w = node.inputs[0], node.inputs[1]
    y = node.outputs[0]
    right = _weight(node, 1)
    left = _weight(node, 0)
    if right is not None and constant(x) is None and x is not None:
        return Linear(node, 1, right, False, 1.0, x, -1, y, -1)
    if left is not None and constant(w) is None and w is not None:
        return Linear(node, 0, left, True, 1.0, w, -2, y, -2)
    return None


def _gemm(node: ir.Node) -> Linear | None:
    if len(node.inputs) < 2:
        return None
    x, weight = node.inputs[0], _weight(node, 1)
    alpha = node.attributes.get_float("alpha", 1.0)
    if weight is None or x is None or constant(x) is not None or alpha == 0.0:
        return None
    x_axis = -2 if node.attributes.get_int("transA", 0) else -1
    transposed = bool(node.attributes.get_int("transB", 0))
    return Linear(node, 1, weight, transposed, alpha, x, x_axis, node.outputs[0], -1)


_RECOGNISERS: dict[tuple[str, str], Callable[[ir.Node], Linear | None]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
}


def label(node: ir.Node, weight: Constant | None = None) -> str:
    """The name a person knows ``node`` by.

    In this order: the module path that ``torch.onnx.export`` records, a parameter name, the path in
    a TorchScript node name, the node's own name, its operator and output.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        path: list[str] = ast.literal_eval(scopes)
        if len(path) > 1 and path[-2]:
            return path[-2]
    name = weight.leaf.name if weight is not None else None
    if name and "." in name and "::" not in name and not name.startswith("/"):
        return name.removesuffix(".weight")
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.split("/")[1:-1]) or node.name
    return node.name or f"{node.op_type} -> {node.outputs[0].name}"


MAX_LABELS = 3
"""Groups of labels that :func:`compact` shows."""


def compact(labels: Sequence[str]) -> str:
    """``a.q, a.k`` as ``a.{q, k}``, and a long list cut short."""
    groups: dict[str, list[str]] = {}
    for name in labels:
        parent, _, leaf = name.rpartition(".")
        groups.setdefault(parent, []).append(leaf)
    texts = []
    for parent, leaves in groups.items():
        prefix = f"{parent}." if parent else ""
        texts.append(
            f"{prefix}{leaves[0]}" if len(leaves) == 1 else f"{prefix}{{{', '.join(leaves)}}}"
        )
    more = len(texts) - MAX_LABELS
    return ", ".join(texts if more <= 0 else [*texts[:MAX_LABELS], f"{more} more"])
