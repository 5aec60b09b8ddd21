"""Streams that norms read: what passes through them is an orthogonal change of basis.

An RMSNorm is ``n = x / sqrt(mean(x²) + eps)``, times a gain ``g`` by channel. Of ``x`` it uses the
length ``|x|`` and the direction. Where ``Tᵀ T = I`` the length of ``x T`` is that of ``x``, so the
norm of ``x T`` is ``n T``: the root of the mean square is the same number, and so it is with any
``eps`` added to it, inside the root or outside. The stream goes on behind the norm. The gain, which
does not commute with ``T``, belongs to the layers behind: ``n G R`` with ``G = diag(g)``.

A LayerNorm takes the mean off first: ``x C`` with ``C = I - 11ᵀ/d``. Where ``T`` also leaves the
vector of ones as it is, ``T 1 = 1`` (and so ``Tᵀ 1 = 1``), the mean of ``x T`` is that of ``x``,
``x T C = x C T``, and a LayerNorm lets it through as it stands. Behind it the channels add up to
zero, so a layer there may have the same row added to all of its rows. The bias ``b`` behind the
gain does not depend on the stream; its share ``b R`` is added behind the readers.

ONNX Runtime's optimizer writes a norm and the sum in front of it as one operator,
``SkipLayerNormalization(x, y, g, b, c)``: the norm of ``x + y + c``. All three summands are in the
stream, and so is the sum where it is an output, without the gain.

So nothing has to be known of a norm but that it looks at the channels through their sum and the sum
of their squares. What is made of these (a root, a reciprocal, a Cast, an epsilon) is the same in
any such basis, in whatever operators an exporter writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnx_fold.graph.channels import Group, ports
from onnx_fold.graph.commute import OpensStreamError, Port
from onnx_fold.graph.constants import FLOATS, Constant, axes_of, constant, scalar
from onnx_fold.graph.operators import MICROSOFT, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.ends import Activations, Gain
from onnx_fold.streams.stream import Search, Stream, open_stream

__all__ = ["find_norm_streams", "is_centring", "is_residual", "squares"]


@dataclass(frozen=True)
class _Norm:
    """Which inputs and outputs of an operator that is a norm are what.

    Attributes:
        gain: The input that holds the gain.
        bias: The input that is added behind the gain, if there may be one.
        summed: The inputs whose sum is normed.
        total: The output that is this sum, if there may be one.
        centres: Whether the mean of the channels is taken off first.
    """

    gain: int
    bias: int | None = None
    summed: tuple[int, ...] = (0,)
    total: int | None = None
    centres: bool = False


_RMS = _Norm(gain=1)
_NORMS = {
    "LayerNormalization": _Norm(gain=1, bias=2, centres=True),
    "RMSNormalization": _RMS,
    "SimplifiedLayerNormalization": _RMS,
    f"{MICROSOFT}::SimplifiedLayerNormalization": _RMS,
    f"{MICROSOFT}::SkipLayerNormalization": _Norm(2, 3, (0, 1, 4), total=3, centres=True),
    f"{MICROSOFT}::SkipSimplifiedLayerNormalization": _Norm(2, None, (0, 1, 3), total=3),
}
"""Operators that are a norm with its gain, and perhaps a bias, of one input or of a sum."""

_SUMS = frozenset(("ReduceMean", "ReduceSum"))
_SUMS_OF_SQUARES = frozenset(("ReduceL2", "ReduceSumSquare"))


def find_norm_streams(
    model: ir.Model, activations: Activations | None = None, shapes: Shapes | None = None
) -> list[Stream]:
    """The streams of the main graph that are read by norms, with what lies behind these.

    They are of the group :attr:`Group.ORTHOGONAL`. Those of a model without such norms are not
    looked for.
    """
    if not any(_is_norm(node) or _is_square(node) for node in model.graph):
        return []
    search = Search(model.graph, shapes or Shapes(model), activations)
    streams = []
    for node in model.graph:
        value = _normed(node)
        if value is None or value in search.seen:
            continue
        if not (_is_norm(node) or looks_at_length(node, search.shapes)):
            continue
        width = search.shapes.dim(value, -1)
        if isinstance(width, int) and width > 1:
            streams.append(_stream(search, value, width))
    return streams


def _normed(node: ir.Node) -> ir.Value | None:
    """What ``node`` takes the norm of, if it is one; of a sum, what is not constant."""
    norm = _NORMS.get(operator(node), _RMS)
    found = [value for index in norm.summed if (value := _input(node, index)) is not None]
    return next((value for value in found if constant(value) is None), None)


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


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
        if not known.is_output and (looks_at_length(node, shapes) or takes_mean(node, shapes)):
            return [known]
        if (norm := _NORMS.get(operator(node))) is not None:
            found = _ports_of(norm, node, width, shapes)
            return found if known in found else None
        if (index := shifted(node, width, shapes)) is not None:
            return [Port(False, index, -1), Port(True, 0, -1)]
        if (gain := gain_of(node, width, shapes)) is not None:
            return [Port(False, 1 - gain.edge[1], -1), Port(True, 0, -1)]
    return ports(node, known, width, shapes)


def _ports_of(norm: _Norm, node: ir.Node, width: int, shapes: Shapes) -> list[Port]:
    if gain_of(node, width, shapes) is None:
        raise OpensStreamError("has a gain that is not constant, or not of the last axis")
    bias = _input(node, norm.bias)
    if bias is not None and constant(bias) is None:
        raise OpensStreamError("has a bias that is not constant")
    inputs = [*norm.summed, norm.bias]
    outputs = [0, norm.total]
    return [
        *(Port(False, i, -1) for i in inputs if i is not None and _input(node, i) is not None),
        *(Port(True, i, -1) for i in outputs if i is not None and i < len(node.outputs)),
    ]


def _is_norm(node: ir.Node) -> bool:
    return operator(node) in _NORMS


def _is_square(node: ir.Node) -> bool:
    """Whether ``node`` squares its input, or takes its length."""
    if operator(node) in _SUMS_OF_SQUARES:
        return True
    if len(node.inputs) != 2 or len(node.outputs) != 1:
        return False
    if operator(node) == "Pow":
        return scalar(node.inputs[1]) == 2.0
    return operator(node) == "Mul" and node.inputs[0] is node.inputs[1]


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


def takes_mean(node: ir.Node, shapes: Shapes) -> bool:
    """Whether ``node`` reads only the sum of the channels, the last axis."""
    return operator(node) in _SUMS and _is_over_channels(node, shapes)


def shifted(node: ir.Node, width: int, shapes: Shapes) -> int | None:
    """Which input of ``node`` it adds the same to in all channels, if it does that."""
    if operator(node) not in ("Add", "Sub") or len(node.inputs) != 2:
        return None
    sizes = [1 if value is None else shapes.dim(value, -1) for value in node.inputs]
    if sorted(map(str, sizes)) != sorted(("1", str(width))):
        return None
    index = sizes.index(width)
    return index if constant(node.inputs[1 - index]) is None else None


def is_centring(node: ir.Node, shapes: Shapes) -> bool:
    """Whether ``node`` takes the mean of the channels, the last axis, off them."""
    taken = node.inputs[1] if operator(node) == "Sub" and len(node.inputs) == 2 else None
    mean = None if taken is None else taken.producer()
    return (
        mean is not None
        and operator(mean) == "ReduceMean"
        and mean.inputs[0] is node.inputs[0]
        and tuple(axes_of(mean, shapes.integers) or ()) == (-1,)
        and mean.attributes.get_int("keepdims", 1) == 1
    )


def squares(stream: Stream) -> Iterator[ir.Value]:
    """Squares of values of ``stream``, of which only the sum is the same in another basis."""
    for value in stream.values:
        for node in dict.fromkeys(user for user, _ in value.uses()):
            if looks_at_length(node, stream.shapes) and operator(node) not in _SUMS_OF_SQUARES:
                yield node.outputs[0]


def is_residual(stream: Stream) -> bool:
    """Whether more than one writer depends on the stream: it runs through blocks, not beside them.

    All of their weights would have to be rotated for what one block can save.
    """
    order = stream.search.position
    last = max((order(writer.node) for writer in stream.writers), default=-1)
    queue = [reader.node for reader in stream.readers if order(reader.node) < last]
    seen = set(queue)
    while queue:
        users = (user for value in queue.pop().outputs for user, _ in value.uses())
        new = {user for user in users if order(user) <= last} - seen
        seen |= new
        queue.extend(new)
    return sum(writer.node in seen for writer in stream.writers) > 1


def _is_over_channels(node: ir.Node, shapes: Shapes) -> bool:
    """Whether ``node`` reduces the last axis, whatever others."""
    value, axes = node.inputs[0], axes_of(node, shapes.integers)
    rank = shapes.rank(value) if value is not None else None
    if not axes:
        return False
    return -1 in axes or (rank is not None and rank - 1 in axes)


def gain_of(node: ir.Node, width: int, shapes: Shapes) -> Gain | None:
    """The factors by channel that ``node``, an RMSNorm or a Mul, multiplies by."""
    indices: Sequence[int] = ()
    if (norm := _NORMS.get(operator(node))) is not None:
        axis, value = node.attributes.get_int("axis", -1), node.inputs[0]
        rank = None if value is None else shapes.rank(value)
        if axis == -1 or (rank is not None and axis == rank - 1):
            indices = (norm.gain,)
    elif operator(node) == "Mul" and len(node.inputs) == 2:
        indices = [index for index in (1, 0) if constant(node.inputs[1 - index]) is None]
    for index in indices:
        held = None if (value := _input(node, index)) is None else constant(value)
        if held is not None and _is_gain(held, width):
            return Gain((node, index), held)
    return None


def _is_gain(held: Constant, width: int) -> bool:
    return held.dtype in FLOATS and held.is_vector and held.size == width > 1


def _find_gains(stream: Stream) -> None:
    """Note which values of ``stream`` hold it times which gain; open it where that does not do.

    A sum of two values needs both with one gain or without; what takes a length or a mean needs it
    without. No layer can write what has a gain; constants that do are carried to the readers.
    """
    nodes = {node for value in stream.values if (node := value.producer()) is not None}
    linears, shapes = stream.search.linears, stream.shapes
    for node in sorted(nodes, key=stream.search.position):
        is_linear, value = node in linears, node.outputs[0]
        is_last = stream.values.get(value) == -1 and not is_linear
        own = gain_of(node, stream.width, shapes) if is_last else None
        norm = _NORMS.get(operator(node))
        operands = list(_operands(node, stream))
        found = [stream.gains.get(operand) for operand in operands]
        gain = found[0] if found else None
        constants = [writer for writer in stream.constants if writer.node is node]
        if any(other is not gain for other in found):
            open_stream(stream, value, "joins channels with different gains, by", node)
        elif gain is not None and own is not None:
            open_stream(stream, value, "has a gain behind another gain, by", node)
        elif gain is not None and is_linear:
            open_stream(stream, value, "is added to behind a gain, by", node)
        gain = own or gain
        outputs = [each for each in node.outputs if each in stream.values]
        if norm is not None:  # in front of it there is no gain
            outputs = [value]
        carried = [] if gain is None else constants
        if norm is not None:
            carried = [writer for writer in constants if writer.index == norm.bias]
        if gain is not None:
            stream.gains |= dict.fromkeys(outputs, gain)
            if any(writer.is_table for writer in carried):
                open_stream(stream, value, "has a table added behind a gain, by", node)
            stream.carried += carried
        is_shift = is_last and shifted(node, stream.width, shapes) is not None
        takes_off = (is_last and is_centring(node, shapes)) or (norm is not None and norm.centres)
        keeps = operands and not is_linear and not is_shift and _are_centred(operands, stream)
        if takes_off or (keeps and len(carried) == len(constants)):
            stream.centred |= set(outputs)
        stream.keeps_ones |= is_shift or (norm is not None and norm.centres)
    stream.constants = [each for each in stream.constants if each not in stream.carried]
    stream.readers = [replace(each, gain=stream.gains.get(each.x)) for each in stream.readers]
    stream.ignores_ones = _are_centred([reader.x for reader in stream.readers], stream)
    for value in stream.values:
        for node, _ in value.uses():
            is_mean = takes_mean(node, shapes) and stream.values[value] == -1
            is_length = looks_at_length(node, shapes)
            stream.keeps_ones |= is_mean
            if value in stream.gains and (is_mean or is_length or _is_norm(node)):
                open_stream(stream, value, "has a gain and is normed by", node)
            if value not in stream.centred and (is_length or _shows_mean(node, is_mean, shapes)):
                stream.ignores_ones = False


def _shows_mean(node: ir.Node, is_mean: bool, shapes: Shapes) -> bool:
    """Whether more is done with the mean of the channels than to take it off."""
    norm = _NORMS.get(operator(node))
    if norm is not None and norm.centres:
        return any(output.uses() or output.is_graph_output() for output in node.outputs[1:3])
    if not is_mean:
        return _is_norm(node)
    users = [user for output in node.outputs for user, _ in output.uses()]
    is_shown = any(output.is_graph_output() for output in node.outputs)
    return is_shown or not all(is_centring(user, shapes) for user in users)


def _are_centred(values: Sequence[ir.Value], stream: Stream) -> bool:
    return all(value in stream.centred for value in values)


def _operands(node: ir.Node, stream: Stream) -> Iterator[ir.Value]:
    """What ``node`` reads of ``stream``; the bias of a layer is a sum in it."""
    linear = stream.search.linears.get(node)
    for index, value in enumerate(node.inputs):
        is_added = linear is None or (node, index) == linear.bias
        if value is not None and value in stream.values and is_added:
            yield value
