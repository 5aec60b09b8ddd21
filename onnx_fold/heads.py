"""Attention in the graph: which layer is Q, K or V, its heads, and the parts of a fused QKV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import onnx_ir as ir

from onnx_fold.constants import constant, integers
from onnx_fold.linear import Linear, compact
from onnx_fold.shapes import Dims, Shapes
from onnx_fold.stream import Stream

_ATTENTION_OPERATORS = frozenset(("Attention", "MultiHeadAttention", "GroupQueryAttention"))
_AFTER_SCORES = frozenset(
    ("Cast", "Where", "IsNaN", "Identity", "Dropout", "Mul", "Div", "Add", "Reshape", "Transpose")
)


def role(value: ir.Value) -> str | None:
    """``"q"``, ``"k"`` or ``"v"`` if ``value`` flows into an attention core, else None.

    Followed forwards to the first product of two computed values: the scores (Q on the left, K on
    the right) or the product of probabilities and V; or to an attention operator.
    """
    queue, seen = [value], {value}
    while queue:
        current = queue.pop(0)
        for node, index in current.uses():
            if node.op_type in _ATTENTION_OPERATORS:
                return "qkv"[index] if index < 3 else None
            if node.op_type in ("MatMul", "Gemm", "Einsum") and len(node.inputs) > 1:
                left, right = node.inputs[0], node.inputs[1]
                if left is None or right is None or constant(left) or constant(right):
                    return None  # another linear layer: no attention between
                if index == 1 and _is_probability(left):
                    return "v"
                return "k" if index == 1 else "q"
            if node.op_type == "Softmax":
                return None
            for output in node.outputs:
                if output not in seen and node.op_type not in ("Shape", "Size"):
                    seen.add(output)
                    queue.append(output)
    return None


def _is_probability(value: ir.Value) -> bool:
    """Whether ``value`` comes out of a Softmax, a few harmless operators back."""
    queue = [value]
    for _ in range(16):
        if not queue:
            return False
        node = queue.pop(0).producer()
        if node is None:
            continue
        if node.op_type == "Softmax":
            return True
        if node.op_type in _AFTER_SCORES:
            queue.extend(operand for operand in node.inputs if operand is not None)
    return False


@dataclass(frozen=True)
class Part:
    """Columns of a fused projection that are cut out by a Split.

    Attributes:
        start: First column.
        size: Number of columns.
        output: The output of the Split.
    """

    start: int
    size: int
    output: ir.Value


@dataclass(frozen=True)
class Fused:
    """A linear layer whose output is split along its channels, as in a fused QKV.

    Attributes:
        linear: The layer.
        path: Operators between the layer and the Split (bias, Reshape), in order.
        split: The Split.
        parts: What it cuts out, in the order of the columns.
    """

    linear: Linear
    path: tuple[ir.Node, ...]
    split: ir.Node
    parts: tuple[Part, ...]


def fused(linear: Linear, shapes: Shapes) -> Fused | None:
    """Read ``linear`` as a fused projection with contiguous parts (GPT-2), if it is one."""
    if linear.y_axis != -1:
        return None
    value = linear.y
    path: list[ir.Node] = []
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((node, index),) = value.uses()
        if node.op_type == "Split":
            return _at_split(linear, path, node, shapes)
        if node.op_type == "Add":
            if constant(node.inputs[1 - index]) is None:
                return None
        elif node.op_type not in ("Reshape", "Identity") or index != 0:
            return None
        path.append(node)
        value = node.outputs[0]
    return None


def _at_split(linear: Linear, path: list[ir.Node], split: ir.Node, shapes: Shapes) -> Fused | None:
    axis = split.attributes.get_int("axis", 0)
    sizes = _split_sizes(split, linear.out_features)
    rank = shapes.rank(split.outputs[0])
    reshaped = any(node.op_type == "Reshape" for node in path)
    if reshaped and shapes.dim(_operand(split), -1) != linear.out_features:
        return None  # cut into heads first: the parts are interleaved
    if sizes is None or axis not in (-1, -1 if rank is None else rank - 1):
        return None
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = tuple(map(Part, starts, sizes, split.outputs))
    return Fused(linear, tuple(path), split, parts)


def _operand(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _split_sizes(split: ir.Node, width: int) -> Sequence[int] | None:
    given: Sequence[int] | None = split.attributes.get_ints("split")
    if not given and len(split.inputs) > 1 and split.inputs[1] is not None:
        given = integers(split.inputs[1])
        if given is None:
            return None
    count = len(split.outputs)
    sizes = given or (width // count,) * count
    return sizes if sum(sizes) == width and len(sizes) == count else None


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one projection: ``heads`` of ``head_dim`` channels each."""

    heads: int
    head_dim: int


def head_layout(value: ir.Value, width: int, shapes: Shapes) -> HeadLayout | None:
    """How the ``width`` channels of ``value`` are cut into heads, where a Reshape does so."""
    for _ in range(8):
        for node, index in value.uses():
            dims = shapes(node.outputs[0]) if node.op_type == "Reshape" and index == 0 else None
            if dims is not None and len(dims) == 4 and (found := _layout(dims, width)) is not None:
                return found
        onward = [n for n, _ in value.uses() if n.op_type in ("Add", "Identity", "Cast", "Reshape")]
        if not onward:
            return None
        value = onward[0].outputs[0]
    return None


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


@dataclass
class Attention:
    """The projections of one attention layer and how its heads lie.

    Attributes:
        projections: Labels of the layers that make Q, K and V.
        num_heads: Query heads; None if the graph does not tell.
        num_kv_heads: Key and value heads.
        head_dim: Channels of a head.
    """

    projections: str
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None

    @property
    def kind(self) -> str:
        """MHA, GQA or MQA; a question mark if the graph does not tell."""
        if self.num_heads is None or self.num_kv_heads is None:
            return "?"
        return attention_kind(self.num_heads, self.num_kv_heads)

    def to_dict(self) -> dict[str, object]:
        """As JSON-ready data."""
        return {"kind": self.kind, **asdict(self)}


def find_attention(streams: Iterable[Stream]) -> list[Attention]:
    """The attention layers whose Q, K and V read one of ``streams``, in their order."""
    found = []
    for stream in streams:
        group: dict[str, tuple[str, HeadLayout | None]] = {}
        for name, kind, layout in _projections(stream):
            if kind in group:  # the next layer that reads the same stream
                found.append(_attention(group))
                group = {}
            group[kind] = (name, layout)
        if "q" in group or "k" in group:
            found.append(_attention(group))
    return found


def _projections(stream: Stream) -> Iterator[tuple[str, str, HeadLayout | None]]:
    for reader in stream.readers:
        parts = fused(reader, stream.shapes)
        if parts is None and (kind := role(reader.y)) is not None:
            yield reader.label, kind, head_layout(reader.y, reader.out_features, stream.shapes)
        elif parts is not None:
            for part in parts.parts:
                if (kind := role(part.output)) is not None:
                    name = f"{reader.label}[{part.start}:{part.start + part.size}]"
                    yield name, kind, head_layout(part.output, part.size, stream.shapes)


def _attention(group: dict[str, tuple[str, HeadLayout | None]]) -> Attention:
    q = group.get("q", ("", None))[1]
    kv = group.get("k", group.get("v", ("", None)))[1]
    known = q or kv
    return Attention(
        compact([name for name, _ in group.values()]),
        q.heads if q else None,
        kv.heads if kv else None,
        known.head_dim if known else None,
    )
