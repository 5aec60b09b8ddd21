"""How much memory there is: of the machine, and of the control groups that a container is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as far as the system tells.

    The least of what the machine and each control group around this process have left; pages of
    files that can be given back count as free.
    """
    return max(0, min([_of_machine(), *_of_groups()]))


def _of_machine() -> int:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        sizes = dict(line.split(":") for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_groups() -> Iterator[int]:
    """What each group leaves, version 2 and version 1 of the interface; groups lie in groups."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _left(_CGROUPS, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(_CGROUPS / "memory", path, names)


def _left(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    limit, usage, reclaimable = names
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        with contextlib.suppress(OSError, ValueError):  # no file, or "max": no limit
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            yield left + _statistic(folder, reclaimable)


def _statistic(folder: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (folder / "memory.stat").read_text().splitlines()
        return int(dict(line.split(" ", 1) for line in lines)[name])
    return 0
