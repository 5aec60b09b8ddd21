"""Weights evaluated by torch: its processor stands in for its other devices."""

import logging
import pickle
import sys

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from helpers import assert_same_function, graph, normal, square
from hypothesis import given, settings
from test_expression import Pair, trees

import onnx_fold
from onnx_fold import pipeline
from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.device import HOST, TorchDevice, find_device
from onnx_fold.algebra.expression import FoldedTensor, cast, evaluate, literal
from onnx_fold.algebra.selection import select_rows
from onnx_fold.errors import UsageError

pytest.importorskip("torch")
TORCH = TorchDevice("cpu")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(trees())
def test_torch_evaluates_to_the_same(tree: Pair) -> None:
    x, expected = tree
    np.testing.assert_allclose(evaluate(x, TORCH), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.intp])
def test_arrays_go_there_and_back(dtype: type) -> None:
    array = (100 * normal(3, 4)).astype(dtype)
    array.flags.writeable = False
    for each in (array, array.T, array[:, ::2], array[:0], np.broadcast_to(array[0], (2, 4))):
        np.testing.assert_array_equal(TORCH.fetch(TORCH.load(each)), each, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_rounding_is_the_same(dtype: type) -> None:
    x = cast(literal(normal(9, 9, dtype=np.float64) * 1e5), dtype)
    np.testing.assert_array_equal(evaluate(x, TORCH), evaluate(x), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_selected_rows_are_the_same(dtype: type) -> None:
    matrix = normal(40, 12, dtype=dtype)
    order, rest = select_rows(matrix, device=TORCH)
    expected, coefficients = select_rows(matrix)
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_allclose(rest, coefficients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_condition_number_is_the_same(inverted: bool) -> None:
    basis = Basis(literal(square(9, dtype=np.float64)), inverted)
    assert basis.factored(TORCH)[1] == pytest.approx(basis.condition, rel=1e-9)
    assert Basis(literal(np.zeros((3, 3)))).factored(TORCH)[1] == np.inf


def block(dtype: type) -> ir.Model:
    """A tall writer, and readers of which one is square: absorbed, or interpolated."""
    held = {"M": normal(6, 16), "O": normal(16, 6, seed=1), "Q": square(6), "R": normal(6, 9)}
    kind = "float16" if dtype == np.float16 else "float"
    return graph(
        f"({kind}[b, n, 6] x) => ({kind}[b, n, 6] y, {kind}[b, n, 9] z) {{ a = MatMul(x, M)"
        " h = Relu(a) s = MatMul(h, O) y = MatMul(s, Q) z = MatMul(s, R) }",
        **{name: array.astype(dtype) for name, array in held.items()},
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("strategy", ["absorb", "interpolate"])
def test_a_fold_by_torch(monkeypatch: pytest.MonkeyPatch, strategy: str, dtype: type) -> None:
    monkeypatch.setattr(pipeline, "find_device", TorchDevice)
    model = block(dtype)
    result = onnx_fold.fold(model, strategy=strategy, objective="size", verify=False, device="cpu")
    assert result.report.saving.weights == 36
    assert_same_function(model, result.model)
    expected = onnx_fold.fold(
        model, strategy=strategy, objective="size", verify=False, device="cpu"
    )
    for name, value in result.model.graph.initializers.items():
        if isinstance(tensor := value.const_value, FoldedTensor):
            assert tensor.device == pickle.loads(pickle.dumps(tensor)).device == TORCH
            tensor.device = HOST
            other = expected.model.graph.initializers[name].const_value.numpy()
            np.testing.assert_allclose(other, tensor.numpy(), rtol=2e-3, atol=1e-5)


def test_where_the_device_is_missing_the_processor_folds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_device("cpu") is HOST
    with caplog.at_level(logging.WARNING):
        assert find_device("meta") is HOST
        assert "on the processor, not on meta" in caplog.text
        monkeypatch.setitem(sys.modules, "torch", None)
        assert find_device("cuda") is HOST
        assert "torch is not installed: pip install 'onnx-fold[torch]'" in caplog.text


@pytest.mark.parametrize("name", ["graphics", "cuda:first"])
def test_a_name_that_torch_does_not_know(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown device '{name}'"):
        onnx_fold.fold(block(np.float32), device=name)
