"""The benchmark that compares with other tools: what it holds, and tools that are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows by their tools, and the tables; onnxsim cannot be imported."""
    folder: Path = tmp_path_factory.mktemp("peers")
    (folder / "onnxsim.py").write_text("raise ImportError('there is\\nno | onnxsim')")
    options = ["--models", "tiny-mha:1", "--tools", "onnxsim", "onnxscript", "onnx-fold"]
    options += ["--folder", str(folder), "--prefill", "4", "--repeats", "2", "--tokens", "2"]
    output = folder / "peers.json"
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(output.read_text(encoding="utf-8"))
    rows = {tuple(result["tools"]): result for result in data["results"]}
    return rows, output.with_suffix(".md").read_text(encoding="utf-8")


def test_only_onnx_fold_removes_weights_and_the_order_does_not_matter(measured):
    rows, _ = measured
    exported = rows[()]
    assert exported["difference"] == 0.0
    assert rows["onnxscript",]["weights"] == exported["weights"]
    folded = rows["onnx-fold",]
    assert exported["weights"] - folded["weights"] == 3 * 64**2 + 64  # P's bias goes with it
    assert exported["nbytes"] - folded["nbytes"] == 4 * (3 * 64**2 + 64)
    assert 0.0 < folded["difference"] < 1e-4
    for chain in (("onnx-fold", "onnxscript"), ("onnxscript", "onnx-fold")):
        assert rows[chain]["weights"] == folded["weights"]
        assert rows[chain]["operators"] == folded["operators"]


def test_both_phases_are_timed(measured):
    rows, _ = measured
    phases = [phase["name"] for phase in rows["onnx-fold",]["phases"]]
    assert phases == ["prefill", "decode"]


def test_a_missing_tool_is_a_row_with_the_reason(measured):
    rows, tables = measured
    for chain in (("onnxsim",), ("onnx-fold", "onnxsim"), ("onnxsim", "onnx-fold")):
        assert rows[chain]["error"] == "onnxsim: ImportError: there is no | onnxsim"
        assert not rows[chain]["phases"]
    said = "onnxsim: ImportError: there is no / onnxsim"
    assert f"| onnxsim | - | - | - | - | - | {said} | - | - |" in tables


def test_the_tables_have_a_row_for_each_chain(measured):
    rows, tables = measured
    body = [line for line in tables.splitlines() if line.startswith("| ")]
    assert len(body) == len(rows) + 1
    assert {line.count("|") for line in body} == {10}
