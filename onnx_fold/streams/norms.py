"""Streams that norms read: what passes through them is an orthogonal change of basis.

An RMSNorm is ``n = x / sqrt(mean(x²) + eps)``, times a gain ``g`` by channel. Of ``x`` it uses the
length ``|x|`` and the direction. Where ``Tᵀ T = I`` the length of ``x T`` is that of ``x``, so the
norm of ``x T`` is ``n T``: the root of the mean square is the same number, and so it is with any
``eps`` added to it, inside the root or outside. The stream goes on behind the norm. The gain, which
does not commute with ``T``, belongs to the layers behind: ``n G R`` with ``G = diag(g)``.

So nothing has to be known of the norm but that it looks at the channels through sums of squares.
What is made of such a sum (a root, a reciprocal, a Cast, an epsilon) is the same in any orthogonal
basis, in whatever operators an exporter writes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnx_fold.graph.channels import Group, ports
from onnx_fold.graph.commute import OpensStreamError, Port
from onnx_fold.graph.constants import FLOATS, Constant, axes_of, constant, scalar
from onnx_fold.graph.operators import contrib, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.activations import Activations
from onnx_fold.streams.stream import ConstantWriter, Gain, Search, Stream, open_stream

__all__ = ["find_norm_streams", "squares"]

_NORMS = frozenset(("RMSNormalization", "SimplifiedLayerNormalization")) | contrib(
    "SimplifiedLayerNormalization"
)
"""Operators that are an RMSNorm with its gain, of one input."""

_SUMS = frozenset(("ReduceMean", "ReduceSum"))
_SUMS_OF_SQUARES = frozenset(("ReduceL2", "ReduceSumSquare"))


def find_norm_streams(
    model: ir.Model, activations: Activations | None = None, shapes: Shapes | None = None
) -> list[Stream]:
    """The streams of the main graph that are read by RMSNorms, with what lies behind these.

    They are of the group :attr:`Group.ORTHOGONAL`. Those of a model without such norms are not
    looked for.
    """
    if not any(_is_norm(node) or _is_square(node) for node in model.graph):
        return []
    search = Search(model.graph, shapes or Shapes(model), activations)
    streams = []
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        if value is None or value in search.seen:
            continue
        if not (_is_norm(node) or looks_at_length(node, search.shapes)):
            continue
        width = search.shapes.dim(value, -1)
        if isinstance(width, int) and width > 1:
            streams.append(_stream(search, value, width))
    return streams


def _stream(search: Search, value: ir.Value, width: int) -> Stream:
    stream = search.stream(value, -1, width, orthogonal_ports)
    stream.group = Group.ORTHOGONAL
    _find_gains(stream)
    return stream


def orthogonal_ports(node: ir.Node, known: Port, width: int, shapes: Shapes) -> list[Port] | None:
    """The ports of ``node`` that share the channels of ``known`` in every orthogonal basis.

    Raises:
        OpensStreamError: As None, with a reason.
    """
    if known.axis == -1:
        if not known.is_output and looks_at_length(node, shapes):
            return [known]
        if _is_norm(node):
            if gain_of(node, width, shapes) is None:
                raise OpensStreamError("has a gain that is not constant, or not of the last axis")
            return [Port(False, 0, -1), Port(True, 0, -1)] if known.index == 0 else None
        if (gain := gain_of(node, width, shapes)) is not None:
            return [Port(False, 1 - gain.edge[1], -1), Port(True, 0, -1)]
    return ports(node, known, width, shapes)


def _is_norm(node: ir.Node) -> bool:
    return operator(node) in _NORMS


def _is_square(node: ir.Node) -> bool:
    """Whether ``node`` squares its input, or takes its length."""
    if operator(node) == "Pow":
        return scalar(node.inputs[1]) == 2.0
    return operator(node) in _SUMS_OF_SQUARES or (
        operator(node) == "Mul" and node.inputs[0] is node.inputs[1]
    )


def looks_at_length(node: ir.Node, shapes: Shapes) -> bool:
    """Whether ``node`` reads only the sum of the squares of the channels, the last axis."""
    if not _is_square(node):
        return False
    if operator(node) in _SUMS_OF_SQUARES:
        return _is_over_channels(node, shapes)
    square = node.outputs[0]
    users = [user for user, _ in square.uses()]
    is_summed = all(operator(user) in _SUMS and _is_over_channels(user, shapes) for user in users)
    return bool(users) and is_summed and not square.is_graph_output()


def squares(stream: Stream) -> Iterator[ir.Value]:
    """Squares of values of ``stream``, of which only the sum is the same in another basis."""
    for value in stream.values:
        for node in dict.fromkeys(user for user, _ in value.uses()):
            if looks_at_length(node, stream.shapes) and operator(node) not in _SUMS_OF_SQUARES:
                yield node.outputs[0]


def _is_over_channels(node: ir.Node, shapes: Shapes) -> bool:
    """Whether ``node`` reduces the last axis, whatever others."""
    value, axes = node.inputs[0], axes_of(node, shapes.integers)
    rank = shapes.rank(value) if value is not None else None
    if not axes:
        return False
    return -1 in axes or (rank is not None and rank - 1 in axes)


def gain_of(node: ir.Node, width: int, shapes: Shapes) -> Gain | None:
    """The factors by channel that ``node``, an RMSNorm or a Mul, multiplies by."""
    if _is_norm(node):
        axis = node.attributes.get_int("axis", -1)
        value = node.inputs[0]
        rank = None if value is None else shapes.rank(value)
        if axis != -1 and (rank is None or axis != rank - 1):
            return None
        indices: tuple[int, ...] = (1,)
    elif operator(node) == "Mul":
        indices = (1, 0)
    else:
        return None
    for index in indices:
        held = constant(node.inputs[index]) if index < len(node.inputs) else None
        if held is not None and _is_gain(held, width) and constant(node.inputs[1 - index]) is None:
            return Gain((node, index), held)
    return None


def _is_gain(held: Constant, width: int) -> bool:
    return held.dtype in FLOATS and held.is_vector and held.size == width > 1


def _find_gains(stream: Stream) -> None:
    """Note which values of ``stream`` hold it times which gain; open it where that does not do.

    A sum of two values, or what takes a length, needs both sides without a gain or with one; a
    layer or a constant cannot write what has one.
    """
    nodes = {node for value in stream.values if (node := value.producer()) is not None}
    linears, shapes = stream.search.linears, stream.shapes
    for node in sorted(nodes, key=stream.search.position):
        is_linear, value = node in linears, node.outputs[0]
        own = None if is_linear else gain_of(node, stream.width, shapes)
        found = [stream.gains.get(operand) for operand in _operands(node, stream)]
        gain = found[0] if found else None
        constants = [writer for writer in stream.constants if writer.node is node]
        if any(other is not gain for other in found):
            open_stream(stream, value, "joins channels with different gains, by", node)
        elif gain is not None and own is not None:
            open_stream(stream, value, "has a gain behind another gain, by", node)
        elif gain is not None and (is_linear or not all(map(ConstantWriter.is_zero, constants))):
            open_stream(stream, value, "is added to behind a gain, by", node)
        gain = own or gain
        if gain is not None:
            stream.gains |= {value: gain for value in node.outputs if value in stream.values}
    for value in stream.gains:
        for node, _ in value.uses():
            if looks_at_length(node, shapes) or _is_norm(node):
                open_stream(stream, value, "has a gain and is normed by", node)


def _operands(node: ir.Node, stream: Stream) -> Iterator[ir.Value]:
    """What ``node`` reads of ``stream``; the bias of a layer is a sum in it."""
    linear = stream.search.linears.get(node)
    for index, value in enumerate(node.inputs):
        is_added = linear is None or (node, index) == linear.bias
        if value is not None and value in stream.values and is_added:
            yield value
