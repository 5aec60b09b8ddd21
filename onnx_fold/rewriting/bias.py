"""Vectors that are added to a stream, carried through its readers: ``(x + b) R = x R + b R``.

No basis has to be inverted for them, but they must be the same at every position where a reader
reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.expression import FoldedTensor, Sum, literal, product, reshape, scale
from onnx_fold.graph.channels import channels
from onnx_fold.graph.constants import constant, scalar
from onnx_fold.graph.linear import Edge
from onnx_fold.graph.operators import contrib, only_user, operator
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.ends import ConstantWriter, Reader, Writer
from onnx_fold.streams.stream import Stream

Carried = dict[ConstantWriter, float]
"""Constants that reach a value, each with its factor."""

_ADDS_BIAS = frozenset(("Add",)) | contrib("BiasGelu", "FastGelu")
"""Operators of two inputs that first of all add them."""


def carry_biases(stream: Stream, writer: Writer, rewrite: Rewrite) -> None:
    """Plan to take every constant out of ``stream``, whose sole linear writer is ``writer``.

    Raises:
        CannotRewriteError: One of them differs from position to position where a reader reads it.
    """
    for constant_writer in stream.constants:
        if not _bypass(constant_writer, writer, stream, rewrite):
            raise CannotRewriteError(
                f"'{constant_writer.label}' cannot be carried behind the readers"
            )
    arriving = _carry(stream, stream.constants, writer) if stream.constants else {}
    for reader in stream.readers if stream.constants else ():
        carried = arriving.get(reader.x)
        if carried is None:
            raise CannotRewriteError(f"the bias of {writer.label} reaches {reader.label} unevenly")
        if carried:
            _add_bias(rewrite, reader, carried)


def take_gains(stream: Stream, rewrite: Rewrite) -> None:
    """Plan to let the gains of ``stream`` be ones, and what is added behind them zeros.

    The gains are in the layers behind, ``G R``, and ``b R`` is added behind these. The operators
    stay, and with them the pattern that ONNX Runtime fuses into one norm.

    Raises:
        CannotRewriteError: It differs from position to position where a reader reads it.
    """
    for ends, number in ((stream.gains.values(), 1.0), (stream.carried, 0.0)):
        filled: dict[ir.Value, FoldedTensor] = {}
        for each in ends:
            held = each.weight
            if held.value not in filled:
                filled[held.value] = FoldedTensor(literal(np.full(held.shape, number)), held.dtype)
            rewrite.stored[each.edge] = filled[held.value]
    arriving = _carry(stream, stream.carried) if stream.carried else {}
    for reader in stream.readers if stream.carried else ():
        if reader.x not in stream.gains:
            continue
        carried = arriving.get(reader.x)
        if carried is None:
            raise CannotRewriteError(f"the bias of a norm reaches {reader.label} unevenly")
        if carried:
            _add_bias(rewrite, reader, carried)


def second_biases(stream: Stream) -> Iterator[tuple[ConstantWriter, ConstantWriter]]:
    """The vectors that are added to a sum of ``stream`` of which an operand has one already.

    Yields:
        Each with the other one, to which it can be added.
    """
    vectors = {
        each.edge: each
        for each in stream.constants
        if not each.is_table and each.weight.size == stream.width
    }
    for each in vectors.values():
        node = each.node
        if operator(node) != "Add" or (value := node.inputs[1 - each.index]) is None:
            continue
        is_longer = len(each.weight.shape) > (stream.shapes.rank(value) or 0)
        other = None if is_longer else _added_to(value, stream, vectors)
        if other is not None:
            yield each, other


def _added_to(
    value: ir.Value, stream: Stream, vectors: Mapping[Edge, ConstantWriter]
) -> ConstantWriter | None:
    """One of ``vectors`` that is added to ``value``, or to an operand of it that one sum reads."""
    queue = [value]
    while queue:
        value = queue.pop()
        node = value.producer()
        if node is None or value not in stream.values or only_user(value) is None:
            continue
        linear = stream.search.linears.get(node)
        edges = [(node, 0), (node, 1)] if operator(node) == "Add" else []
        if linear is not None and linear.bias is not None and linear.beta:
            edges = [linear.bias]
        for edge in edges:
            if edge in vectors:
                return vectors[edge]
        if operator(node) == "Add":
            queue += [each for each in reversed(node.inputs) if each is not None]
    return None


def _bypass(writer: ConstantWriter, layer: Writer, stream: Stream, rewrite: Rewrite) -> bool:
    """Take an added vector out of the stream; its share is added behind the readers."""
    node = writer.node
    if writer.edge == layer.bias:
        return not writer.is_table  # goes with the node
    if writer.is_table or operator(node) not in ("Add", "Sub"):
        return False
    other = node.inputs[1 - writer.index]
    if other not in stream.values or (operator(node) == "Sub" and writer.index == 0):
        return False
    if len(writer.weight.shape) > max(1, stream.shapes.rank(other) or 0):
        return False  # the sum has more axes than the stream
    rewrite.replaced[node.outputs[0]] = other
    return True


def _carry(
    stream: Stream, carried: Sequence[ConstantWriter], writer: Writer | None = None
) -> dict[ir.Value, Carried | None]:
    """Which of the ``carried`` constants arrive at each value; None if they differ by position.

    Without the sole ``writer`` of the stream only its values behind a gain are looked at.
    """
    values = stream.gains if writer is None else stream.values
    nodes = {node for value in values if (node := value.producer()) is not None}
    constants: dict[ir.Node, list[ConstantWriter]] = defaultdict(list)
    for each in carried:
        constants[each.node].append(each)
    known: dict[ir.Value, Carried | None] = {}
    for node in sorted(nodes, key=stream.search.position):
        arriving = _behind(node, constants[node], writer, stream, known)
        known |= {output: arriving for output in node.outputs if output in stream.values}
    return known


def _behind(
    node: ir.Node,
    constants: Sequence[ConstantWriter],
    writer: Writer | None,
    stream: Stream,
    known: Mapping[ir.Value, Carried | None],
) -> Carried | None:
    """The constants that arrive behind ``node``, from those that arrive in front of it."""
    own = [c for c in constants if not c.is_zero()]
    if writer is None and any(gain.edge[0] is node for gain in stream.gains.values()):
        return dict.fromkeys(own, 1.0)
    if writer is not None and node is writer.node:
        return dict.fromkeys(own, writer.beta)
    name = operator(node)
    if channels(node).is_uniform:
        return known.get(_operand(node, 0))
    if name == "Neg":
        return _scaled(known.get(_operand(node, 0)), -1.0)
    if name in ("Mul", "Div"):
        index = 1 if _operand(node, 1) in stream.values else 0
        gain = scalar(_operand(node, 1 - index))
        if gain is None or (name == "Div" and gain == 0.0):
            return None
        return _scaled(known.get(_operand(node, index)), gain if name == "Mul" else 1.0 / gain)
    if name not in ("Add", "Sub", "Sum"):
        return None
    total: Carried = {}
    for index, operand in enumerate(node.inputs):
        sign = -1.0 if name == "Sub" and index == 1 else 1.0
        if operand in stream.values:
            carried = known.get(_operand(node, index))
        else:
            carried = {c: 1.0 for c in own if c.index == index}
        if carried is None:
            return None
        for constant_writer, factor in carried.items():
            total[constant_writer] = total.get(constant_writer, 0.0) + sign * factor
    return total


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _scaled(carried: Carried | None, factor: float) -> Carried | None:
    return None if carried is None else {c: factor * gain for c, gain in carried.items()}


def _add_bias(rewrite: Rewrite, reader: Reader, carried: Carried) -> None:
    """Add ``b R`` behind ``reader``: into the bias that it has, else as an Add of its own."""
    if reader.is_padded:
        raise CannotRewriteError(f"{reader.label} reads zeros around its input, without the bias")
    vectors = (scale(reshape(c.matrix, (-1,)), factor) for c, factor in carried.items())
    through = product(Sum(*vectors), reader.behind_gain)
    dtype, width = reader.weight.dtype, reader.out_features
    node, edge = reader.node, reader.bias
    if reader.num_matrices > 1 and operator(node) == "Conv":  # all of a window are added up
        each = reshape(through, (reader.num_matrices, width))
        ones = literal(np.ones((1, reader.num_matrices)))
        through = reshape(product(ones, each), (width,))
    if reader.beta != 0.0 and (edge is not None or operator(node) == "Gemm"):
        held = constant(node.inputs[edge[1]]) if edge is not None else None
        if edge is None or held is not None:
            own = held.wide() if held is not None else literal(np.zeros(width))
            total = Sum(own, scale(through, 1.0 / reader.beta))
            rewrite.stored[edge or (node, 2)] = FoldedTensor(total, dtype)
            return
    shape = reader.vector_shape
    if shape is None:
        raise CannotRewriteError(f"a bias cannot be added behind {reader.label}")
    if shape == (width,) and only_user(reader.y) is not None:
        ((add, index),) = reader.y.uses()
        is_sum = operator(add) in _ADDS_BIAS and len(add.inputs) == 2
        held = constant(add.inputs[1 - index]) if is_sum else None
        if held is not None and held.dtype == dtype and held.is_vector and held.size == width:
            rewrite.stored[add, 1 - index] = FoldedTensor(Sum(held.wide(), through), dtype)
            return
    rewrite.biases[reader.y] = FoldedTensor(reshape(through, shape), dtype)
