"""Memory that is left, in a machine and in its control groups, whose files are made here."""

import pytest

from onnx_fold.base import memory

GIB = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files of ``/proc`` and ``/sys/fs/cgroup`` under a folder."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")

    def write(files: dict[str, object]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    write({"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {16 * 2**20} kB"})
    return write


def test_this_machine():
    assert 2**24 < memory.available_memory() < 2**50


def test_no_information(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert 2**24 < memory.available_memory() < 2**50


def test_without_groups(system):
    assert memory.available_memory() == 16 * GIB


@pytest.mark.parametrize(
    ("limit", "inner", "left"),
    [("max", "max", 16), (4 * GIB, "max", 3), (4 * GIB, 2 * GIB, 1), (99 * GIB, 99 * GIB, 16)],
)
def test_version_2(system, limit, inner, left):
    system(
        {
            "proc/self/cgroup": "0::/outer/inner",
            "cgroup/outer/memory.max": limit,
            "cgroup/outer/memory.current": GIB,
            "cgroup/outer/inner/memory.max": inner,
            "cgroup/outer/inner/memory.current": GIB,
        }
    )
    assert memory.available_memory() == left * GIB


def test_pages_of_files_can_be_given_back(system):
    system(
        {
            "proc/self/cgroup": "0::/",
            "cgroup/memory.max": 4 * GIB,
            "cgroup/memory.current": 3 * GIB,
            "cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
        }
    )
    assert memory.available_memory() == 2 * GIB


def test_version_1(system):
    system(
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/a\n0::/",
            "cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "cgroup/memory/memory.usage_in_bytes": GIB,
            "cgroup/memory/docker/a/memory.limit_in_bytes": 2 * GIB,
            "cgroup/memory/docker/a/memory.usage_in_bytes": GIB,
            "cgroup/memory/docker/a/memory.stat": "inactive_file 3\ntotal_inactive_file 5",
        }
    )
    assert memory.available_memory() == GIB + 5


def test_more_used_than_allowed(system):
    system({"proc/self/cgroup": "0::/", "cgroup/memory.max": 1, "cgroup/memory.current": 2})
    assert memory.available_memory() == 0


@pytest.mark.parametrize("text", ["", "what", "0::", "0::/../..", "4:memory", "::::"])
def test_what_cannot_be_read(system, text):
    system({"proc/self/cgroup": text})
    assert memory.available_memory() == 16 * GIB
