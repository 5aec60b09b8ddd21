"""No harm: onnx's own backend test data, alone and between two projections, comes out equal."""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_close, fold, normal, outputs, proto, square
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import replace_all_uses_with

from onnx_fold.graph.constants import FLOATS
from onnx_fold.runtime.inputs import make_inputs

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
MAX_WIDTH = 64  # of a square matrix that is multiplied in front of an operator

Feeds = dict[str, np.ndarray]


@cache
def operator_cases():
    """The generated cases: one operator each, and its function body expanded."""
    with warnings.catch_warnings(action="ignore"):  # overflows that are part of the cases
        from onnx.backend.test.case.node import collect_testcases

        cases = [case for case in collect_testcases(None) if case.model and case.data_sets]
    assert len(cases) > 1000
    return cases


@pytest.mark.parametrize("folder", ["light", "pytorch-converted", "pytorch-operator", "simple"])
def test_files(folder, tmp_path):
    paths = sorted((DATA / folder).rglob("*.onnx"))
    assert len(paths) > 5
    for path in paths:
        result = fold(path)
        result.save(tmp_path / "folded.onnx")
        if result.report.folded:
            after = ir.load(tmp_path / "folded.onnx")
            assert_same_outputs(result.original, after, recorded(path, result.original), path)
        else:
            assert (tmp_path / "folded.onnx").read_bytes() == path.read_bytes(), path


def recorded(path: Path, model: ir.Model) -> Feeds:
    """The inputs that lie beside a model, else random ones."""
    folder = path.parent / "test_data_set_0"
    count = len(list(folder.glob("input_*.pb")))
    if not count:
        return make_inputs(model)
    arrays = [to_array(onnx.load_tensor(folder / f"input_{i}.pb")) for i in range(count)]
    return {value.name: array for value, array in zip(model.graph.inputs, arrays, strict=False)}


def test_operators_alone():
    for case in operator_cases():
        assert_no_harm(*as_it_is(case), case.name)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("is_every", [False, True], ids=["first", "every"])
def test_operators_between_projections(axis, is_every):
    """``x -> MatMul(P) -> operator -> MatMul(M)`` folds if the operator commutes, else not."""
    folded = set()
    for case in operator_cases():
        made = between_projections(case, axis, is_every)
        if made is not None and assert_no_harm(*made, case.name):
            folded.add(case.model.graph.node[0].op_type)
    assert folded >= {"Add", "Concat", "Gather", "Identity", "Neg", "Squeeze", "Sub", "Transpose"}


def as_it_is(case) -> tuple[ir.Model, Feeds]:
    model = ir.from_proto(case.model)
    names = [value.name for value in model.graph.inputs]
    return model, dict(zip(names, case.data_sets[0][0], strict=False))


def between_projections(case, axis: int, is_every: bool) -> tuple[ir.Model, Feeds] | None:
    """Multiply ``axis`` of the first float input, or of every one, and of every float output.

    Inputs that are not multiplied become initializers, as weights and shapes are.
    """
    model, feeds = as_it_is(case)
    model.opset_imports.setdefault("", 18)
    chosen = [v for v in model.graph.inputs if has_axis(v, feeds.get(v.name), axis)]
    if not chosen:
        return None
    if not is_every:
        del chosen[1:]
    for value in tuple(model.graph.inputs):
        if value in chosen:
            multiply_input(model.graph, value, feeds, axis)
        elif is_plain(value, feeds.get(value.name)):
            value.const_value = ir.tensor(feeds.pop(value.name), name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    for value, array in zip(tuple(model.graph.outputs), case.data_sets[0][1], strict=True):
        if has_axis(value, array, axis):
            multiply_output(model.graph, value, array, axis)
    return model, feeds


def multiply_input(graph: ir.Graph, value: ir.Value, feeds: Feeds, axis: int) -> None:
    raw = ir.Value(name=f"{value.name}_raw", type=value.type, shape=value.shape)
    feeds[raw.name] = array = feeds.pop(value.name)
    node = product(graph, raw, square(array.shape[axis], 1, array.dtype), axis)
    replace_all_uses_with(value, node.outputs[0])
    graph.insert_before(graph[0], node)
    graph.inputs[list(graph.inputs).index(value)] = raw


def multiply_output(graph: ir.Graph, value: ir.Value, array: np.ndarray, axis: int) -> None:
    width = array.shape[axis]
    weight = normal(*((width, 3) if axis == -1 else (3, width)), seed=2, dtype=array.dtype)
    node = product(graph, value, weight, axis)
    node.outputs[0].type = value.type
    node.outputs[0].shape = ir.Shape([None] * array.ndim)
    graph.append(node)
    graph.outputs[list(graph.outputs).index(value)] = node.outputs[0]


def product(graph: ir.Graph, value: ir.Value, matrix: np.ndarray, axis: int) -> ir.Node:
    name = f"{value.name}_weight"
    weight = ir.Value(name=name, const_value=ir.tensor(matrix, name=name))
    graph.register_initializer(weight)
    node = ir.node("MatMul", [value, weight] if axis == -1 else [weight, value])
    node.outputs[0].name = f"{value.name}_product"
    return node


def is_plain(value: ir.Value, array: object) -> bool:
    is_tensor = isinstance(value.type, ir.TensorType) and isinstance(array, np.ndarray)
    return is_tensor and value.dtype != ir.DataType.STRING and array.dtype == value.dtype.numpy()


def has_axis(value: ir.Value, array: object, axis: int) -> bool:
    """Whether ``value`` is a float tensor with a channel axis that can be multiplied."""
    is_float = is_plain(value, array) and value.dtype in FLOATS and array.size > 0
    return is_float and array.ndim >= -axis and array.shape[axis] <= MAX_WIDTH


def assert_no_harm(model: ir.Model, feeds: Feeds, name: object) -> bool:
    """Fold ``model``: either it is not changed or its outputs are not. Whether it was changed."""
    before = proto(model)
    result = fold(model)
    assert proto(model) == before, name
    if result.report.folded:
        assert_same_outputs(model, result.model, feeds, name)
    else:
        assert proto(result.model) == before, name
    return bool(result.report.folded)


def assert_same_outputs(before: ir.Model, after: ir.Model, feeds: Feeds, name: object) -> None:
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    expected, actual = run(before, feeds), run(after, feeds)
    assert list(expected) == list(actual), name
    for output, reference in expected.items():
        assert_close(actual[output], reference, f"{name}: {output}")


def run(model: ir.Model, feeds: Feeds) -> Feeds:
    """In ONNX Runtime, or if that has no kernel, in onnx's reference implementation."""
    try:
        return outputs(model, **feeds)
    except Exception:
        results = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
        return {v.name: a for v, a in zip(model.graph.outputs, results, strict=True)}
