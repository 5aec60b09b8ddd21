"""Folding in bounded memory: what is evaluated, what is read, what the benchmark counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, graph, load_script, normal

from onnx_fold.algebra import expression
from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.completion import Completion
from onnx_fold.algebra.expression import literal
from onnx_fold.algebra.selection import RowSelection
from onnx_fold.algebra.storage import InFile

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"


def test_the_benchmark_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    output = tmp_path / "scale.json"
    options = ["--preset", "tiny-gqa", "--layers", "2", "--dtype", "float16", "--quick"]
    options += ["--objective", "size"]
    command = [sys.executable, str(SCRIPT), *options, "--folder", str(tmp_path)]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
        env=one_thread,
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert result["weights_removed"] == 5 * 64**2
    assert result["ratio"] == pytest.approx(result["seconds"] / result["floor"])
    assert result["bound"] == 2**30 + 32 * 256 * 64
    assert 0 < result["peak"] <= result["bound"]


def test_operations_are_counted_once() -> None:
    scale = load_script(SCRIPT)
    basis = Basis(literal(np.eye(4)))
    readers = [basis.of_reader(literal(np.ones((4, n)))) for n in (3, 5)]
    rows = RowSelection(literal(np.ones((9, 4), np.float32)), ir.DataType.FLOAT16)
    counted = scale.operations([*readers, rows.rest, rows.order])
    assert counted["float64"] == pytest.approx(2 * 4**3 / 3 + 2 * 4**2 * 8 + 5 * 4**2)
    assert counted["float32"] == pytest.approx(9 * 4**2 - 4**3 / 3)


def test_what_completes_a_basis_is_counted() -> None:
    rows = RowSelection(literal(normal(9, 4)), ir.DataType.FLOAT16)
    parts = Completion(rows, 2)
    counted = load_script(SCRIPT).operations([parts.keeping(3).rest, parts.keeping(2).basis])
    factors, solves = 2 * 4**3 / 3, 2 * 2 * 4**2 * parts.count
    assert counted["float64"] == pytest.approx(5 * 4**2 + factors + solves)


def stored(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "model.onnx", external_data="model.data")
    return folder / "model.onnx"


def residual(width: int) -> ir.Model:
    """P between two norms: nothing folds."""
    text = f"(float[n, {width}] x) => (float[n, {width}] y) {{"
    text += " a = LayerNormalization(x, g) p = MatMul(a, P) y = LayerNormalization(p, g) }"
    return graph(text, P=normal(width, width), g=normal(width))


def test_where_nothing_folds_no_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(residual(64), tmp_path)

    def read(self: object, *_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", read)
    monkeypatch.setattr(InFile, "read", read)
    monkeypatch.setattr(InFile, "part", read)
    assert not fold(path).report.folded


def test_deciding_reads_samples_of_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pivot, which is square, is read whole."""
    monkeypatch.setattr(expression, "SAMPLE", 8)
    width = 24
    held = {"O": normal(96, width), "Q": np.eye(width, dtype=np.float32), "R": normal(width, 80)}
    text = f"(float[n, 96] h) => (float[n, {width}] y, float[n, 80] z)"
    model = graph(f"{text} {{ s = MatMul(h, O) y = MatMul(s, Q) z = MatMul(s, R) }}", **held)
    read: list[tuple[int, ...]] = []
    whole, part = InFile.read, InFile.part

    def record_whole(self: InFile) -> np.ndarray:
        read.append(self.shape)
        return whole(self)

    def record_part(self: InFile, indices: np.ndarray, axis: int) -> np.ndarray:
        taken = part(self, indices, axis)
        read.append(taken.shape)
        return taken

    monkeypatch.setattr(InFile, "read", record_whole)
    monkeypatch.setattr(InFile, "part", record_part)
    result = fold(stored(model, tmp_path), only=["absorb"])
    assert [stream.folded.strategy for stream in result.report.folded] == ["absorb"]
    assert set(read) <= {(width, width), (8, width), (width, 8), (8, 8)}
