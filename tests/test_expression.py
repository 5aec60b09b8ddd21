"""Expression trees: what they evaluate to, what they read, how they travel."""

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from helpers import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.expression import (
    Broadcast,
    Concatenate,
    Expression,
    FoldedTensor,
    Leaf,
    Part,
    Spread,
    Sum,
    broadcast,
    cast,
    evaluate,
    literal,
    of_tensor,
    product,
    reshape,
    scale,
    take,
    transpose,
)
from onnx_fold.algebra.selection import RowSelection
from onnx_fold.algebra.storage import InFile, InMemory, InSpool, OnDemand, Spool
from onnx_fold.errors import NotFiniteError

SIZES = st.integers(1, 6)
Pair = tuple[Expression, np.ndarray]


def held(*shape: int, seed: int = 0) -> Pair:
    array = normal(*shape, seed=seed, dtype=np.float64)
    return literal(array), array


@st.composite
def indices(draw: st.DrawFn, size: int) -> np.ndarray:
    return np.array(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)))


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> Pair:
    """A matrix as an expression, and the same by numpy."""
    seed = draw(st.integers(0, 99))
    if depth == 0:
        return held(draw(SIZES), draw(SIZES), seed=seed)
    x, a = draw(trees(depth - 1))
    rows, columns = a.shape
    match draw(st.integers(0, 10)):
        case 0:
            right, b = held(columns, draw(SIZES), seed=seed)
            return product(x, right), a @ b
        case 1:
            return transpose(x), a.T
        case 2:
            return scale(x, -0.5), -0.5 * a
        case 3:
            axis = draw(st.integers(-2, 1))
            picked = draw(indices(a.shape[axis]))
            return take(x, picked, axis), np.take(a, picked, axis)
        case 4:
            axis = draw(st.integers(0, 1))
            other, b = held(*((draw(SIZES), columns) if axis == 0 else (rows, draw(SIZES))))
            return Concatenate(x, other, axis=axis), np.concatenate([a, b], axis)
        case 5:
            return Sum(x, x, literal(a[0])), a + a + a[0]
        case 6:
            matrix, b = held(rows, rows, seed=seed)
            basis = Basis(Sum(matrix, literal(3.0 * np.eye(rows))))
            return basis.of_reader(x), np.linalg.solve(b + 3.0 * np.eye(rows), a)
        case 7:
            matrix, b = held(columns, columns, seed=seed)
            basis = Basis(Sum(matrix, literal(3.0 * np.eye(columns))), inverted=True)
            return basis.of_writer(x), np.linalg.solve((b + 3.0 * np.eye(columns)).T, a.T).T
        case 8:
            return reshape(x, (-1, rows)), a.reshape(-1, rows)
        case 9:
            column = take(x, slice(0, 1), 1)
            return broadcast(column, (rows, 4)), np.broadcast_to(a[:, :1], (rows, 4))
        case _:
            units = np.array(draw(st.lists(st.integers(0, columns - 1), max_size=3)), dtype=int)
            order = np.random.default_rng(seed).permutation(len(units) + rows)
            expected = np.empty((len(order), columns))
            expected[order] = np.vstack([np.eye(columns)[units], a])
            return Spread(literal(units), x, literal(order)), expected


@settings(derandomize=True, deadline=None, max_examples=300)
@given(trees(), st.data())
def test_evaluation_is_that_of_numpy(tree: Pair, data: st.DataObject) -> None:
    x, expected = tree
    assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(evaluate(x), expected, rtol=1e-9, atol=1e-11)
    axis = data.draw(st.integers(0, 1))
    picked = data.draw(indices(expected.shape[axis]))
    sample = take(x, picked, axis)
    assert sample.shape == np.take(expected, picked, axis).shape
    np.testing.assert_allclose(
        evaluate(sample), np.take(expected, picked, axis), rtol=1e-9, atol=1e-11
    )


@settings(derandomize=True, deadline=None, max_examples=100)
@given(trees())
def test_a_tree_can_be_pickled(tree: Pair) -> None:
    x, _ = tree
    np.testing.assert_array_equal(evaluate(pickle.loads(pickle.dumps(x))), evaluate(x))


def test_what_is_used_twice_is_evaluated_once() -> None:
    array = normal(4, 4)
    asked: list[np.ndarray] = []

    def ask() -> np.ndarray:
        asked.append(array)
        return array

    x = Leaf(source=OnDemand(array.shape, array.dtype, ask))
    np.testing.assert_allclose(
        evaluate(Sum(product(x, x), product(x, transpose(x)))),
        array @ array + array @ array.T,
        rtol=1e-6,
    )
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_file_is_read_by_who_evaluates(tmp_path: Path, dtype: type) -> None:
    array = normal(5, 3, dtype=dtype)
    (tmp_path / "weights").write_bytes(b"12345678" + array.tobytes())
    name = ir.DataType.from_numpy(array.dtype)
    tensor = ir.ExternalTensor(
        "weights", 8, array.nbytes, name, shape=ir.Shape((5, 3)), name="w", base_dir=tmp_path
    )
    x = of_tensor(tensor)
    assert isinstance(x.arguments["source"], InFile)
    np.testing.assert_array_equal(evaluate(x), array, strict=True)
    sample = take(transpose(cast(x, np.float64)), np.array([2, 0]), 0)
    assert any(node.operation is Part for node in _nodes(sample))
    np.testing.assert_array_equal(evaluate(sample), array.T[[2, 0]].astype(np.float64))
    pickled = pickle.dumps(FoldedTensor(x, ir.DataType.FLOAT16, "w"))
    assert array.tobytes() not in pickled
    np.testing.assert_array_equal(pickle.loads(pickled).numpy(), array.astype(np.float16))


def _nodes(x: Expression) -> list[Expression]:
    return [x, *(node for operand in x.operands for node in _nodes(operand))]


def test_selected_rows_travel_without_their_matrix() -> None:
    matrix = normal(9, 4, dtype=np.float64)
    rows = RowSelection(literal(matrix), ir.DataType.FLOAT)
    order, rest = pickle.loads(pickle.dumps((rows.order, rows.rest)))
    order, rest = evaluate(order), evaluate(rest)
    np.testing.assert_allclose(rest @ matrix[order[:4]], matrix[order[4:]], atol=1e-6)
    np.testing.assert_array_equal(evaluate(rows.basis), matrix[order[:4]])
    np.testing.assert_allclose(
        evaluate(rows.rebuilt(rows.rest)) @ matrix[order[:4]], matrix, atol=1e-6
    )


def test_what_changes_nothing_adds_nothing() -> None:
    x = literal(normal(3, 4))
    assert cast(x, np.float32) is x
    assert scale(x, 1.0) is x
    assert transpose(transpose(x)) is x
    assert reshape(x, (3, -1)) is x
    assert broadcast(x, (3, 4)) is x
    assert broadcast(x, (2, 3, 4)).operation is Broadcast
    narrow = literal(normal(3, 4, dtype=np.float16))
    assert cast(cast(narrow, np.float64), np.float32).operands == (narrow,)
    assert cast(cast(x, np.float16), np.float32).operands != (x,)


def test_what_is_large_is_spooled_to_disk() -> None:
    spool = Spool(in_memory=100)
    small, large = normal(5, 5), normal(9, 4, dtype=np.float64)
    assert isinstance(spool.add(small), InMemory)
    for array in (large, large + 1.0):
        kept = Leaf(source=spool.add(array))
        assert isinstance(kept.arguments["source"], InSpool)
        for x in (kept, pickle.loads(pickle.dumps(kept))):
            np.testing.assert_array_equal(evaluate(x), array, strict=True)
            picked = np.array([3, 1])
            np.testing.assert_array_equal(evaluate(take(x, picked, 0)), array[picked])
            np.testing.assert_array_equal(evaluate(take(x, picked, 1)), array[:, picked])


def test_a_weight_that_is_not_finite_is_not_written() -> None:
    large = scale(literal(normal(3, 3)), 1e6)
    with pytest.raises(NotFiniteError, match="'w' is not finite in float16"):
        FoldedTensor(product(large, large), ir.DataType.FLOAT16, "w").numpy()
    moved = take(literal(np.array([np.inf, 1.0])), np.array([1, 0]), 0)
    np.testing.assert_array_equal(FoldedTensor(moved, ir.DataType.FLOAT).numpy(), [1.0, np.inf])
