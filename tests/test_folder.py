"""Folders as exporters write them: each model is folded, nothing is lost, names stay."""

import json
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from helpers import chain, normal

import onnx_fold
from onnx_fold import cli
from onnx_fold.errors import CannotWriteError, InvalidModelError, UsageError
from onnx_fold.files.load import data_files
from onnx_fold.passes import MergePass

GENAI = {"model": {"decoder": {"filename": "model.onnx"}, "type": "llama"}}


def save(model: ir.Model, path: Path, data: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=data, size_threshold_bytes=0 if data else 256)


def folds(seed=0):
    weights = {"P": normal(16, 16, seed=seed), "M": normal(16, 5, seed=seed + 1)}
    return chain("m = Identity(p)", width=16, **weights)


def stays():
    return chain("m = Relu(p)", width=16)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "exported"
    save(folds(), folder / "model.onnx", "model.onnx_data")
    save(folds(3), folder / "decoder" / "model.onnx")
    save(stays(), folder / "encoder.onnx", "encoder.bin")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "genai_config.json").write_text(json.dumps(GENAI))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_bytes(b"\xff\x00")
    (folder / "empty").mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(*args):
    return CliRunner().invoke(cli.cli, [*map(str, args)])


def test_all_of_a_folder(folder, tmp_path):
    before = contents(folder)
    report = onnx_fold.fold_folder(folder, tmp_path / "out", objective="size")
    after = contents(tmp_path / "out")
    assert contents(folder) == before
    assert set(after) == set(before)  # data files have their names, too
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"model.onnx", "model.onnx_data", "decoder/model.onnx"}
    assert left(tmp_path) == ["exported", "out"]
    for name in report.files:
        onnx.checker.check_model(tmp_path / "out" / name, full_check=True)
        assert onnx_fold.verify(folder / name, tmp_path / "out" / name)
    assert {name: len(each.folded) for name, each in report.files.items()} == {
        "decoder/model.onnx": 1,
        "encoder.onnx": 0,
        "model.onnx": 1,
    }
    assert all(each.verification for each in report.files.values() if each.folded)
    assert report.saving.weights == 2 * 16 * 16
    assert report.copied == (
        *("config.json", "encoder.bin", "genai_config.json", "tokenizer/merges.txt"),
    )
    named = json.loads(after["genai_config.json"])["model"]["decoder"]["filename"]
    assert named in report.files


def test_the_report(folder, tmp_path):
    report = onnx_fold.fold_folder(folder, None, objective="size")
    assert left(tmp_path) == ["exported"]
    text = str(report)
    assert text.index("decoder/model.onnx") < text.index("All of the folder (3 models)")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total"]["weights_removed"] == 512
    assert data["files"]["model.onnx"]["verification"]["ok"]
    assert "3 models" in repr(report)


def test_data_that_models_share(tmp_path):
    folder = tmp_path / "exported"
    save(folds(), folder / "a.onnx", "weights.data")
    save(folds(), folder / "b.onnx", "weights.data")
    onnx_fold.fold_folder(folder, tmp_path / "out", objective="size")
    models = [tmp_path / "out" / name for name in ("a.onnx", "b.onnx")]
    assert [path.name for model in models for path in data_files(model)] == [
        "weights.data",
        "b.onnx.data",
    ]
    assert all(onnx_fold.verify(folder / model.name, model) for model in models)


def test_data_that_a_model_that_stays_needs(tmp_path):
    folder = tmp_path / "exported"
    weights = {"P": normal(16, 16), "M": normal(16, 5)}
    save(chain("m = Identity(p)", width=16, **weights), folder / "a.onnx", "weights.data")
    save(chain("m = Relu(p)", width=16, **weights), folder / "b.onnx", "weights.data")
    before = contents(folder)
    onnx_fold.fold_folder(folder, tmp_path / "out", objective="size")
    after = contents(tmp_path / "out")
    assert {name for name in after if before.get(name) != after[name]} == {"a.onnx", "a.onnx.data"}
    assert all(onnx_fold.verify(folder / m, tmp_path / "out" / m) for m in ("a.onnx", "b.onnx"))


def test_shards(folder, tmp_path):
    onnx_fold.fold_folder(folder, tmp_path / "out", objective="size", shard_size=200)
    assert onnx_fold.verify(folder / "model.onnx", tmp_path / "out" / "model.onnx")


def test_links_are_followed(folder, tmp_path):
    stored = tmp_path / "blob"
    (folder / "config.json").rename(stored)
    (folder / "config.json").symlink_to(stored)
    (folder / "also").symlink_to(folder / "tokenizer")
    onnx_fold.fold_folder(folder, tmp_path / "out", objective="size")
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert (tmp_path / "out" / "config.json").read_bytes() == stored.read_bytes()
    assert (tmp_path / "out" / "also" / "merges.txt").is_file()


def test_protect_is_for_whichever_model_has_it(folder, tmp_path):
    save(chain("m = Identity(p)", width=16, P=normal(16, 16), M=normal(16, 5)), folder / "own.onnx")
    model = ir.load(folder / "own.onnx")
    model.graph.initializers["P"].name = "mine"
    save(model, folder / "own.onnx")
    report = onnx_fold.fold_folder(folder, None, objective="size", protect="mine")
    assert not report.files["own.onnx"].folded
    assert report.files["model.onnx"].folded
    with pytest.raises(UsageError, match="nothing in the models is called 'yours'"):
        onnx_fold.fold_folder(folder, None, protect="yours")


def test_where_it_may_not_go(folder, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    for output, message in (
        (full, "not empty"),
        (folder, "inside"),
        (folder / "out", "inside"),
        (tmp_path / "no" / "out", "no folder"),
        (full / "mine", "not a folder"),
    ):
        with pytest.raises(CannotWriteError, match=message):
            onnx_fold.fold_folder(folder, output)
    (full / "mine").unlink()
    onnx_fold.fold_folder(folder, full, objective="size")  # empty now
    assert (full / "model.onnx").is_file()


def test_what_makes_no_sense(folder, tmp_path):
    with pytest.raises(UsageError, match=r"no \.onnx file"):
        onnx_fold.fold_folder(folder / "tokenizer", tmp_path / "out")
    with pytest.raises(UsageError, match="not a folder"):
        onnx_fold.fold_folder(folder / "model.onnx", tmp_path / "out")
    with pytest.raises(UsageError, match="'inputs' is no option"):
        onnx_fold.fold_folder(folder, tmp_path / "out", inputs={})
    (folder / "back").symlink_to(folder)
    with pytest.raises(UsageError, match="leads back"):
        onnx_fold.fold_folder(folder, tmp_path / "out")
    (folder / "back").unlink()
    (folder / "nowhere").symlink_to(folder / "gone")
    with pytest.raises(UsageError, match="not a file that can be copied"):
        onnx_fold.fold_folder(folder, tmp_path / "out")


class WrongPass(MergePass):
    """Raises at the second model."""

    name = "wrong"

    def candidates(self, stream):
        if WrongPass.calls:
            raise OSError(28, "No space left on device")
        WrongPass.calls = 1
        return super().candidates(stream)


@pytest.mark.parametrize("exists", [False, True])
def test_all_or_nothing(folder, tmp_path, exists):
    WrongPass.calls = 0
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(CannotWriteError, match="No space left"):
        onnx_fold.fold_folder(folder, tmp_path / "out", objective="size", passes=[WrongPass])
    assert left(tmp_path) == (["exported", "out"] if exists else ["exported"])
    assert not exists or left(tmp_path / "out") == []


def test_a_model_that_cannot_be_read(folder, tmp_path):
    (folder / "model.onnx_data").write_bytes(b"")
    with pytest.raises(InvalidModelError, match=r"model\.onnx"):
        onnx_fold.fold_folder(folder, tmp_path / "out")
    assert left(tmp_path) == ["exported"]


def test_what_a_killed_run_left_is_removed(folder, tmp_path):
    workplace = tmp_path / ".out.onnx-fold.tmp"
    (workplace / "out" / "decoder").mkdir(parents=True)
    (workplace / "out" / "decoder" / "model.onnx").write_bytes(b"half")
    (workplace / ".lock").touch()
    onnx_fold.fold_folder(folder, tmp_path / "out", objective="size")
    assert left(tmp_path) == ["exported", "out"]


def test_the_command_line(folder, tmp_path):
    out, report, page = tmp_path / "out", tmp_path / "r.json", tmp_path / "r.html"
    how = ("--objective", "size", "--report", report, "--html", page)
    result = run("fold", folder, "-o", out, *how)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}" in result.output
    assert json.loads(report.read_text())["total"]["weights_removed"] == 512
    assert (out / "tokenizer" / "merges.txt").is_file()
    text = page.read_text()
    assert "Fold of a folder" in text
    for number, name in enumerate(json.loads(report.read_text())["files"], 1):
        assert f'<a href="#model-{number}">{name}</a>' in text
        assert f'id="model-{number}"' in text
    assert text.count('id="head') == len(set(re.findall(r'id="head[^"]*"', text))) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["exported"], "say where to write"),
        (["exported", "--in-place"], "are for one model"),
        (["exported/encoder.onnx", "-o", "exported"], "is a folder"),
    ],
)
def test_usage(folder, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    result = run("fold", *args)
    assert result.exit_code == 2
    assert message in result.output
    assert left(tmp_path) == ["exported"]


def test_a_dry_run_writes_nothing(folder, tmp_path):
    result = run("fold", folder, "--dry-run", "--objective", "size")
    assert result.exit_code == 0, result.output
    assert "All of the folder (3 models)" in result.output
    assert left(tmp_path) == ["exported"]


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_a_decoder_with_past_and_an_encoder_decoder(tmp_path):
    families = pytest.importorskip("families")
    folder = tmp_path / "exported"
    folder.mkdir()
    for file, family, cache in (
        ("decoder_model.onnx", "llama", False),
        ("decoder_with_past_model.onnx", "llama", True),
        ("encoder_model.onnx", "bert", False),
    ):
        path = families.export(
            families.case(family, cache=cache), tmp_path / "m.onnx", "torchscript", 17
        )
        save(ir.load(path), folder / file, f"{file}_data")
    (folder / "generation_config.json").write_text("{}")
    names = set(contents(folder))
    report = onnx_fold.fold_folder(folder, tmp_path / "out", objective="size")
    assert set(contents(tmp_path / "out")) == names
    assert [len(each.folded) for each in report.files.values()] == 3 * [families.SERIAL]
    for name in report.files:
        assert onnx_fold.verify(folder / name, tmp_path / "out" / name)
