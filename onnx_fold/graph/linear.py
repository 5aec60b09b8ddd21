"""One linear layer in the graph, ``y = x W (+ b)``: how it is read and how it is written back.

Row-vector convention: ``W`` is ``[in, out]`` whatever the node stores. ``x`` and ``y`` are values
of any rank; the axis that ``W`` contracts or produces is the channel axis, counted from the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_fold.algebra.expression import Expression, FoldedTensor, reshape, scale, transpose
from onnx_fold.algebra.precision import product_dtype
from onnx_fold.graph.constants import FLOATS, Constant, constant
from onnx_fold.graph.operators import MICROSOFT, only_user, operator
from onnx_fold.graph.shapes import Shapes

Edge = tuple[ir.Node, int]
"""An input of a node."""


@dataclass(frozen=True)
class Linear:
    """A node that multiplies a value by a constant matrix, or by one of several for each row.

    The axes of the weight that are neither inputs nor outputs (experts, the positions of a kernel)
    hold several matrices. All of them read the same stream, side by side, or write the same, one
    above the other.

    Attributes:
        node: The operator: MatMul, Gemm, Einsum, Conv ...
        edge: The input that holds the weight: of ``node``, or of the Gather that picks experts.
        weight: The constant behind that input.
        in_axes: Axes of ``weight`` that are contracted with ``x``.
        out_axes: Axes of ``weight`` that are channels of ``y``.
        x: The value read.
        x_axis: Its channel axis; None if the channels do not make up one axis.
        y: The value written.
        y_axis: Its channel axis; None as for ``x``.
        alpha: Factor that the node applies to the product.
        bias: The input that is added to the product, if there is one.
        beta: Factor that the node applies to the bias.
        keeps_layout: Whether ``x`` could stand in the place of ``y`` if ``W`` were the identity.
        is_padded: Whether some positions of ``y`` read fewer of ``x`` than others, zeros instead.
        identity_shape: The shape to which ``x`` has to be reshaped before it can.
    """

    node: ir.Node
    edge: Edge
    weight: Constant
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    x: ir.Value
    x_axis: int | None
    y: ir.Value
    y_axis: int | None
    alpha: float = 1.0
    bias: Edge | None = None
    beta: float = 1.0
    keeps_layout: bool = True
    is_padded: bool = False
    identity_shape: tuple[int, ...] | None = None

    @property
    def in_features(self) -> int:
        """Channels of ``x``."""
        return math.prod(self.weight.shape[axis] for axis in self.in_axes)

    @property
    def out_features(self) -> int:
        """Channels of ``y``."""
        return math.prod(self.weight.shape[axis] for axis in self.out_axes)

    @property
    def _other_axes(self) -> tuple[int, ...]:
        own = {*self.in_axes, *self.out_axes}
        return tuple(axis for axis in range(len(self.weight.shape)) if axis not in own)

    @property
    def num_matrices(self) -> int:
        """How many matrices it holds: 1, or the number of experts or kernel positions."""
        return math.prod(self.weight.shape[axis] for axis in self._other_axes)

    @property
    def moves(self) -> str:
        """What it does to positions that the identity would not, if it does not keep the layout."""
        if operator(self.node) == "ConvTranspose":
            return "spreads what it reads over other positions"
        is_alike = operator(self.node) == "Conv" and self.num_matrices == 1
        if is_alike and self.is_padded:
            return "reads zeros around its input"
        return "skips positions" if is_alike else "moves the channels to another axis"

    @property
    def is_square(self) -> bool:
        """Whether it is one matrix with as many inputs as outputs."""
        return self.num_matrices == 1 and self.in_features == self.out_features

    @property
    def is_plain(self) -> bool:
        """Whether it is one matrix, the channels come last and the other axes stay as they are."""
        return self.num_matrices == 1 and self.x_axis == self.y_axis == -1 and self.keeps_layout

    @property
    def is_pointwise(self) -> bool:
        """Whether it is one matrix at every position: it is plain, or a 1x1 convolution."""
        is_conv = operator(self.node) == "Conv" and self.keeps_layout
        return self.is_plain or (is_conv and self.num_matrices == 1)

    @property
    def matrix(self) -> Expression:
        """What it multiplies by, alpha included, in the type in which its products accumulate.

        ``[in_features, out_features]``; several matrices stand above each other.
        """
        return self.unpack(self.weight.wide(product_dtype(self.weight.dtype)))

    def unpack(self, stored: Expression) -> Expression:
        """What the node multiplies by when it stores ``stored``: the inverse of :meth:`pack`."""
        rows, columns = self._axes
        ordered = transpose(stored, (*rows, *columns))
        shape = (math.prod(ordered.shape[: len(rows)]), math.prod(ordered.shape[len(rows) :]))
        return scale(reshape(ordered, shape), self.alpha)

    def pack(self, matrix: Expression) -> Expression:
        """What the node has to store so that it multiplies by ``matrix``."""
        rows, columns = self._axes
        order = (*rows, *columns)
        sizes = self._sizes(rows, matrix.shape[0]) + self._sizes(columns, matrix.shape[1])
        matrix = reshape(scale(matrix, 1.0 / self.alpha), sizes)
        return transpose(matrix, [order.index(axis) for axis in range(len(order))])

    def store(self, matrix: Expression) -> FoldedTensor:
        """The weight with which the node multiplies by ``matrix``."""
        return FoldedTensor(self.pack(matrix), self.weight.dtype)

    @property
    def identity(self) -> tuple[object, ...]:
        """What two layers have in common that can share one weight."""
        axes = self.in_axes, self.out_axes
        return type(self), self.weight.leaf, self.weight.permutation, *axes, self.alpha

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the weight that are the rows of the matrix, and those that are columns."""
        return (*self._other_axes, *self.in_axes), self.out_axes

    def _sizes(self, axes: Sequence[int], total: int) -> list[int]:
        """The sizes of ``axes``, ``total`` together; the first of the channels may have changed."""
        shape, free = self.weight.shape, (self.in_axes[0], self.out_axes[0])
        fixed = math.prod(shape[axis] for axis in axes if axis not in free)
        return [total // fixed if axis in free else shape[axis] for axis in axes]

    @property
    def vector_shape(self) -> tuple[int, ...] | None:
        """Shape in which a number for each output channel, of each matrix, is added to ``y``."""
        if self.edge[0] is not self.node:
            return None  # which columns there are is known at run time only
        if self.y_axis is None:
            is_last = self.identity_shape is not None and self.keeps_layout
            return tuple(self.weight.shape[a] for a in self.out_axes) if is_last else None
        behind = (1,) * (-1 - self.y_axis)
        if self.num_matrices == 1 or operator(self.node) == "Conv":
            return (self.out_features, *behind)
        if operator(self.node) == "Einsum":
            return None
        matrices = (self.weight.shape[axis] for axis in self._other_axes)
        last = (self.out_features, 1) if behind else (1, self.out_features)
        return (*matrices, *last)

    @property
    def label(self) -> str:
        """The name a person knows it by: its module, its initializer or its node."""
        return label(self.node, self.weight)


def find_linears(graph: ir.Graph, shapes: Shapes | None = None) -> list[Linear]:
    """All linear layers of ``graph`` (not of the bodies of its control flow), in graph order."""
    return [linear for node in graph if (linear := as_linear(node, shapes)) is not None]


def as_linear(node: ir.Node, shapes: Shapes | None = None) -> Linear | None:
    """Read ``node`` as a linear layer, if it is one: what it multiplies is computed."""
    linear = as_product(node, shapes)
    return None if linear is None or constant(linear.x) is not None else linear


def as_product(node: ir.Node, shapes: Shapes | None = None) -> Linear | None:
    """Read ``node`` as a product by a constant matrix, which may be one of a constant."""
    recognise = _RECOGNISERS.get(operator(node))
    return recognise(node, shapes) if recognise is not None else None


def _held(node: ir.Node, index: int) -> Constant | None:
    """The weight at one input of ``node``; one without elements has no basis to change."""
    found = constant(node.inputs[index]) if index < len(node.inputs) else None
    return found if found is not None and found.dtype in FLOATS and found.size > 0 else None


def _picked(node: ir.Node, index: int, shapes: Shapes | None) -> tuple[Edge, Constant] | None:
    """The experts' weights, of which a Gather picks one for each row."""
    value = node.inputs[index]
    gather = value.producer() if value is not None else None
    if value is None or gather is None or only_user(value) is None:
        return None
    weight = _held(gather, 0) if operator(gather) in ("Gather", "GatherND") else None
    if weight is None or len(weight.shape) != 3:
        return None
    if operator(gather) == "GatherND":
        indices = gather.inputs[1]
        known = shapes.dim(indices, -1) if shapes is not None and indices is not None else None
        if known != 1 or gather.attributes.get_int("batch_dims", 0) != 0:
            return None
    elif gather.attributes.get_int("axis", 0) not in (0, -3):
        return None
    return (gather, 0), weight


def _matmul(
    node: ir.Node, shapes: Shapes | None, alpha: float = 1.0, flips: Sequence[bool] = (False, False)
) -> Linear | None:
    """A MatMul by a constant on either side; ``flips`` says which operands are transposed."""
    if len(node.inputs) != 2 or alpha == 0.0:
        return None
    for index in (1, 0):
        value = node.inputs[1 - index]
        weight, edge = _held(node, index), (node, index)
        if weight is None and (picked := _picked(node, index, shapes)) is not None:
            edge, weight = picked
        if weight is None or value is None or len(weight.shape) < 2:
            continue
        rank = len(weight.shape)
        is_right = index == 1
        contracted, kept = (
            (rank - 2, rank - 1) if is_right != flips[index] else (rank - 1, rank - 2)
        )
        axis = -1 if is_right else -2
        flipped = -3 - axis if flips[1 - index] else axis
        return Linear(
            node,
            edge,
            weight,
            (contracted,),
            (kept,),
            value,
            flipped,
            node.outputs[0],
            axis,
            alpha,
            keeps_layout=flipped == axis and _adds_no_axis(weight, value, shapes),
        )
    return None


def _adds_no_axis(weight: Constant, value: ir.Value, shapes: Shapes | None) -> bool:
    """Whether the leading axes of ``weight`` change nothing of the shape of ``value``."""
    lead = weight.shape[:-2]
    if not lead:
        return True
    rank = shapes.rank(value) if shapes is not None else None
    return rank is not None and rank >= len(weight.shape) and all(size == 1 for size in lead)


def _fused_matmul(node: ir.Node, shapes: Shapes | None) -> Linear | None:
    attributes = node.attributes
    if attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
        return None
    flips = [bool(attributes.get_int(name, 0)) for name in ("transA", "transB")]
    return _matmul(node, shapes, attributes.get_float("alpha", 1.0), flips)


def _gemm(node: ir.Node, shapes: Shapes | None) -> Linear | None:
    weight, x = _held(node, 1), node.inputs[0]
    alpha = node.attributes.get_float("alpha", 1.0)
    if weight is None or x is None or alpha == 0.0 or len(weight.shape) != 2:
        return None
    transposed = node.attributes.get_int("transB", 0)
    x_axis = -2 if node.attributes.get_int("transA", 0) else -1
    return Linear(
        node,
        (node, 1),
        weight,
        (1,) if transposed else (0,),
        (0,) if transposed else (1,),
        x,
        x_axis,
        node.outputs[0],
        -1,
        alpha,
        _optional(node, 2),
        node.attributes.get_float("beta", 1.0),
        keeps_layout=x_axis == -1,
    )


def _optional(node: ir.Node, index: int) -> Edge | None:
    return (node, index) if index < len(node.inputs) and node.inputs[index] is not None else None


def _conv(node: ir.Node, shapes: Shapes | None) -> Linear | None:
    """A convolution reads its channels and writes them, by a matrix for each position."""
    weight, x = _held(node, 1), node.inputs[0]
    if weight is None or x is None or node.attributes.get_int("group", 1) != 1:
        return None
    positions = math.prod(weight.shape[2:])
    axis = 1 - len(weight.shape)
    is_strided = any(step != 1 for step in node.attributes.get_ints("strides", ()))
    is_padded = any(node.attributes.get_ints("pads", ())) or (
        node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    )
    return Linear(
        node,
        (node, 1),
        weight,
        (1,),
        (0,),
        x,
        axis,
        node.outputs[0],
        axis,
        bias=_optional(node, 2),
        keeps_layout=positions == 1 and not is_strided and not is_padded,
        is_padded=is_padded,
    )


def _conv_transpose(node: ir.Node, shapes: Shapes | None) -> Linear | None:
    """A transposed convolution: some positions that it writes get less than others, or nothing."""
    weight, x = _held(node, 1), node.inputs[0]
    if weight is None or x is None or node.attributes.get_int("group", 1) != 1:
        return None
    axis = 1 - len(weight.shape)
    return Linear(
        node,
        (node, 1),
        weight,
        (0,),
        (1,),
        x,
        axis,
        node.outputs[0],
        axis,
        bias=_optional(node, 2),
        keeps_layout=False,
        is_padded=True,
    )


def _einsum(node: ir.Node, shapes: Shapes | None) -> Linear | None:
    """``"bsd,df->bsf"``, with heads (``"bsd,dhk->bshk"``) or experts (``"bed,edf->bef"``)."""
    terms, arrow, result = (
        node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    )
    inputs = terms.split(",")
    if len(inputs) != 2 or not arrow or len(node.inputs) != 2:
        return None
    index = 1 if _held(node, 1) is not None else 0
    weight, x = _held(node, index), node.inputs[1 - index]
    of_w, of_x, of_y = inputs[index], inputs[1 - index], result
    if of_x.startswith("...") and of_y.startswith("..."):
        of_x, of_y = of_x[3:], of_y[3:]
    letters = of_x + of_w + of_y
    if weight is None or x is None or not letters.isalpha() or len(of_w) != len(weight.shape):
        return None
    if any(len(set(term)) != len(term) for term in (of_x, of_w, of_y)):
        return None  # a diagonal
    ins = [letter for letter in of_x if letter in of_w and letter not in of_y]
    outs = [letter for letter in of_y if letter in of_w and letter not in of_x]
    if not ins or not outs or set(of_x) - set(of_y) != set(ins) or set(of_w) - set(of_x + of_y):
        return None
    around_x = [letter for letter in of_x if letter not in ins]
    around_y = [letter for letter in of_y if letter not in outs]
    is_last = of_x.endswith("".join(ins)) and of_y.endswith("".join(outs)) and around_x == around_y
    x_axis = of_x.index(ins[0]) - len(of_x) if len(ins) == 1 else None
    y_axis = of_y.index(outs[0]) - len(of_y) if len(outs) == 1 else None
    axes = ins if len(outs) == 1 else outs
    sizes = [weight.shape[of_w.index(letter)] for letter in axes]
    sizes = [math.prod(sizes)] if len(outs) == 1 else sizes
    is_single = len(ins) == len(outs) == 1
    if any(letter in of_w for letter in around_y):  # experts
        keeps_layout = False
    elif is_single:
        keeps_layout = x_axis == y_axis and around_x == around_y
    else:
        keeps_layout = is_last and "..." not in terms
    return Linear(
        node,
        (node, index),
        weight,
        tuple(of_w.index(letter) for letter in ins),
        tuple(of_w.index(letter) for letter in outs),
        x,
        x_axis,
        node.outputs[0],
        y_axis,
        keeps_layout=keeps_layout,
        identity_shape=None if is_single else (*(0,) * len(around_y), *sizes),
    )


def _attention(node: ir.Node, shapes: Shapes | None) -> Linear | None:
    """The packed input projection of an attention operator: a reader, whatever follows inside."""
    weight, x = _held(node, 1), node.inputs[0]
    if weight is None or x is None or len(weight.shape) != 2:
        return None
    return Linear(
        node, (node, 1), weight, (0,), (1,), x, -1, node.outputs[0], None,
        bias=_optional(node, 2), keeps_layout=False,
    )  # fmt: skip


Recogniser = Callable[[ir.Node, "Shapes | None"], "Linear | None"]

_RECOGNISERS: dict[str, Recogniser] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    f"{MICROSOFT}::FusedMatMul": _fused_matmul,
    f"{MICROSOFT}::Attention": _attention,
    f"{MICROSOFT}::PackedAttention": _attention,
}
"""Operator → what reads it as a linear layer."""


OPERATORS = frozenset(_RECOGNISERS)
"""Every operator that can be a linear layer."""


def described(node: ir.Node) -> str:
    """Operator and name of ``node``, for reasons."""
    name = label(node)
    return name if name.startswith(node.op_type) else f"{node.op_type} {name!r}"


_SCOPE = re.compile("'([^']*)'")
"""A name in a list such as ``['', 'layers.0', 'layers.0.q_proj']``."""


def label(node: ir.Node, weight: Constant | None = None) -> str:
    """The name a person knows ``node`` by.

    In this order: the module path that ``torch.onnx.export`` records, a parameter name, the path in
    a TorchScript node name, the node's own name, its operator and output.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    path = _SCOPE.findall(scopes or "")
    if len(path) > 1 and path[-2]:
        return str(path[-2])
    name = weight.leaf.name if weight is not None else None
    if name and "." in name and "::" not in name and not name.startswith("/"):
        return name.removesuffix(".weight")
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.split("/")[1:-1]) or node.name
    result = node.outputs[0].name if node.outputs else "nothing"
    return node.name or f"{node.op_type} -> {result}"


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
