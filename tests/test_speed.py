"""The check of a machine, on the processor: its steps, its process, its file and its page."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed.py"
OPTIONS = {"provider": "cpu", "batch": [1], "prefill": [8], "tokens": 2, "repeats": 2}


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that its worker finds, too."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    return importlib.import_module("speed")


@pytest.fixture
def given() -> argparse.Namespace:
    return argparse.Namespace(
        provider="cuda",
        device="cuda",
        presets=["mistral-7b", "tiny-gqa", "char-gqa"],
        layers=2,
        dtypes=["float32", "float16"],
        batch=[1, 8],
        prefill=[128, 2048],
        tokens=32,
        repeats=5,
        seconds=30.0,
        minutes=5,
        step_minutes=1,
        folder=None,
        steps=["export", "fold", "placement", "verify", "bench", "bench twin"],
        output=None,
    )


def run(output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--provider", "cpu", "--output", str(output), *options]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    return done.returncode, json.loads(output.read_text(encoding="utf-8"))


def test_the_check_runs(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    sizes = ["--batch", "1", "2", "--prefill", "8", "--tokens", "2", "--repeats", "2"]
    code, data = run(output, "--presets", "char-gqa", *sizes)
    assert code == 0, data
    assert data["environment"]["provider"] == data["options"]["provider"] == "cpu"
    steps = [each["step"] for each in data["results"]]
    assert steps == ["start", "export", "fold", "placement", "verify", "bench", "bench twin"]
    _, _, folded, placed, verified, timed, twins = (each["result"] for each in data["results"])
    assert folded["weights_removed"] == 8 * 160**2 + 55360
    assert placed["folded"]["CPUExecutionProvider"]["MatMul"] > 0
    assert verified["ok"]
    assert [phase["batch"] for phase in timed["phases"]] == [1, 1, 2, 2]
    counted = [[(each["pairs"], each["loads"]) for each in it["phases"]] for it in (timed, twins)]
    assert counted[0] == counted[1] == [(4, 4)] * 4
    assert twins["bytes_original"] == twins["bytes_folded"] == timed["bytes_original"]
    page = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| char-gqa | all | float32 | 1.2 M | 22% |" in page
    assert "| char-gqa | all | float32 | decode | 2 | 1 | 8 |" in page
    a_a = r"\| [\d.]+x \([\d.]+-[\d.]+\) " * 2 + r"\| 4 \| 4 \|"
    assert len(re.findall(a_a, page)) == 4
    asked = "--presets char-gqa --batch 1 2 --prefill 8 --tokens 2 --repeats 2 --seconds 10"
    assert f"- `python benchmarks/speed.py --provider cpu {asked}`" in page
    assert "did not work" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md"]


def test_without_time_everything_is_skipped_and_said(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    code, data = run(output, "--presets", "tiny-gqa", "--dtypes", "float16", "--minutes", "0")
    assert code == 0
    assert {each["step"] for each in data["results"]} == {
        "start",
        "export",
        "fold",
        "placement",
        "verify",
        "bench",
        "bench twin",
    }
    assert all(each["skipped"] == "no time was left" for each in data["results"][:2])
    assert all(each["skipped"] == "there is no export" for each in data["results"][2:])
    page = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "- tiny-gqa, float16, bench, batch 1 2, prefill 128: skipped: there is no export" in page


def test_a_preset_goes_through_the_steps(speed: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    case = speed.Case("tiny-gqa", 2, "float32", tmp_path)
    assert speed.export_model(case)["bytes"] > 4 * 2 * 64**2
    folded = speed.fold_model(case, "cpu", "cpu")
    assert folded["weights_removed"] == 4 * 64**2  # the fifth would cost time
    assert folded["seconds"] > 0
    assert speed.verify_models(case, "cpu")["ok"]
    assert speed.bench_models(case, OPTIONS)["phases"]
    case.remove()
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_run_nothing_is_tried(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    code, data = run(output, "--device", "meta")
    assert code == 1
    (result,) = data["results"]
    assert "UsageError: torch cannot use meta; --device cpu folds" in result["error"]


def test_models_are_as_deep_as_asked_for(
    speed: ModuleType, given: argparse.Namespace, tmp_path: Path
) -> None:
    given.layers = 5
    found = [(case.preset, case.layers, case.dtype) for case in speed.cases(given, tmp_path)]
    assert found == [
        ("mistral-7b", 5, "float32"),
        ("mistral-7b", 5, "float16"),
        ("tiny-gqa", 3, "float32"),
        ("tiny-gqa", 3, "float16"),
        ("char-gqa", None, "float32"),
    ]


def test_the_plan_times_cuda_graphs_and_one_fold_on_the_processor(
    speed: ModuleType, given: argparse.Namespace, tmp_path: Path
) -> None:
    case = speed.Case(*speed.ALSO_ON_CPU[:1], 2, "float16", tmp_path)
    steps = [step for step, _ in speed.plan(case, given)]
    assert steps[:5] == ["export", "fold on cpu", "fold", "placement", "verify"]
    steps = list(speed.plan(speed.Case("mistral-7b", 2, "float16", tmp_path), given))
    assert steps[:2] == [("export", ()), ("fold", ("cuda", "cuda"))]
    timed = [arguments[0] for step, arguments in steps if step == "bench"]
    assert [(each["prefill"], each["batch"], "cuda_graph" in each) for each in timed] == [
        ([128, 2048], [1, 8], False),
        ([128], [1, 8], True),
    ]


def test_the_worker_survives_errors_deaths_and_hangs(speed: ModuleType, tmp_path: Path) -> None:
    case = speed.Case("char-gqa", None, "float32", tmp_path)
    worker = speed.Worker()
    try:
        with pytest.raises(RuntimeError, match=r"InvalidModelError: cannot read char-gqa-None"):
            worker.run("verify", case, ["cpu"], 60)
        worker._start()
        worker._process.kill()
        with pytest.raises(RuntimeError, match="process died, exit code -9"):
            worker.run("export", case, [], 60)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="stopped after 0 s"):
            worker.run("export", case, [], 0.01)
        assert time.monotonic() - started < 10
        assert worker.run("export", case, [], 60)["bytes"] > 0
    finally:
        worker.stop()


class Fails:
    """A worker whose steps fail, but for those that have a result."""

    def __init__(self, **results: dict[str, Any]) -> None:
        self.results = results

    def run(self, step: str, *_: object) -> dict[str, Any]:
        if step in self.results:
            return self.results[step]
        raise RuntimeError(f"no\n{step}")


def test_a_failed_step_does_not_end_the_run(
    speed: ModuleType, given: argparse.Namespace, tmp_path: Path
) -> None:
    given.output, given.batch, given.prefill = tmp_path / "speed.json", [1], [128]
    saving = {"before": {"weights": 2e6}, "weights_removed_share": 0.15, "seconds": 1.25}
    differs = {"ok": False, "reason": "output 'y': inf", "outputs": []}
    data = {"environment": speed.environment("cuda"), "options": {}, "results": []}
    case = speed.Case("mistral-7b", 2, "float16", tmp_path)
    worker = Fails(export={"bytes": 1}, fold=saving, verify=differs)
    steps = list(speed.plan(case, given))
    data["results"] += speed.run_case(case, steps, given, worker, time.monotonic() + 60)
    speed.save(given.output, data)
    errors = {each["step"]: each.get("error") for each in data["results"]}
    assert errors == {
        "export": None,
        "fold": None,
        "placement": "no\nplacement",
        "verify": "output 'y': inf",
        "bench": "no\nbench",
        "bench twin": "no\nbench twin",
    }
    page = given.output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| mistral-7b | 2 | float16 | 2.0 M | 15% | 1.2 s |  |  |  |  |" in page
    assert "- mistral-7b, float16, verify: error: output 'y': inf" in page
    assert "- mistral-7b, float16, bench, batch 1, prefill 128, CUDA graph: error: no bench" in page


def test_a_check_can_be_made_in_parts(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    none = ["--minutes", "0", "--dtypes", "float32"]
    run(output, "--presets", "tiny-mha", "char-gqa", *none)
    _, data = run(output, "--presets", "small-gqa", "tiny-mha", *none)
    found = [each["preset"] for each in data["results"] if each["step"] == "export"]
    assert found == ["tiny-mha", "small-gqa", "char-gqa"]
    assert [each["step"] for each in data["results"]].count("start") == 1


def test_models_stay_in_a_folder_for_the_steps_that_follow(tmp_path: Path) -> None:
    output, folder = tmp_path / "speed.json", tmp_path / "models"
    folder.mkdir()
    common = ["--presets", "char-gqa", "--folder", str(folder), "--steps"]
    run(output, *common, "export", "fold")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, data = run(output, *common, "export", "placement")
    assert code == 0, data
    assert [each["step"] for each in data["results"]] == ["export", "placement", "fold"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_prompts_leave_room_in_a_table_of_positions(
    speed: ModuleType, given: argparse.Namespace
) -> None:
    assert speed.lengths_of("mistral-7b", given) == [128, 2048]
    assert speed.lengths_of("tiny-gqa", given) == [128]
    assert speed.lengths_of("tiny-mha", given) == [128 - given.tokens]
