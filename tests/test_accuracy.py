"""What the accuracy page states, and what its figures rest on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import load_script
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fold.algebra import completion
from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.completion import Completion, find_gap, size_of
from onnx_fold.algebra.exact import Multiplier, exact, values
from onnx_fold.algebra.expression import evaluate, literal, take
from onnx_fold.algebra.selection import RowSelection, select_rows

ROOT = Path(__file__).parents[1]
DTYPES = ("fp32", "fp16", "bf16")
KEYS = {
    "top": {"streams", "streams_measured", "models", "models_measured", "targets"}
    | {"deep", "deep_measured"},
    "measured": {"command", "date", "cpu", "cores", "platform", "versions", "seconds"},
    "streams": {"weights", "d", "dtype", "count", "condition", "error_original", "ratio", "worst"}
    | {"taken"},
    "models": {"model", "d", "blocks", "dtype", "weights", "error_original", "strategies"},
    "folded": {"error", "ratio", "weights_removed", "squares_removed", "folds", "condition"}
    | {"top1_agreement", "kl_divergence"},
    "targets": {"dtype", "ratio", "ratio_limit", "squares_removed", "squares_least", "met"},
}


def check_schema(data: dict) -> None:
    assert data.keys() == KEYS["top"]
    for part in ("streams_measured", "models_measured", "deep_measured"):
        assert data[part].keys() == KEYS["measured"]
    for stream in data["streams"]:
        assert stream.keys() == KEYS["streams"]
        assert stream["dtype"] in DTYPES
        assert {"merge", "absorb", "interpolate"} <= stream["ratio"].keys()
        assert stream["ratio"].keys() == stream["worst"].keys()
    for model in data["models"]:
        assert model.keys() == KEYS["models"]
        assert {"paper", "merge + interpolate", "automatic"} <= model["strategies"].keys()
    for model in data["deep"]:
        assert {"paper", "automatic"} == model["strategies"].keys()
    for model in data["models"] + data["deep"]:
        for folded in model["strategies"].values():
            assert folded.keys() == KEYS["folded"]
            assert folded["squares_removed"] == pytest.approx(
                folded["weights_removed"] / model["d"] ** 2, rel=1e-3
            )
    for target in data["targets"]:
        assert target.keys() == KEYS["targets"]


def gaussian_streams(data: dict) -> dict[str, dict]:
    found = [s for s in data["streams"] if (s["weights"], s["d"]) == ("gaussian", 256)]
    return {stream["dtype"]: stream for stream in found}


def check_order(data: dict) -> None:
    """Interpolation stays below 8 times the original's own error, absorption is worse."""
    streams = gaussian_streams(data)
    assert tuple(streams) == DTYPES
    for stream in streams.values():
        assert stream["worst"]["merge"] < 1.5
        assert stream["worst"]["interpolate"] <= 8
        assert stream["ratio"]["absorb"] > 2 * stream["ratio"]["interpolate"]
    models = [m for m in data["models"] if (m["model"], m["d"]) == ("gaussian", 256)]
    assert tuple(model["dtype"] for model in models) == DTYPES
    for model in models:
        folded = model["strategies"]
        assert folded["merge + interpolate"]["ratio"] <= 8
        assert folded["automatic"]["ratio"] <= 8
        assert folded["paper"]["ratio"] > folded["merge + interpolate"]["ratio"]
        assert folded["paper"]["squares_removed"] == 2 * model["blocks"]
        each = 2 if model["dtype"] == "fp32" else 1  # for a part of O, in 16 bits, d is too small
        assert folded["automatic"]["squares_removed"] >= each * model["blocks"]


def test_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = ROOT / "benchmarks" / "accuracy.py"
    command = [sys.executable, str(script), "--quick", "--output", str(tmp_path)]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # the other cores run other tests
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=one_thread)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    check_schema(data)
    check_order(data)


def test_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    accuracy = load_script(ROOT / "benchmarks" / "accuracy.py")
    data = json.loads((ROOT / "docs" / "accuracy.json").read_text(encoding="utf-8"))
    check_schema(data)
    check_order(data)
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for name, table in accuracy.tables(data).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page


# --- Rows of a writer -----------------------------------------------------------------------------


@st.composite
def tall_matrices(draw: st.DrawFn) -> np.ndarray:
    """Gaussian rows of any rank and scale, some of them zero, some equal."""
    width = draw(st.integers(1, 24))
    rows = width + draw(st.integers(1, 60))
    rank = draw(st.integers(0, width))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, width))
    if draw(st.booleans()):
        matrix[generator.random(rows) < 0.3] = 0.0
    if draw(st.booleans()):
        matrix[rows // 2 :] = matrix[: rows - rows // 2]
    if draw(st.booleans()):
        matrix *= 10.0 ** generator.integers(-8, 9, (rows, 1))
    if draw(st.booleans()):
        matrix *= 10.0 ** generator.integers(-8, 9, (1, width))
    return matrix * 10.0 ** draw(st.sampled_from((-8, 0, 8)))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(tall_matrices())
def test_selected_rows_give_all_rows(matrix: np.ndarray) -> None:
    rows, width = matrix.shape
    before = matrix.copy()
    order, b = select_rows(matrix)
    np.testing.assert_array_equal(matrix, before)
    assert sorted(order) == list(range(rows))
    assert b.shape == (rows - width, width)
    assert np.abs(b).max() <= 1.5
    basis, others = matrix[order[:width]], matrix[order[width:]]
    # column by column, so that a small channel is not hidden by a large one
    limit = 1e-12 * width * np.abs(matrix).max(axis=0)
    assert (np.abs(others - b @ basis) <= limit).all()


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 9), st.booleans(), st.integers(0, 99))
def test_rows_that_are_not_free_stay_where_they_are(width, more, kept, is_last, seed) -> None:
    rows = width + more + kept
    matrix = np.random.default_rng(seed).standard_normal((rows, width))
    free = slice(kept, rows) if is_last else slice(0, rows - kept)
    selection = RowSelection(literal(matrix), ir.DataType.DOUBLE, free=free, is_last=is_last)
    placed, rest = evaluate(selection.final_order), evaluate(selection.rest)
    fixed = np.delete(np.arange(rows), free)
    np.testing.assert_array_equal(placed[fixed], fixed)
    np.testing.assert_array_equal(
        placed[free] - free.start, evaluate(selection.final_order_of_free)
    )
    ends = slice(-width, None) if is_last else slice(width)
    others = np.delete(placed, ends)
    np.testing.assert_allclose(rest @ matrix[placed[ends]], matrix[others], atol=1e-9)
    rebuilt = evaluate(selection.rebuilt(selection.rest)) @ evaluate(selection.basis)
    np.testing.assert_allclose(rebuilt, matrix, atol=1e-9)


@settings(deadline=None)
@given(
    width=st.integers(2, 24),
    more=st.integers(1, 30),
    fixed=st.integers(0, 5),
    share=st.floats(0.0, 0.99),
    is_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_completed_basis_gives_all_rows(width, more, fixed, share, is_last, seed) -> None:
    """Kept rows stand for themselves, the complement is orthogonal to them and of their size."""
    rows, kept = width + more + fixed, int(share * width)
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((rows, width)) * 10.0 ** generator.integers(-2, 3, (rows, 1))
    free = slice(fixed, rows) if is_last else slice(0, rows - fixed)
    whole = RowSelection(literal(matrix), ir.DataType.DOUBLE, free=free, is_last=is_last)
    part = Completion(whole, width).keeping(kept)
    basis, placed = evaluate(part.basis), evaluate(part.final_order)
    assert sorted(placed) == list(range(rows))
    np.testing.assert_array_equal(
        np.delete(placed, np.r_[free]), np.delete(np.arange(rows), np.r_[free])
    )
    ends = placed[rows - kept :] if is_last else placed[:kept]
    np.testing.assert_array_equal(basis[:kept], matrix[ends])
    own, complement = basis[:kept], basis[kept:]
    gram = complement @ complement.T
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(width - kept), atol=1e-9 * gram[0, 0])
    sizes = np.linalg.norm(own, axis=1, keepdims=True) * math.sqrt(gram[0, 0])
    assert (np.abs(own @ complement.T) <= 1e-9 * sizes).all()
    rebuilt = evaluate(part.rebuilt(part.rest))
    limit = 1e-9 * np.linalg.cond(basis) * np.abs(matrix).max()
    np.testing.assert_allclose(rebuilt @ basis, matrix, atol=limit)
    picked = generator.integers(0, rows, 4)
    sampled = evaluate(take(part.rebuilt(part.rest), picked, 0))
    np.testing.assert_allclose(sampled, rebuilt[picked], atol=1e-12 * np.abs(rebuilt).max())
    expected = values(exact(part.rest))
    np.testing.assert_allclose(
        evaluate(part.rest), expected, atol=1e-9 * np.linalg.cond(basis) * np.abs(expected).max()
    )
    mixed = generator.standard_normal((3, rows - kept))
    times = Multiplier().times(mixed, exact(part.rest, defined=False))
    np.testing.assert_allclose(times, mixed @ evaluate(part.rest), atol=1e-8 * np.abs(times).max())


@settings(derandomize=True, deadline=None, max_examples=200)
@given(tall_matrices(), st.floats(0.0, 0.99))
def test_rows_of_any_rank_can_be_completed(matrix: np.ndarray, share: float) -> None:
    """What is singular is not finite then, and that is all."""
    width = matrix.shape[1]
    whole = RowSelection(literal(matrix), ir.DataType.DOUBLE)
    part = Completion(whole, width).keeping(int(share * width))
    assert sorted(evaluate(part.final_order)) == list(range(len(matrix)))
    with np.errstate(all="ignore"):
        assert evaluate(part.rest).shape == (len(matrix) - part.kept, width)


def test_rows_are_left_out_where_they_cost_most() -> None:
    """One row nearly in the span of the others: without it the basis is orthogonal."""
    matrix = np.vstack([np.eye(8), np.zeros((1, 8))])
    matrix[7] = 1e-3 * np.eye(8)[7] + np.eye(8)[0]
    whole = RowSelection(literal(matrix), ir.DataType.DOUBLE)
    assert Basis(whole.basis).condition > 1e3
    assert Basis(Completion(whole, 1).keeping(7).basis).condition < 1.1


def test_the_best_rows_take_the_place_of_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinates grow less than if the worst rows went, at once, and none came for them."""
    width, kept = 200, 180
    ratios = []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        matrix = generator.standard_normal((4 * width, width))
        matrix *= np.exp(generator.standard_normal((len(matrix), 1)))
        whole = RowSelection(literal(matrix), ir.DataType.DOUBLE)
        with monkeypatch.context() as patch:
            patch.setattr(completion, "STEPS", 1)
            gap = find_gap(evaluate(whole.basis), width - kept)
        basis = evaluate(whole.basis)
        without = np.vstack((basis[gap.left], size_of(basis) * gap.complement))
        chosen = evaluate(Completion(whole, width - kept).keeping(kept).basis)
        ratios.append(growth(chosen, matrix) / growth(without, matrix))
    assert max(ratios) < 1.0
    assert np.mean(ratios) < 0.95


def test_rows_that_are_given_up_after_others_depend_on_these() -> None:
    """In steps, the rows that are left condition the basis better than the worst ones at once."""
    ratios = []
    for seed in range(3):
        matrix = np.random.default_rng(seed).standard_normal((800, 200))
        basis = evaluate(RowSelection(literal(matrix), ir.DataType.DOUBLE).basis)
        found = {}
        for steps in (1, completion.STEPS):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(completion, "STEPS", steps)
                gap = find_gap(basis, 40)
            without = np.vstack((basis[gap.left], size_of(basis) * gap.complement))
            found[steps] = growth(without, matrix)
            np.testing.assert_allclose(gap.complement @ gap.complement.T, np.eye(40), atol=1e-9)
            again = gap.along @ basis[gap.left] + gap.outside @ gap.complement
            np.testing.assert_allclose(again, basis[gap.dropped], atol=1e-9)
        ratios.append(found[completion.STEPS] / found[1])
    assert max(ratios) < 1.0


def test_of_rows_as_far_from_the_others_the_shorter_take_their_place() -> None:
    """What rounds a coordinate is multiplied by its row: long rows stay out of the basis."""
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((800, 100))
    matrix[400:] += 30.0 * generator.standard_normal((400, 4)) @ generator.standard_normal((4, 100))
    whole = RowSelection(literal(matrix), ir.DataType.DOUBLE)
    length = np.linalg.norm(matrix, axis=1)
    found = Completion(whole, 20).exchange
    order = whole.found()
    rows = np.concatenate((order[found.dropped], order[100:]))
    assert np.median(length[rows[found.taken]]) < np.median(length)


def growth(basis: np.ndarray, matrix: np.ndarray) -> float:
    """How rounding errors of coordinates grow: their sizes times the lengths of their rows."""
    sizes = np.linalg.norm(matrix @ np.linalg.inv(basis), axis=0)
    return float(np.linalg.norm(sizes * np.linalg.norm(basis, axis=1)))


def test_swaps_undo_the_growth_of_pivoting() -> None:
    """Partial pivoting is content with growth; swaps bring the coefficients under the bound."""
    width = 12
    wilkinson = np.tril(-np.ones((width, width)), -1) + np.eye(width)
    matrix = np.vstack([wilkinson, np.ones((1, width))])
    order, unswapped = select_rows(matrix, bound=math.inf)
    assert np.abs(unswapped).max() > 100
    order, b = select_rows(matrix)
    assert np.abs(b).max() <= 1.5
    np.testing.assert_allclose(b @ matrix[order[:width]], matrix[order[width:]], atol=1e-9)


# --- A square basis -------------------------------------------------------------------------------


@st.composite
def squares(draw: st.DrawFn) -> tuple[np.ndarray, float]:
    """A square matrix and its condition number, up to nearly singular."""
    width = draw(st.integers(2, 32))
    condition = 10.0 ** draw(st.integers(0, 13))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    left, right = (np.linalg.qr(generator.standard_normal((width, width)))[0] for _ in range(2))
    values = np.geomspace(1.0, 1.0 / condition, width) * 10.0 ** draw(st.sampled_from((-8, 0, 8)))
    return left * values @ right, condition


@settings(derandomize=True, deadline=None, max_examples=200)
@given(squares())
def test_a_nearly_singular_basis_is_solved_with_a_small_residual(
    square: tuple[np.ndarray, float],
) -> None:
    matrix, condition = square
    width = len(matrix)
    size = np.linalg.norm(matrix)
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((width, 5))
    writer, reader = literal(weight.T), literal(weight)

    basis = Basis(literal(matrix))
    assert condition / 3 <= basis.condition <= 1.1 * condition
    solved = evaluate(basis.of_reader(reader))  # T⁻¹ R
    assert np.linalg.norm(matrix @ solved - weight) <= 1e-13 * size * np.linalg.norm(solved)
    np.testing.assert_allclose(evaluate(basis.of_writer(writer)), weight.T @ matrix, rtol=1e-13)

    inverse = Basis(literal(matrix), inverted=True)
    solved = evaluate(inverse.of_writer(writer))  # W P⁻¹
    assert np.linalg.norm(solved @ matrix - weight.T) <= 1e-13 * size * np.linalg.norm(solved)
    np.testing.assert_allclose(evaluate(inverse.of_reader(reader)), matrix @ weight, rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_singular_basis_has_no_finite_condition(scale: float) -> None:
    matrix = scale * np.random.default_rng(0).standard_normal((8, 8))
    matrix[3] = 0.0
    assert Basis(literal(matrix)).condition == math.inf
