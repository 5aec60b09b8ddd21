"""BatchNorms that lie between streams, written as a gain and a bias for the time of the fold.

At inference a BatchNorm multiplies each channel by a number and adds one. Its channels are axis 1,
so in a transformer it stands between two Transposes (PatchTST, Y. Nie et al., arXiv 2211.14730). As
a Mul and an Add of the last axis it is a gain like any other, which several layers may read.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

import onnx_ir as ir

from onnx_fold.algebra.expression import FoldedTensor, reshape
from onnx_fold.graph.constants import FLOATS
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.linear import as_linear
from onnx_fold.graph.operators import only_user, operator
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.maps import as_map

__all__ = ["ends_of", "norms_as_gains"]


def norms_as_gains(
    graph: ir.Graph, shapes: Shapes, editor: Editor, protect: Collection[str] = ()
) -> tuple[ExitStack, set[ir.Node]]:
    """Let each BatchNorm that no single layer can take be a Mul and an Add of the last axis.

    What has to do with a name in ``protect`` stays as it is.

    Returns:
        What writes back, when it is closed, those that are as they were; and the Muls.
    """
    gains = set[ir.Node]()
    with ExitStack() as written:
        for node in list(graph):
            names = {node.name, *(each.name for each in (*node.inputs, *node.outputs) if each)}
            ends = ends_of(node, shapes)
            if ends is not None and not names.intersection(protect):
                gains |= _write(node, *ends, shapes, editor, written)
        return written.pop_all(), gains


def ends_of(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, ir.Node] | None:
    """If ``node`` is such a BatchNorm: the value whose last axis it norms, and its last node.

    That is the one behind which the channels come last again. None for a norm without Transposes
    beside a single layer, which is a branch.
    """
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    rank = None if x is None else shapes.rank(x)
    if operator(node) != "BatchNormalization" or x is None or rank is None:
        return None
    front, back, last = x.producer(), only_user(y), node
    if rank > 2:
        orders = [
            each.attributes.get_ints("perm", ())
            for each in (front, back)
            if each is not None and operator(each) == "Transpose"
        ]
        if front is None or back is None or len(orders) != 2 or orders[0][1:2] != (rank - 1,):
            return None
        if [orders[0][axis] for axis in orders[1]] != list(range(rank)):
            return None
        x, last = front.inputs[0], back
    y = last.outputs[0]
    if x is None or y.is_graph_output():
        return None
    return None if rank == 2 and _is_beside_one_layer(x, y) else (x, last)


def _is_beside_one_layer(x: ir.Value, y: ir.Value) -> bool:
    layer = x.producer()
    is_behind = layer is not None and only_user(x) is not None and as_linear(layer) is not None
    return is_behind or only_user(y) is not None


def _write(
    norm: ir.Node,
    x: ir.Value,
    last: ir.Node,
    shapes: Shapes,
    editor: Editor,
    written: ExitStack,
) -> set[ir.Node]:
    """Let ``last`` be the Add of the bias, behind a Mul of ``x``; note how to write it back."""
    y = last.outputs[0]
    rank, dims, dtype = shapes.rank(y), shapes(y), shapes.dtype(y)
    found = None if rank is None else as_map(norm, 1 - rank, shapes)
    if found is None or found[1].bias is None or dims is None or dtype not in FLOATS:
        return set()
    vectors = [reshape(found[1].kernel, (-1,)), found[1].bias]
    gain, bias = (
        editor.constant(FoldedTensor(vector, dtype), f"{norm.outputs[0].name}_{name}")
        for vector, name in zip(vectors, ("gain", "bias"), strict=True)
    )
    product = editor.node(norm, "Mul", [x, gain])
    product.metadata_props.update(norm.metadata_props)
    product.outputs[0].shape, product.outputs[0].type = ir.Shape(dims), ir.TensorType(dtype)
    op_type, inputs, attributes = last.op_type, tuple(last.inputs), dict(last.attributes)
    last.op_type = "Add"
    last.attributes.clear()
    last.resize_inputs(2)
    for index, value in enumerate((product.outputs[0], bias)):
        last.replace_input_with(index, value)

    def write_back() -> None:
        stands = last.graph is not None and last.inputs[0] is product.outputs[0]
        if not stands or product.inputs[1] is not gain or last.inputs[1] is not bias:
            editor.remove_dead([*norm.outputs, product.outputs[0], gain, bias])
            return
        last.op_type = op_type
        last.attributes.update(attributes)
        last.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            last.replace_input_with(index, value)
        if last is norm:
            last.replace_input_with(0, product.inputs[0])
        editor.remove_dead([product.outputs[0], gain, bias])

    written.callback(write_back)
    return {product}
