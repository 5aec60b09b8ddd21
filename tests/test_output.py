"""Writing a model: the old pair of files or the new one, and nothing else, whatever happens."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fold.errors import CannotWriteError
from onnx_fold.files import output, write
from onnx_fold.files.load import load


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def matrices(value: float = 1.0, count: int = 3) -> ir.Model:
    """A model that is nothing but weights of 4 KiB, all equal to ``value``."""
    arrays = {f"w{i}": np.full((32, 32), value, np.float32) for i in range(count)}
    values = [
        ir.Value(name=name, const_value=ir.tensor(a, name=name)) for name, a in arrays.items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


def save(model: ir.Model, name: str = "f.onnx", **options) -> None:
    with write.saving(model, Path(name), **({"shard_size": 2**20} | options)):
        pass


def names() -> set[str]:
    return {path.name for path in Path().iterdir()}


def content(name: str = "f.onnx") -> float:
    """The value of all weights."""
    held = load(name).graph.initializers.values()
    (value,) = {float(x) for tensor in held for x in np.unique(tensor.const_value.numpy())}
    return value


def test_graph_and_data():
    save(matrices())
    assert names() == {"f.onnx", "f.onnx.data"}
    assert content() == 1.0


def test_an_earlier_version_goes_in_place_with_its_data():
    save(matrices(1.0))
    save(matrices(2.0), in_place=True)
    assert (names(), content()) == ({"f.onnx", "f.onnx-1.data"}, 2.0)
    save(matrices(3.0), in_place=True, shard_size=5000)
    shards = {f"f.onnx-0000{i}-of-00003.data" for i in (1, 2, 3)}
    assert (names(), content()) == ({"f.onnx", *shards}, 3.0)
    save(matrices(4.0), in_place=True, shard_size=None)
    assert (names(), content()) == ({"f.onnx"}, 4.0)


def test_the_data_of_an_earlier_version_stays():
    save(matrices(1.0))
    save(matrices(2.0))
    assert (names(), content()) == ({"f.onnx", "f.onnx.data", "f.onnx-1.data"}, 2.0)
    save(matrices(3.0), delete_old_data=True)
    assert (names(), content()) == ({"f.onnx", "f.onnx.data", "f.onnx-2.data"}, 3.0)


def test_data_under_a_name_of_its_own_stays_unless_it_is_to_go():
    ir.save(matrices(1.0), "f.onnx", external_data="w.bin")
    save(matrices(2.0), in_place=True)
    assert (names(), content()) == ({"f.onnx", "f.onnx.data", "w.bin"}, 2.0)
    ir.save(matrices(1.0), "f.onnx", external_data="w.bin")
    save(matrices(3.0), in_place=True, delete_old_data=True)
    assert (names(), content()) == ({"f.onnx", "f.onnx.data", "f.onnx-1.data"}, 3.0)


def test_permissions_are_those_of_the_earlier_version():
    save(matrices())
    Path("f.onnx").chmod(0o640)
    save(matrices(2.0))
    assert Path("f.onnx").stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_is_replaced_and_its_target_stays():
    Path("elsewhere").mkdir()
    save(matrices(1.0), "elsewhere/real.onnx")
    Path("f.onnx").symlink_to("elsewhere/real.onnx")
    save(matrices(2.0))
    assert not Path("f.onnx").is_symlink()
    assert (content(), content("elsewhere/real.onnx")) == (2.0, 1.0)
    Path("g.onnx.data").symlink_to("elsewhere/nothing")  # a link to nothing is a name that is taken
    save(matrices(3.0), "g.onnx")
    assert content("g.onnx") == 3.0
    assert not Path("elsewhere/nothing").exists()


def test_another_folder():
    Path("in").mkdir()
    save(matrices(5.0), "in/f.onnx")
    save(load("in/f.onnx"), "g.onnx", shard_size=None)
    assert {path.name for path in Path("in").iterdir()} == {"f.onnx", "f.onnx.data"}
    shutil.rmtree("in")
    assert content("g.onnx") == 5.0


# --- Failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [["pwrite"], ["fsync"], ["copy_file_range", "pwrite"]])
def test_a_full_disk(monkeypatch, calls):
    save(matrices(1.0))
    save(matrices(5.0), "in.onnx")
    source = load("in.onnx") if len(calls) > 1 else matrices(2.0)
    before = names()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(os, call, full)
        with pytest.raises(
            CannotWriteError, match=r"cannot write f\.onnx: No space left on device"
        ):
            save(source)
    assert (names(), content()) == (before, 1.0)


def test_a_disk_that_is_really_full():
    """A file system of 64 KiB, if this user may mount one."""
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "disk"]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        save(matrices(1.0, count=10), "disk/f.onnx")
        with pytest.raises(CannotWriteError, match="not enough space"):
            save(matrices(2.0, count=10), "disk/f.onnx")
        assert content("disk/f.onnx") == 1.0
        assert {path.name for path in Path("disk").iterdir()} == {"f.onnx", "f.onnx.data"}
        subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
        with pytest.raises(CannotWriteError, match="Read-only file system"):
            save(matrices(3.0), "disk/f.onnx")
        assert content("disk/f.onnx") == 1.0
    finally:
        subprocess.run(["umount", "--lazy", "disk"], check=True)


def test_a_limit_of_the_system():
    """A file that may not grow to its size: nothing is left of it."""
    code = """
        import resource, sys
        from test_output import matrices, save
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        save(matrices())
    """
    result = python(code)
    assert "cannot write f.onnx: File too large" in result.stderr
    assert names() == set()


def test_too_little_space_is_said_before_anything_is_written(monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(CannotWriteError, match=r"12,\d+ bytes\) needed, 10\.0 kB \(10,000 bytes"):
        save(matrices())
    assert names() == set()


def test_a_failed_check_leaves_nothing():
    def check_fails():
        with write.saving(matrices(), Path("f.onnx"), shard_size=9000) as path:
            assert content(path) == 1.0
            assert names() == {".f.onnx.onnx-fold.tmp"}
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        check_fails()
    assert names() == set()


def test_a_name_that_appears_meanwhile_is_not_overwritten():
    saving = write.saving(matrices(), Path("f.onnx"), shard_size=2**20)
    with pytest.raises(CannotWriteError, match="has just appeared"), saving:
        Path("f.onnx.data").write_bytes(b"theirs")
    assert names() == {"f.onnx.data"}
    assert Path("f.onnx.data").read_bytes() == b"theirs"


def test_one_process_at_a_time():
    with write.saving(matrices(1.0), Path("f.onnx")):
        with pytest.raises(CannotWriteError, match="another process is writing it"):
            save(matrices(2.0))
        save(matrices(3.0), "g.onnx")  # which leaves the folder of a live process alone
    assert (content(), content("g.onnx")) == (1.0, 3.0)


# --- Killed ---------------------------------------------------------------------------------------


def python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


_KILLED_AT_EVERY_STEP = """
    import os, signal, sys
    from pathlib import Path
    import onnx_ir as ir
    from test_output import content, matrices, names, save

    for step in range(1000):
        for path in Path().iterdir():
            path.unlink()
        ir.save(matrices(1.0), "f.onnx", external_data="w.bin")
        child = os.fork()
        if child == 0:
            left = step
            def die_in_time(event, _):
                global left
                if event == "open" or event.startswith("os."):
                    left -= 1
                    if left == -1:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(die_in_time)
            save(matrices(2.0), shard_size=5000, in_place=True, delete_old_data=True)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        found = content()
        assert found in (1.0, 2.0)
        save(matrices(3.0), "g.onnx")
        data = {1.0: {"w.bin"}, 2.0: {f"f.onnx-0000{i}-of-00003.data" for i in (1, 2, 3)}}[found]
        assert names() == {"f.onnx", "g.onnx", "g.onnx.data", *data}, (step, found, names())
        if finished:
            assert found == 2.0
            break
    print(step)
"""


def test_killed_at_every_step():
    """Before each system call that touches a file; the next run in the folder cleans up."""
    result = python(_KILLED_AT_EVERY_STEP)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) > 30


_KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    from test_output import content, matrices, names, save

    random.seed(0)
    save(matrices(0.0), shard_size=9000)
    outcomes = set()
    for round in range(1, 51):
        before = content()
        child = os.fork()
        if child == 0:
            try:
                for i in range(1000):
                    size = random.choice([5000, 9000, None])
                    save(matrices(1000.0 * round + i), in_place=True, shard_size=size)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = content()
        assert after == before or after // 1000 == round, (before, after)
        outcomes.add(after == before)
    assert outcomes == {True, False}, outcomes
    save(matrices(-1.0), in_place=True)
    assert content() == -1.0
    assert len(names()) == 2, names()
"""


def test_killed_at_50_random_moments():
    result = python(_KILLED)
    assert (result.returncode, result.stderr) == (0, "")


_INTERRUPTED = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from onnx_fold import cli
    from onnx_fold.files import write
    real = write.run_jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    def slow(*arguments):
        real(*arguments)
        os.kill(os.getpid(), signal.{})
        time.sleep(60)
    write.run_jobs = slow
    sys.argv = ["onnx-fold", "fold", "m.onnx", "-o", "f.onnx", "--no-verify"]
    cli.main()
"""


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_weights_are_written(signal, code):
    save(matrices(), "m.onnx")
    result = python(_INTERRUPTED.format(signal))
    assert result.returncode == code
    assert result.stderr.strip() == ("interrupted; nothing was written" if code == 130 else "")
    assert names() == {"m.onnx", "m.onnx.data"}


def test_a_stale_folder_of_another_target_is_cleaned():
    stale = Path(".other.onnx.onnx-fold.tmp")
    stale.mkdir()
    (stale / ".lock").touch()
    (stale / "other.onnx.data").write_bytes(b"half")
    Path(".born.onnx.onnx-fold.tmp").mkdir()
    Path(".mine.tmp").mkdir()
    save(matrices())
    assert names() == {"f.onnx", "f.onnx.data", ".mine.tmp"}


_KILLED_IN_PLACE = """
    import os, shutil, signal, sys
    from pathlib import Path
    import numpy as np
    import onnx_fold
    from helpers import assert_whole, externalise
    from test_targets import alias_beside, answer, copy_above, model, save

    shards, neighbours = {}
    Path("here").mkdir()
    os.chdir("here")
    save("m.onnx", "m.onnx.data")  # its small tensors lie there, too
    expected, others = answer(), []
    if neighbours:
        others = [copy_above(), alias_beside(), "own.onnx"]
        save("own.onnx", "own.onnx.data")
    start = {{path: path.read_bytes() for path in Path().iterdir() if not path.is_symlink()}}
    fold = dict(in_place=True, verify=False, shard_size=shards)

    def check():
        np.testing.assert_allclose(answer(), expected, rtol=1e-4, atol=1e-6)
        assert all((answer(other) == expected).all() for other in others)

    for step in range(0, 1000, 2 if neighbours else 1):
        for path in set(Path().iterdir()):
            if path not in start and not path.is_symlink():
                path.unlink()
        for path, content in start.items():
            path.write_bytes(content)
        child = os.fork()
        if child == 0:
            left, is_writing = step, False
            def die_in_time(event, arguments):
                global left, is_writing
                is_writing |= event == "os.mkdir"
                if is_writing and (event == "open" or event.startswith("os.")):
                    left -= 1
                    if left == -1:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(die_in_time)
            onnx_fold.fold("m.onnx", **fold)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), (step, status)
        check()
        onnx_fold.fold("m.onnx", **fold)
        check()
        found = {{path.name for path in Path().iterdir()}} - {{path.name for path in start}}
        new = found - {{"alias.bin"}}
        size = 2 if shards else 1
        assert len(new) == size and all("m.onnx-" in name for name in new), (step, new)
        assert_whole("m.onnx", *new)
        assert Path("m.onnx.data").exists() == neighbours, step
        if status == 0:
            break
    print(step)
"""


@pytest.mark.parametrize(
    ("shards", "neighbours"), [(None, False), (1024, True)], ids=["alone", "neighbours"]
)
def test_a_fold_in_place_killed_at_every_step(shards, neighbours):
    """Every model of the folder runs afterwards; the next fold removes whatever was left."""
    result = python(_KILLED_IN_PLACE.format((shards, neighbours)))
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) > 30
