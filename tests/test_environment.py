"""What a report says about the machine: with a GPU, and with all that can be missing."""

import json
import os
import platform
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from onnx_fold.errors import MissingExtraError
from onnx_fold.runtime import environment as module
from onnx_fold.runtime.environment import GPU_FIELDS, environment, gpu_memory_used

ANSWERS = {
    "name": "NVIDIA H200",
    "driver_version": "580.159.04",
    "memory.total": "143771",
    "memory.used": "1024",
    "power.limit": "700.00",
    "clocks.current.sm": "345",
    "clocks.current.memory": "3201",
    "clocks.max.sm": "1980",
    "clocks.max.memory": "[N/A]",
}


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str = "") -> Path:
    """A program of that name, which answers what it is asked for, or does ``body``."""
    program = folder / "nvidia-smi"
    answers = "".join(f"{name}) printf '{value}';; " for name, value in ANSWERS.items())
    program.write_text(
        f"""#!/bin/sh
echo "$@" > {folder}/asked
{body}
separator=""
for field in $(echo "$2" | sed 's/--query-gpu=//; s/,/ /g'); do
    printf "$separator"; separator=", "
    case $field in {answers} *) exit 2;; esac
done
echo
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "asked"


def test_the_machine_and_the_versions_are_said() -> None:
    found = json.loads(json.dumps(environment("cpu")))
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)
    assert found["provider"] == "cpu"
    assert found["tf32"] is False
    assert found["gpu"] is None
    assert found["machine"]["python"] == platform.python_version()
    assert found["machine"]["threads"] == len(os.sched_getaffinity(0))
    assert found["machine"]["memory_mib"] > 256
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__


def test_the_gpu_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = nvidia_smi(tmp_path, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment("cuda")["gpu"] == {
        "name": "NVIDIA H200",
        "driver": "580.159.04",
        "memory_total_mib": 143771,
        "memory_used_mib": 1024,
        "power_limit_w": 700,
        "sm_clock_mhz": 345,
        "memory_clock_mhz": 3201,
        "max_sm_clock_mhz": 1980,
        "max_memory_clock_mhz": None,
    }
    assert asked.read_text().startswith("--id=0 --query-gpu=name,driver_version,memory.total,")
    assert asked.read_text().endswith(" --format=csv,noheader,nounits\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3e,1")
    assert gpu_memory_used() == 1024
    assert asked.read_text().startswith("--id=GPU-8f3e --query-gpu=memory.used ")


@pytest.mark.parametrize("body", [None, "exit 9", "echo No devices were found; exit 0"])
def test_what_cannot_be_asked_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None
) -> None:
    if body is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        nvidia_smi(tmp_path, monkeypatch, body)
    assert environment("cuda")["gpu"] == dict.fromkeys(GPU_FIELDS)
    assert gpu_memory_used() is None


@pytest.mark.parametrize(
    ("built_for", "packages"),
    [
        ("13.0", ["nvidia-cuda-runtime", "nvidia-cudnn-cu13"]),
        ("12.8", ["nvidia-cuda-runtime-cu12", "nvidia-cudnn-cu12"]),
    ],
)
def test_the_libraries_of_cuda_are_those_of_its_version(
    monkeypatch: pytest.MonkeyPatch, built_for: str, packages: list[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "cuda_version", built_for)
    monkeypatch.setattr(module, "_version", lambda name: f"of {name}")
    versions = environment("cpu")["versions"]
    assert versions["onnxruntime_built_for_cuda"] == built_for
    assert [versions["cuda_runtime"], versions["cudnn"]] == [f"of {name}" for name in packages]


def test_without_onnxruntime_its_versions_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingExtraError("onnxruntime", "cpu")

    monkeypatch.setattr(module, "onnxruntime", missing)
    versions = environment("cpu")["versions"]
    assert versions["onnxruntime"] is versions["onnxruntime_package"] is versions["cudnn"] is None
