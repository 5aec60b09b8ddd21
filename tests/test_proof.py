"""The proof in float64: right folds pass in every type, and one that is made wrong never does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, graph, normal, proto

import onnx_fold
from onnx_fold.algebra import exact as exact_module
from onnx_fold.algebra.device import Array
from onnx_fold.algebra.exact import Multiplier, checked, exact, values
from onnx_fold.algebra.expression import (
    Cast,
    Concatenate,
    Diagonal,
    Expression,
    Factors,
    FoldedTensor,
    Product,
    Scale,
    Solve,
    Sum,
    Take,
    Transpose,
    cast,
    literal,
    take,
    transpose,
)
from onnx_fold.check import proof as proof_module
from onnx_fold.check.proof import prove
from onnx_fold.errors import WrongWeightError
from onnx_fold.graph.edit import Editor
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.runtime.sessions import MissingKernelError

D, F = 6, 16
TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ir.DataType.BFLOAT16.numpy()}


def block(kind: str) -> ir.Model:
    """P merges, O is interpolated; with biases, and a square reader to absorb."""
    held = {"P": normal(D, D), "p": normal(D), "M": normal(D, F), "O": normal(F, D, seed=1)}
    held |= {"o": normal(D, seed=2), "Q": normal(D, D, seed=3), "R": normal(D, 4, seed=4)}
    return graph(
        f"({kind}[b, n, {D}] x) => ({kind}[b, n, {D}] y, {kind}[b, n, 4] z)"
        " { p0 = MatMul(x, P) p1 = Add(p0, p) m = MatMul(p1, M) h = Relu(m) o0 = MatMul(h, O)"
        " o1 = Add(o0, o) y = MatMul(o1, Q) z = MatMul(o1, R) }",
        **{name: array.astype(TYPES[kind]) for name, array in held.items()},
    )


def heads(kind: str) -> ir.Model:
    """Q and K of two heads each, of which two can be selected as the basis of the table."""
    held = {"E": normal(9, 4), "Q": normal(4, 4, seed=5), "K": normal(4, 4, seed=6)}
    held["W"] = normal(4, 3, seed=7)
    return graph(
        f"(int64[b, n] ids) => ({kind}[b, h, n, m] s, {kind}[b, n, 3] w)"
        " { x = Gather(E, ids) q0 = MatMul(x, Q) k0 = MatMul(x, K) w = MatMul(x, W)"
        " q1 = Reshape(q0, shape) k1 = Reshape(k0, shape)"
        " q2 = Transpose<perm=[0, 2, 1, 3]>(q1) k2 = Transpose<perm=[0, 2, 3, 1]>(k1)"
        " s = MatMul(q2, k2) }",
        shape=np.array([0, 0, 2, 2]),
        **{name: array.astype(TYPES[kind]) for name, array in held.items()},
    )


MODELS: dict[str, Callable[[str], ir.Model]] = {
    "merge": block,
    "absorb": block,
    "interpolate": block,
    "select": heads,
}


def planned(model: ir.Model, strategy: str) -> onnx_fold.FoldResult:
    options = {"only": ["merge"]} if strategy == "merge" else {"strategy": strategy, "force": True}
    result = fold(model, **options)
    assert any(stream.folded.strategy == strategy for stream in result.report.folded)
    return result


@pytest.mark.parametrize("is_large", [False, True], ids=["whole", "by-stream"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("strategy", MODELS)
def test_right_folds_are_proved(strategy, kind, is_large, monkeypatch):
    if is_large:
        monkeypatch.setattr(proof_module, "WHOLE", 0)
        monkeypatch.setattr("onnx_fold.check.interpreter.LARGE", 1)
    result = planned(MODELS[strategy](kind), strategy)
    proof = prove(result.original, result.model, result.report.folded)
    assert proof.proved == [stream.name for stream in result.report.folded]
    assert not proof.failed
    assert not proof.unproved
    assert proof.error < 1e-12
    assert proof.scope == ("each stream" if is_large else "whole model")


# --- Folds that are made wrong on purpose ---------------------------------------------------------


def swapped(expression: Expression) -> Expression:
    """One wrong row: the first two change places."""
    order = np.arange(expression.shape[0])
    order[:2] = order[1::-1]
    return take(expression, order, 0)


def scaled(factor: float) -> Callable[[Expression], Expression]:
    return lambda expression: Cast(Scale(expression, factor=factor), to=expression.dtype)


FAULTS: dict[str, Callable[[Expression], Expression]] = {
    "sign": scaled(-1.0),
    "row": swapped,
    "transpose": lambda expression: Transpose(expression, permutation=(1, 0)),
    "small": scaled(1.0 + 1e-6),
    "bias": scaled(0.0),
}


def is_hit(fault: str, shape: tuple[int, ...]) -> bool:
    if fault == "bias":
        return len(shape) == 1
    return len(shape) == 2 and (fault != "transpose" or shape[0] == shape[1])


@pytest.fixture
def plant(monkeypatch) -> Callable[[str, str], list[str]]:
    """Make each fold of a strategy wrong, in the last of its new weights that the fault fits."""
    hit: list[str] = []
    apply = Rewrite.apply

    def planting(strategy: str, fault: str) -> list[str]:
        def wrong(self: Rewrite, editor: Editor) -> None:
            fitting = [t for t in self._new_tensors() if is_hit(fault, t.expression.shape)]
            if fitting:
                fitting[-1].expression = FAULTS[fault](fitting[-1].expression)
                hit.append(fault)
            apply(self, editor)

        monkeypatch.setattr(Rewrite, "apply", wrong)
        return hit

    return planting


def cases() -> Iterator[tuple[str, str]]:
    for strategy in MODELS:
        for fault in FAULTS:
            if (strategy, fault) not in (("merge", "transpose"), ("select", "bias")):
                yield strategy, fault


@pytest.mark.parametrize("is_large", [False, True], ids=["whole", "by-stream"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("strategy", "fault"), list(cases()))
def test_a_wrong_fold_is_caught(strategy, fault, kind, is_large, plant, monkeypatch):
    if is_large:
        monkeypatch.setattr(proof_module, "WHOLE", 0)
        monkeypatch.setattr("onnx_fold.check.interpreter.LARGE", 1)
    hit = plant(strategy, fault)
    result = planned(MODELS[strategy](kind), strategy)
    if not hit:
        pytest.skip("no new weight has this shape")
    proof = prove(result.original, result.model, result.report.folded)
    assert proof.failed
    assert len(proof.failed) + len(proof.proved) == len(result.report.folded)


@pytest.mark.parametrize("kind", TYPES)
def test_a_wrong_fold_is_taken_back_and_the_rest_is_kept(kind, monkeypatch):
    apply = Rewrite.apply

    def wrong(self: Rewrite, editor: Editor) -> None:
        if any(value.name == "p0" for value in self.replaced):  # P into M
            tensor = next(t for t in self._new_tensors() if t.expression.shape == (D, F))
            tensor.expression = swapped(tensor.expression)
        apply(self, editor)

    monkeypatch.setattr(Rewrite, "apply", wrong)
    model = block(kind)
    before = proto(model)
    result = onnx_fold.fold(model, objective="size")
    assert proto(model) == before
    taken_back = result.report.taken_back
    assert taken_back.keys() == {
        f"{by} MatMul -> p0 into MatMul -> m" for by in ("absorb", "merge")
    }
    assert all("the proof rejects it: output" in reason for reason in taken_back.values())
    assert result.report.folded
    assert result.report.proof.proved == [stream.name for stream in result.report.folded]
    assert result.report.verification.ok
    refused = [each.refused for stream in result.report.streams for each in stream.candidates]
    assert set(taken_back.values()) < set(refused)
    with pytest.raises(onnx_fold.CheckFailedError, match=r"the proof rejects (absorb|merge)"):
        onnx_fold.fold(model, objective="size", strict=True)


def test_a_fold_that_only_the_whole_model_rejects_is_found_by_bisection(monkeypatch):
    monkeypatch.setattr(proof_module, "cut", lambda *_: None)
    test_a_wrong_fold_is_taken_back_and_the_rest_is_kept("float", monkeypatch)


def test_a_fold_that_is_right_and_inaccurate_is_taken_back(monkeypatch):
    """What is stored is far off; the formula is right. So the proof passes, the judgement not."""
    apply = Rewrite.apply

    def coarse(self: Rewrite, editor: Editor) -> None:
        if any(value.name == "p0" for value in self.replaced):
            tensor = next(t for t in self._new_tensors() if t.expression.shape == (D, F))
            half = Cast(tensor.expression, to=np.dtype(np.float16))
            tensor.expression = Cast(half, to=np.dtype(np.float32))
        apply(self, editor)

    monkeypatch.setattr(Rewrite, "apply", coarse)
    monkeypatch.setattr(exact_module, "_is_rounded", lambda *_: True)
    result = onnx_fold.fold(block("float"), objective="size")
    assert result.report.proof.proved == [stream.name for stream in result.report.folded]
    assert any("is not the same function" in why for why in result.report.taken_back.values())
    assert result.report.verification is None or result.report.verification.ok
    with pytest.raises(onnx_fold.CheckFailedError, match="is not the same function"):
        onnx_fold.fold(block("float"), objective="size", strict=True)


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_stored_is_what_was_proved_rounded_to_nearest(kind):
    result = fold(block(kind))
    tensors = [v.const_value for v in result.model.graph.initializers.values()]
    folded = [tensor for tensor in tensors if isinstance(tensor, FoldedTensor)]
    assert folded
    for tensor in folded:
        np.testing.assert_array_equal(checked(tensor), tensor.numpy())

        class Wrong(FoldedTensor):
            def evaluated(self) -> Array:
                array = super().evaluated()
                array.reshape(-1)[-1] += array.dtype.type(np.abs(array).max())
                return array

        with pytest.raises(WrongWeightError):
            checked(Wrong(tensor.expression, tensor.dtype, tensor.name))


def test_a_weight_that_is_stored_in_float64_may_have_lost_digits():
    skewed = normal(D, D, dtype=np.float64) @ np.diag(np.logspace(0, -5, D))
    right = literal(normal(D, 5, dtype=np.float64))
    expression = Product(
        literal(normal(9, D, dtype=np.float64)), Solve(Factors(literal(skewed)), right)
    )
    checked(FoldedTensor(expression, ir.DataType.DOUBLE, "w"))

    class Noisy(FoldedTensor):
        def evaluated(self) -> Array:
            array = super().evaluated()
            return array + 1e-6 * np.abs(array).max()

    with pytest.raises(WrongWeightError):
        checked(Noisy(expression, ir.DataType.DOUBLE, "w"))


# --- Multiplying by what is not evaluated ---------------------------------------------------------


def expressions() -> Iterator[Expression]:
    a, b, c = (literal(normal(6, 6, seed=seed, dtype=np.float64)) for seed in range(3))
    tall, wide = literal(normal(9, 6, dtype=np.float64)), literal(normal(6, 5, dtype=np.float64))
    factors = Factors(a)
    index = np.array([3, 0, 3, 1])
    yield from (a, Product(tall, a), Product(a, wide), Scale(tall, factor=0.5), Sum(a, b, c))
    yield from (Solve(factors, wide), Solve(factors, wide, transposed=True))
    yield from (transpose(Product(tall, a)), Take(tall, literal(index), axis=0))
    yield Take(Solve(factors, wide), literal(index), axis=0)
    yield Take(tall, literal(index), axis=1)
    yield from (Concatenate(a, wide, axis=1), Concatenate(tall, b, axis=0))
    yield Diagonal(literal(np.arange(1.0, 7.0)))
    yield Product(transpose(Solve(factors, transpose(tall))), Solve(factors, wide))
    yield exact(Product(cast(tall, np.float32), cast(a, np.float32)))


@pytest.mark.parametrize("number", range(len(list(expressions()))))
def test_rows_times_a_matrix_that_is_not_evaluated(number):
    expression = list(expressions())[number]
    whole = values(expression)
    for transposed in (False, True):
        x = normal(3, whole.shape[transposed], dtype=np.float64)
        product = Multiplier().times(x, expression, transposed=transposed)
        np.testing.assert_allclose(product, x @ (whole.T if transposed else whole), atol=1e-13)


def test_a_singular_matrix_is_solved_by_least_squares():
    basis = normal(6, 2, dtype=np.float64) @ normal(2, 6, dtype=np.float64)
    others = normal(3, 6, dtype=np.float64) @ basis
    solve = transpose(Solve(Factors(literal(basis)), literal(others.T), transposed=True))
    np.testing.assert_allclose(values(solve) @ basis, others, atol=1e-12)
    x = np.eye(3)
    np.testing.assert_allclose(Multiplier().times(x, solve) @ basis, others, atol=1e-12)


def test_an_operator_without_a_kernel_for_float64_is_not_proved(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingKernelError("no kernel")

    result = fold(block("float"), only=["merge"])
    for model in (result.original, result.model):
        model.opset_imports["com.microsoft"] = 1
        for node in model.graph:
            if node.op_type == "Relu":
                node.domain, node.op_type = "com.microsoft", "FastGelu"
    monkeypatch.setattr(proof_module.sessions, "session", missing)
    monkeypatch.setattr(proof_module, "cut", lambda *_: (result.original, result.model))
    proof = prove(result.original, result.model, result.report.folded)
    assert not proof.failed
    assert not proof.proved
    assert ["FastGelu" in reason for reason in proof.unproved.values()] == [True]
