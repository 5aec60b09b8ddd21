"""What a measurement was made on: machine, versions, and the state of the GPU, for its report."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from onnx_fold.base.threads import processors
from onnx_fold.errors import MissingExtraError
from onnx_fold.runtime.sessions import onnxruntime

__all__ = ["environment", "gpu_memory_used"]

PACKAGES: Final = ("onnx-fold", "onnx", "onnx-ir", "numpy", "scipy", "torch")
"""Packages whose versions are listed."""

GPU_FIELDS: Final = {
    "name": "name",
    "driver": "driver_version",
    "memory_total_mib": "memory.total",
    "memory_used_mib": "memory.used",
    "power_limit_w": "power.limit",
    "sm_clock_mhz": "clocks.current.sm",
    "memory_clock_mhz": "clocks.current.memory",
    "max_sm_clock_mhz": "clocks.max.sm",
    "max_memory_clock_mhz": "clocks.max.memory",
}
"""Names in a report, and what nvidia-smi calls them."""


def environment(provider: str) -> dict[str, Any]:
    """Return where and with what a measurement on ``provider`` is made, for JSON.

    Whatever cannot be found out is None; nothing is raised.

    Args:
        provider: ``"cpu"`` or ``"cuda"``; the GPU is asked only for the latter.

    Returns:
        A dictionary of

        - ``date``: the time, UTC, ISO 8601;
        - ``provider`` and ``tf32``: sessions of this package never use TensorFloat-32;
        - ``machine``: ``cpu`` (its model), ``cores``, ``threads`` (logical processors that this
          process may use), ``memory_mib``, ``os``, ``kernel``, ``python``;
        - ``versions``: of ``PACKAGES`` and ``onnxruntime``, the name of its package, the CUDA
          version that it was built for, and the CUDA runtime and cuDNN that pip installed for it;
        - ``gpu``: ``GPU_FIELDS`` at this moment for cuda, else None.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "provider": provider,
        "tf32": False,
        "machine": _machine(),
        "versions": {name: _version(name) for name in PACKAGES} | _onnxruntime(),
        "gpu": _gpu() if provider == "cuda" else None,
    }


def gpu_memory_used() -> int | None:
    """Return the MiB of GPU memory that all processes use together, None if it is unknown."""
    (used,) = _query_gpu([GPU_FIELDS["memory_used_mib"]])
    mib = _number(used)
    return None if mib is None else int(mib)


def _machine() -> dict[str, Any]:
    return {
        "cpu": next(iter(_cpuinfo("model name")), platform.processor() or None),
        "cores": _cores(),
        "threads": processors(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _cpuinfo(key: str) -> list[str]:
    """Return the entries of ``key``, one for each logical processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    fields = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in fields if name.strip() == key]


def _cores() -> int | None:
    """Return how many physical cores there are."""
    cores = zip(_cpuinfo("physical id"), _cpuinfo("core id"), strict=False)
    return len(set(cores)) or None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _onnxruntime() -> dict[str, str | None]:
    """Return the versions of ONNX Runtime and of what it was built for."""
    try:
        ort = onnxruntime()
    except MissingExtraError:
        ort = None
    cuda = getattr(ort, "cuda_version", None) or None
    major = cuda.partition(".")[0] if cuda else ""
    suffix = f"-cu{major}" if major and int(major) < 13 else ""  # NVIDIA's names of its packages
    return {
        "onnxruntime": getattr(ort, "__version__", None),
        "onnxruntime_package": getattr(ort, "package_name", None),
        "onnxruntime_built_for_cuda": cuda,
        "cuda_runtime": _version(f"nvidia-cuda-runtime{suffix}") if cuda else None,
        "cudnn": _version(f"nvidia-cudnn-cu{major}") if cuda else None,
    }


def _gpu() -> dict[str, str | float | None]:
    values = dict(zip(GPU_FIELDS, _query_gpu(list(GPU_FIELDS.values())), strict=True))
    return {
        name: value if name in ("name", "driver") else _number(value)
        for name, value in values.items()
    }


def _number(text: str | None) -> float | None:
    """Return the number that nvidia-smi prints, None for what it prints where it has none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _query_gpu(fields: Sequence[str]) -> list[str | None]:
    """Ask nvidia-smi for ``fields`` of the GPU that CUDA sees first."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}"]
    unknown: list[str | None] = [None] * len(fields)
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    values = [value.strip() for value in done.stdout.split(",")]
    return [*values] if len(values) == len(fields) else unknown
