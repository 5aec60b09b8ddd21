"""What may be written, and what may be removed: never a file that a model needs."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_whole, externalise, graph, normal, outputs

import onnx_fold
from onnx_fold import cli
from onnx_fold.errors import CannotWriteError
from onnx_fold.files import neighbours, output

D = 16


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def run(capsys):
    """Run the program: its exit code and all that it printed, which is never a traceback."""

    def run(*arguments: str) -> tuple[int, str]:
        cli._console.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["onnx-fold", *arguments])
            try:
                cli.main()
                code = 0
            except SystemExit as leave:
                code = leave.code or 0
        text = "".join(capsys.readouterr())
        assert "Traceback" not in text
        return code, text

    return run


def model() -> ir.Model:
    """Two layers that fold, a small gain, and a layer that does not fold."""
    return graph(
        f"(float[n, {D}] x) => (float[n, {D}] y)"
        " { p = MatMul(x, P) m = MatMul(p, M) r = Relu(m) s = Mul(r, g) y = MatMul(s, S) }",
        P=normal(D, D), M=normal(D, D, seed=1), S=normal(D, D, seed=2), g=np.float32(0.5),
    )  # fmt: skip


def save(name: str = "m.onnx", data: str = "w.bin") -> None:
    """Save the model with all its tensors in a data file."""
    externalise(model(), name, data)


def everything(root: Path | None = None) -> dict[str, bytes]:
    """The content of all files in a folder and below."""
    root = root or Path()
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def answer(name: str | Path = "m.onnx") -> np.ndarray:
    return outputs(Path(name), x=normal(3, D, seed=5))["y"]


# --- An input is never an output ------------------------------------------------------------------


@pytest.mark.parametrize("alias", [None, "symbolic link", "in another folder"])
def test_the_data_of_the_input_is_no_output(run, alias):
    save("e.onnx", "e.data")
    np.savez("c.npz", x=normal(3, D))
    target = "e.data"
    if alias == "symbolic link":
        Path("link").symlink_to("e.data")
        target = "link"
    elif alias is not None:
        Path("../other").symlink_to("here")
        target = "../other/e.data"
    before = everything()
    for arguments in (
        ["fold", "e.onnx", "-o", target],
        ["fold", "e.onnx", "-o", target, "--no-verify", "--dry-run"],
        ["fold", "e.onnx", "-o", "f.onnx", "--report", target],
        ["fold", "e.onnx", "--dry-run", "--report", target],
        ["fold", "e.onnx", "-o", "c.npz", "--calibrate", "c.npz"],
        ["fold", "e.onnx", "-o", "f.onnx", "--report", "c.npz", "--calibrate", "c.npz"],
        ["bench", "e.onnx", "e.onnx", "--plot", target],
        ["export", "tiny-gqa", "-o", target],
    ):
        code, text = run(*arguments)
        assert (code, everything()) == (4, before), (arguments, text)
        assert "write to another file" in text
    result = onnx_fold.fold("e.onnx")
    for name in (target, "e.onnx"):
        with pytest.raises(CannotWriteError, match="write to another file"):
            result.save(name)
        with pytest.raises(CannotWriteError, match="write to another file"):
            onnx_fold.fold("e.onnx", output=name)
    assert everything() == before


def test_a_hard_link_to_the_input_is_no_output(run):
    ir.save(model(), "m.onnx")
    os.link("m.onnx", "h.onnx")
    code, text = run("fold", "m.onnx", "-o", "h.onnx")
    assert (code, "h.onnx is the input" in text) == (4, True)


def test_the_data_of_a_model_in_memory_is_no_output():
    save()
    loaded = ir.load("m.onnx")
    Path("m.onnx").unlink()
    with pytest.raises(CannotWriteError, match=r"w\.bin is the input"):
        onnx_fold.fold(loaded, output="w.bin")


def test_the_data_of_another_model_is_no_output(run):
    save()
    Path("below").mkdir()
    save("below/other.onnx", "other.bin")
    externalise(model(), "below/above.onnx", "above.bin")
    shutil.move("below/above.onnx", "above.onnx")
    proto = onnx.load("above.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "below/above.bin"
    onnx.save(proto, "above.onnx")
    before = everything()
    for target in ("below/other.bin", "below/above.bin"):
        code, text = run("fold", "m.onnx", "-o", target)
        assert code == 4
        assert "holds weights of" in text
    assert everything() == before


@pytest.mark.parametrize("name", ["f.onnx.data", "./f.onnx-1.data", "f.onnx-00001-of-00002.data"])
def test_a_report_does_not_take_the_name_of_data(run, name):
    save()
    code, text = run("fold", "m.onnx", "-o", "f.onnx", "--report", name)
    assert (code, "data of it" in text) == (2, True)
    assert run("fold", "m.onnx", "-o", "f.onnx", "--report", "../here/f.onnx")[0] == 2


@pytest.mark.parametrize("text", [b'{"a": 1}', "é".encode() * 3000, b""])
def test_other_files_are_replaced(run, text):
    save()
    Path("r.json").write_bytes(text)
    assert run("fold", "m.onnx", "-o", "f.onnx", "--report", "r.json")[0] == 0
    assert json.loads(Path("r.json").read_text())["weights_removed"] == D * D
    Path("f.onnx").write_bytes(b"\0\1 neither a model nor text")
    assert run("fold", "m.onnx", "-o", "f.onnx")[0] == 0
    np.testing.assert_allclose(answer("f.onnx"), answer(), rtol=1e-4, atol=1e-6)


# --- Data goes only if nothing else needs it ------------------------------------------------------


def renamed(path: str, location: str) -> None:
    """Let all tensors of the model in ``path`` name another data file."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = location
    onnx.save(proto, path)


def copy_beside() -> str:
    shutil.copy("m.onnx", "copy.onnx")
    return "copy.onnx"


def copy_above() -> str:
    shutil.copy("m.onnx", "../top.onnx")
    renamed("../top.onnx", "here/m.onnx.data")
    return "../top.onnx"


def alias_beside() -> str:
    shutil.copy("m.onnx", "copy.onnx")
    Path("alias.bin").symlink_to("m.onnx.data")
    renamed("copy.onnx", "alias.bin")
    return "copy.onnx"


def alias_above() -> str:
    shutil.copy("m.onnx", "../top.onnx")
    Path("../alias.bin").symlink_to("here/m.onnx.data")
    renamed("../top.onnx", "alias.bin")
    return "../top.onnx"


def folder_alias_above() -> str:
    shutil.copy("m.onnx", "../top.onnx")
    Path("../there").symlink_to("here")
    renamed("../top.onnx", "there/m.onnx.data")
    return "../top.onnx"


def written_with_escapes() -> str:
    shutil.copy("m.onnx", "copy.onnx")
    onnx.save(onnx.load("copy.onnx", load_external_data=False), "copy.json")
    Path("copy.onnx").unlink()
    text = Path("copy.json").read_text()
    assert '"m.onnx.data"' in text
    Path("copy.json").write_text(text.replace('"m.onnx.data"', '"m\\u002eonnx.dat\\u0061"'))
    return "copy.json"


def written_with_octals() -> str:
    onnx.save(onnx.load("m.onnx", load_external_data=False), "copy.textproto")
    text = Path("copy.textproto").read_text()
    assert '"m.onnx.data"' in text
    Path("copy.textproto").write_text(text.replace('"m.onnx.data"', '"\\155.onnx.data"'))
    return "copy.textproto"


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "neighbour",
    [copy_beside, copy_above, alias_beside, alias_above, folder_alias_above, written_with_escapes,
     written_with_octals],
)  # fmt: skip
def test_data_that_a_neighbour_needs_stays(run, neighbour, in_place):
    save("m.onnx", "m.onnx.data")
    expected = answer()
    other = Path(neighbour())
    before = everything(Path(".."))
    if in_place:
        code, text = run("fold", "m.onnx", "--in-place", "--delete-old-data")
    else:
        save("in.onnx", "in.bin")
        code, text = run("fold", "in.onnx", "-o", "m.onnx", "--delete-old-data")
    assert code == 0
    assert "m.onnx.data stays: " in text
    kept = {name: data for name, data in before.items() if name != "here/m.onnx"}
    assert kept.items() <= everything(Path("..")).items()
    np.testing.assert_allclose(answer(), expected, rtol=1e-4, atol=1e-6)
    if other.suffix == ".onnx":
        np.testing.assert_array_equal(answer(other), expected)
    else:
        assert_whole(other, "m.onnx.data")


def test_a_longer_name_is_another_name(run):
    save("m.onnx", "m.onnx.data")
    save("encoder_m.onnx", "encoder_m.onnx.data")
    assert run("fold", "m.onnx", "--in-place")[0] == 0
    assert "m.onnx.data" not in everything()
    assert_whole("encoder_m.onnx", "encoder_m.onnx.data")


def test_where_too_much_lies_around_data_stays(run, monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_FILES", 3)
    save("m.onnx", "m.onnx.data")
    for i in range(9):
        Path(f"{i}.txt").touch()
    code, text = run("fold", "m.onnx", "--in-place")
    assert code == 0
    assert "m.onnx.data stays: there are too many files" in text


def test_the_input_of_an_output_that_had_its_data(run):
    """in.onnx has its data where an earlier f.onnx had it: f.onnx goes, the data stays."""
    save("f.onnx", "f.onnx.data")
    shutil.copy("f.onnx", "in.onnx")
    expected = answer("in.onnx")
    for options in ([], ["--delete-old-data"]):
        assert run("fold", "in.onnx", "-o", "f.onnx", *options)[0] == 0
        np.testing.assert_array_equal(answer("in.onnx"), expected)
        np.testing.assert_allclose(answer("f.onnx"), expected, rtol=1e-4, atol=1e-6)


def test_old_data_stays_if_the_new_model_is_not_whole(monkeypatch):
    """Whatever may have happened to it since it was written."""
    save("m.onnx", "m.onnx.data")
    before = everything()
    commit = output._commit

    def damaged(folder, target, obsolete):
        commit(folder, target, obsolete)
        Path("m.onnx").write_bytes(before["m.onnx"])  # a backup is put back

    monkeypatch.setattr(output, "_commit", damaged)
    onnx_fold.fold("m.onnx", in_place=True)
    assert before.items() <= everything().items()
    assert_whole("m.onnx", "m.onnx.data")


def test_a_journal_reaches_nothing_outside_its_folder():
    stale = Path(".x.onnx.onnx-fold.tmp")
    Path("../precious").touch()
    stale.mkdir()
    (stale / ".lock").touch()
    (stale / ".journal").write_text(json.dumps({"new": ["../precious"], "old": ["../precious"]}))
    save()
    onnx_fold.fold("m.onnx", output="f.onnx")
    assert Path("../precious").exists()
    assert not stale.exists()


# --- What cannot be written is said before the work -----------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr("onnx_fold.pipeline.load", None)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no/f.onnx", "no folder no"),
        ("pipe", "it is not a regular file"),
        ("folder", "it is not a regular file"),
        ("a" * 300, "File name too long"),
        ("f.onnxtxt", "use .onnx, .json or .textproto"),
    ],
)
def test_what_cannot_be_written(target, message):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    save()
    with pytest.raises(CannotWriteError, match=message):
        onnx_fold.fold("m.onnx", output=target)


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_a_pipe_does_not_block(run, option):
    os.mkfifo("pipe")
    save()
    more = ["-o", "f.onnx"] if option == "--report" else []
    code, text = run("fold", "m.onnx", option, "pipe", *more)
    assert (code, "pipe: it is not a regular file" in text) == (4, True)


@pytest.mark.parametrize("shards", [[], ["--shard-size", "1kB"]])
@pytest.mark.parametrize("name", ["n" * 245 + ".onnx", "é" * 122 + ".onnx"])
def test_long_names(run, name, shards):
    save("m.onnx")
    expected = answer()
    shutil.copy("m.onnx", name)
    for arguments in (["m.onnx", "-o", name], [name, "--in-place"], [name, "--in-place"]):
        assert run("fold", *arguments, *shards)[0] == 0
        np.testing.assert_allclose(answer(name), expected, rtol=1e-4, atol=1e-6)
    report = "r" * 245 + ".json"
    assert run("fold", "m.onnx", "--dry-run", "--report", report)[0] == 0
    assert json.loads(Path(report).read_text())["weights_removed"] == D * D
    assert not [path for path in everything() if "onnx-fold.tmp" in path]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("suffix", [".json", ".textproto"])
def test_text_formats_are_read_checked_and_written(run, suffix, dtype):
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    text = f"({kind}[n, {D}] x) => ({kind}[n, {D}] y) {{ p = MatMul(x, P) y = MatMul(p, M) }}"
    weights = {"P": normal(D, D, dtype=dtype), "M": normal(D, D, seed=1, dtype=dtype)}
    ir.save(graph(text, **weights), "m.onnx")
    onnx.save(onnx.load("m.onnx"), f"m{suffix}")
    assert run("fold", f"m{suffix}", "-o", f"f{suffix}", "--verify", "full")[0] == 0
    assert run("fold", f"m{suffix}", "-o", "f.onnx")[0] == 0
    assert run("verify", "m.onnx", f"f{suffix}")[0] == 0
    assert run("verify", f"f{suffix}", "f.onnx")[0] == 0
    assert run("fold", f"m{suffix}", "--in-place")[0] == 0
    assert [list(i.dims) for i in onnx.load(f"m{suffix}").graph.initializer] == [[D, D]]
    assert run("fold", f"m{suffix}", "-o", f"s{suffix}", "--shard-size", "1GB")[0] == 0
    assert_whole(f"s{suffix}", f"s{suffix}.data")
    code, said = run("fold", f"m{suffix}", "-o", "f.onnxtxt")
    assert (code, "use .onnx, .json or .textproto" in said) == (4, True)


def test_names_are_found_across_chunks(monkeypatch):
    monkeypatch.setattr(neighbours, "_CHUNK", 16)
    for before in range(40):
        for text, found in (
            (b"/w.bin", True),
            (b"w.bin", True),
            (b"xw.bin", False),
            (b"\x12\x05w.bin", True),
        ):
            Path("f").write_bytes(b"y" * before + b" " + text + b"z" * 40)
            assert neighbours._mentions(Path("f"), "w.bin") == found, (before, text)


@pytest.mark.parametrize("calls", [["pwrite"], ["fsync"], ["copy_file_range", "pwrite"]])
def test_a_full_disk_in_place(run, monkeypatch, calls):
    save("m.onnx", "m.onnx.data")
    before = everything()

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in calls:
        monkeypatch.setattr(os, call, full)
    code, text = run("fold", "m.onnx", "--in-place")
    assert (code, "No space left on device" in text) == (4, True)
    assert everything() == before
