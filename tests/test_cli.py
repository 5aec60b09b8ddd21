"""The command line: exit codes, and what lies on the disk afterwards."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import onnx
import onnx_ir as ir
import pytest
from helpers import graph, normal

import onnx_fold
from onnx_fold import cli, pipeline
from onnx_fold.check.parity import ParityReport
from onnx_fold.report.junit import junit

D = 8


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Run the program: exit code, standard output, standard error; never a traceback."""

    def run(*arguments: str) -> tuple[int, str, str]:
        cli._console.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["onnx-fold", *arguments])
            try:
                cli.main()
                code = 0
            except SystemExit as leave:
                code = leave.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def mlp(last: str = "y = MatMul(p, M)") -> ir.Model:
    text = f"(float[n, {D}] x) => (float[n, {D + 1}] y) {{ p = MatMul(x, P) {last} }}"
    return graph(text, P=normal(D, D), M=normal(D, D + 1, seed=1))


def save(model: ir.Model | None = None, name: str = "m.onnx", data: str | None = None) -> bytes:
    ir.save(model or mlp(), name, external_data=data, size_threshold_bytes=0)
    return Path(name).read_bytes()


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


# --- 0: done --------------------------------------------------------------------------------------


def test_fold(run):
    before = save()
    code, out, err = run("fold", "m.onnx", "-o", "f.onnx", "--report", "r.json")
    assert (code, err) == (0, "")
    assert "Wrote f.onnx." in out
    assert files() == {"m.onnx", "f.onnx", "r.json"}
    assert Path("m.onnx").read_bytes() == before
    onnx.checker.check_model("f.onnx", full_check=True)
    assert [i.dims for i in onnx.load("f.onnx").graph.initializer] == [[D, D + 1]]
    report = json.loads(Path("r.json").read_text())
    assert report["weights_removed"] == D * D
    assert report["verification"]["ok"]
    (fold,) = filter(None, (stream["folded"] for stream in report["streams"]))
    assert fold["strategy"] == "merge"


def test_dry_run_writes_nothing(run):
    save()
    code, out, _ = run("fold", "m.onnx", "--dry-run", "-o", "f.onnx")
    assert code == 0
    assert "Wrote" not in out
    assert files() == {"m.onnx"}


def test_a_model_in_which_nothing_folds_is_copied_byte_for_byte(run):
    before = save(mlp("r = Relu(p) y = MatMul(r, M)")) + b""
    code, out, _ = run("fold", "m.onnx", "-o", "f.onnx")
    assert code == 0
    assert "Nothing folded" in out
    assert Path("f.onnx").read_bytes() == before


def test_an_earlier_output_is_replaced(run):
    save()
    Path("f.onnx").write_bytes(b"old")
    assert run("fold", "m.onnx", "-o", "f.onnx")[0] == 0
    assert len(Path("f.onnx").read_bytes()) > 3
    assert files() == {"m.onnx", "f.onnx"}


def test_external_data_stays_external(run):
    model = graph(
        f"(float[n, {D}] x) => (float[n, 9] y, float[n, 9] z)"
        " { p = MatMul(x, P) y = MatMul(p, M) r = Relu(y) z = MatMul(r, S) }",
        P=normal(D, D), M=normal(D, 9), S=normal(9, 9),
    )  # fmt: skip
    save(model, data="w.bin")
    data = Path("w.bin").read_bytes()
    assert run("fold", "m.onnx", "-o", "f.onnx")[0] == 0
    assert files() == {"m.onnx", "w.bin", "f.onnx", "f.onnx.data"}
    assert Path("w.bin").read_bytes() == data
    assert run("verify", "m.onnx", "f.onnx")[0] == 0


def chain(last: str = "y = MatMul(r, S)") -> ir.Model:
    """Two layers that fold and one that does not."""
    return graph(
        f"(float[n, {D}] x) => (float[n, 9] y) {{ p = MatMul(x, P) m = MatMul(p, M)"
        f" r = Relu(m) {last} }}",
        P=normal(D, D), M=normal(D, 9), S=normal(9, 9),
    )  # fmt: skip


@pytest.mark.parametrize("data", [None, "m.onnx.data", "w.bin"])
def test_in_place(run, data):
    save(chain(), data=data)
    save(chain(), "copy.onnx", data=data and "copy.bin")
    code, out, err = run("fold", "m.onnx", "--in-place")
    assert (code, err) == (0, "")
    assert "Wrote m.onnx." in out
    assert [i.dims for i in onnx.load("m.onnx").graph.initializer] == [[9, 9], [D, 9]]
    written = {
        None: set(),
        "m.onnx.data": {"m.onnx-1.data"},
        "w.bin": {"m.onnx.data", "w.bin"},
    }[data]
    assert ("No longer needed: w.bin. --delete-old-data" in out) == (data == "w.bin")
    assert files() == {"m.onnx", "copy.onnx", *written, *([data and "copy.bin"] if data else [])}
    assert run("verify", "copy.onnx", "m.onnx")[0] == 0
    before = Path("m.onnx").stat()
    code, out, _ = run("fold", "m.onnx", "--in-place")
    assert code == 0
    assert "m.onnx is as it was." in out
    assert Path("m.onnx").stat() == before


def test_in_place_keeps_data_that_another_model_needs(run):
    save(chain(), data="w.bin")
    Path("other.onnx").write_bytes(Path("m.onnx").read_bytes())
    assert run("fold", "m.onnx", "--in-place")[0] == 0
    assert files() == {"m.onnx", "m.onnx.data", "other.onnx", "w.bin"}
    assert run("verify", "other.onnx", "m.onnx")[0] == 0


def test_in_place_that_does_not_verify_changes_nothing(run, monkeypatch):
    before = save(data="w.bin")
    left = files()
    check = pipeline.parity_check
    monkeypatch.setattr(pipeline, "parity_check", lambda a, b, **k: check(a, wrong(), **k))
    assert run("fold", "m.onnx", "--in-place", "--strict")[0] == 1
    assert (files(), Path("m.onnx").read_bytes()) == (left, before)
    code, out, _ = run("fold", "m.onnx", "--in-place")
    assert code == 0
    assert "Taken back (" in out
    assert "m.onnx is as it was." in out
    assert (files(), Path("m.onnx").read_bytes()) == (left, before)


@pytest.mark.parametrize("size", ["300", "0.3kB", "300B"])
def test_shards(run, size):
    save(chain())
    assert run("fold", "m.onnx", "-o", "f.onnx", "--shard-size", size)[0] == 0
    shards = {f"f.onnx-0000{i}-of-00002.data" for i in (1, 2)}
    assert files() == {"m.onnx", "f.onnx", *shards}
    assert run("verify", "m.onnx", "f.onnx")[0] == 0
    options = ["--shard-size", "4GiB", "--delete-old-data"]
    code, out, _ = run("fold", "m.onnx", "-o", "f.onnx", *options)
    assert (code, "No longer needed" in out) == (0, False)
    assert files() == {"m.onnx", "f.onnx", "f.onnx.data"}


def test_sampled(run):
    save(chain())
    code, out, _ = run(
        "fold", "m.onnx", "-o", "f.onnx", "--verify", "sampled", "--report", "r.json"
    )
    assert code == 0
    assert "same function in 1 of 1 folded streams" in out
    assert json.loads(Path("r.json").read_text())["verification"]["scope"]


def test_a_model_that_does_not_fit_in_memory_is_sampled(run, monkeypatch):
    save(chain())
    monkeypatch.setattr("onnx_fold.check.sampled.available_memory", lambda: 1000)
    code, out, _ = run("fold", "m.onnx", "-o", "f.onnx")
    assert code == 0
    assert "same function in 1 of 1 folded streams" in out
    assert "together they do not fit in memory" in out
    code, out, _ = run("fold", "m.onnx", "-o", "f.onnx", "--verify", "full")
    assert "of 1 folded streams" not in out


def test_quiet(run):
    save()
    assert run("fold", "m.onnx", "-o", "f.onnx", "--quiet") == (0, "", "")
    assert "f.onnx" in files()
    code, out, err = run("fold", "no.onnx", "-o", "f.onnx", "-q")
    assert (code, out) == (3, "")
    assert "cannot read no.onnx" in err


def test_a_log_says_how_far_it_is(run, monkeypatch):
    monkeypatch.setattr("onnx_fold.base.progress.LINE_INTERVAL", 0.001)
    save(chain())
    code, out, err = run("fold", "m.onnx", "-o", "f.onnx", "--shard-size", "1GB")
    assert code == 0
    step = "looking for streams|choosing folds: stream 1 of 3|proving: the whole model|checking .*"
    assert re.search(rf"^0 s: ({step})$", err, re.MULTILINE)
    assert "0 s:" not in out


def test_every_step_is_told():
    save(chain())
    told = []
    onnx_fold.fold("m.onnx", output="f.onnx", shard_size=10**9, progress=lambda *a: told.append(a))
    texts = [text for text, _, _ in told]
    steps = "reading", "looking for streams", "choosing folds: stream 1 of 4", "proving: the whole"
    found = [next(i for i, text in enumerate(texts) if text.startswith(step)) for step in steps]
    assert found == sorted(found)
    first = told.index(("writing", 0, 612))
    assert max(found) < first
    assert sorted(done for _, done, _ in told[first + 1 : first + 3])[-1] == 612
    checks = texts[first + 3 :]
    assert checks[:2] == ["checking the original", "checking n=1, the original"]
    assert "checking n=8, the folded model" in checks
    assert all(text.startswith("checking ") for text in checks)


def test_a_check_says_what_runs():
    save()
    told = []
    shapes = [{"n": 3}, {"n": 5}]
    onnx_fold.verify("m.onnx", "m.onnx", shapes=shapes, progress=lambda *a: told.append(a))
    models = "the original", "the folded model", "the reference in double"
    runs = [f"checking {n}{which}" for which in models for n in ("", "n=3, ", "n=5, ")]
    assert told == [(text, 0, 0) for text in (*runs, "checking the weights as stored")]


def test_a_proof_of_streams_counts_them(monkeypatch):
    monkeypatch.setattr("onnx_fold.check.proof.WHOLE", 0)
    save(chain())
    told = []
    onnx_fold.fold("m.onnx", progress=lambda what, *_: told.append(what), verify="sampled")
    assert "proving: stream 1 of 1" in told
    assert any(what.startswith("stream 1 of 1: checking ") for what in told)


def test_inspect_says_what_it_looks_at():
    told = []
    onnx_fold.inspect(chain(), progress=lambda what, *_: told.append(what))
    assert told[0] == "reading"
    assert "choosing folds: stream 2 of 4" in told


def test_inspect(run):
    before = save()
    code, out, _ = run("inspect", "m.onnx")
    assert code == 0
    assert "Would fold (1 stream)" in out
    code, out, _ = run("inspect", "m.onnx", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["plan"]["weights_removed"] == D * D
    assert report["model"]["opsets"] == {"ai.onnx": 18}
    assert files() == {"m.onnx"}
    assert Path("m.onnx").read_bytes() == before


def test_verify(run):
    save()
    run("fold", "m.onnx", "-o", "f.onnx")
    code, out, _ = run("verify", "m.onnx", "f.onnx")
    assert code == 0
    assert "same function" in out
    code, out, _ = run("verify", "m.onnx", "f.onnx", "--json", "--shape", "n=3", "--samples", "2")
    assert (code, json.loads(out)["ok"]) == (0, True)


def test_bench(run):
    save()
    run("fold", "m.onnx", "-o", "f.onnx")
    short = ["--repeats", "2", "--tokens", "2", "--warmup", "0", "--prefill", "3", "--prefill", "5"]
    code, out, _ = run("bench", "m.onnx", "f.onnx", *short, "--plot", "speed.svg", "--profile")
    assert code == 0
    assert "Wrote speed.svg" in out
    assert "Where the time of" in out
    code, out, _ = run("bench", "m.onnx", "f.onnx", *short, "--json")
    assert (code, json.loads(out)["bytes_ratio"] > 1) == (0, True)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_measurement(run, monkeypatch):
    save()
    monkeypatch.setattr(onnx_fold, "bench", None)
    for path, message in (("speed.txt", "ends in .svg or .png"), ("no/speed.svg", "no folder no")):
        code, _, err = run("bench", "m.onnx", "m.onnx", "--plot", path)
        assert code == 4
        assert message in err


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (("fold", "m.onnx", "-o", "f.onnx"), "Fold"),
        (("fold", "m.onnx", "--dry-run"), "Fold"),
        (("inspect", "m.onnx"), "What would fold"),
        (("verify", "m.onnx", "m.onnx"), "Parity"),
        (("bench", "m.onnx", "m.onnx", "--repeats", "1", "--tokens", "1"), "Speed"),
    ],
)
def test_a_page(run, arguments, title):
    save()
    code, _, err = run(*arguments, "--html", "a page.html")
    assert (code, err) == (0, "")
    text = Path("a page.html").read_text()
    assert f"<h1>{title}</h1>" in text
    assert f"onnx-fold {' '.join(arguments)} --html &#39;a page.html&#39;" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("fold", "m.onnx", "-o", "f.onnx", "--html", "f.onnx"),
        ("fold", "m.onnx", "-o", "f.onnx", "--html", "f.onnx.data"),
        ("fold", "m.onnx", "-o", "f.onnx", "--html", "m.onnx"),
        ("fold", "m.onnx", "-o", "f.onnx", "--report", "r", "--html", "r"),
        ("fold", "m.onnx", "-o", "f.onnx", "--html", "missing/p.html"),
        ("inspect", "m.onnx", "--html", "m.onnx"),
        ("verify", "m.onnx", "m.onnx", "--html", "x", "--junit", "x"),
        ("verify", "m.onnx", "m.onnx", "--junit", "m.onnx"),
        ("bench", "m.onnx", "m.onnx", "--html", "m.onnx"),
    ],
)
def test_a_page_over_another_file(run, arguments):
    before = save()
    code, _, err = run(*arguments)
    assert code in (2, 4)
    assert len(err.splitlines()) <= 4
    assert files() == {"m.onnx"}
    assert Path("m.onnx").read_bytes() == before


def test_a_page_of_a_fold_that_does_not_verify(run, monkeypatch):
    save()
    failed = ParityReport(False, "the outputs differ")
    monkeypatch.setattr(pipeline, "parity_check", lambda *_, **__: failed)
    code, _, _ = run("fold", "m.onnx", "-o", "f.onnx", "--strict", "--html", "p.html")
    assert code == 1
    assert files() == {"m.onnx", "p.html"}
    text = Path("p.html").read_text()
    assert "not the same function" in text
    assert "the outputs differ" in text


def test_without_jinja_a_page_is_refused_before_the_work(run, monkeypatch):
    from onnx_fold.report import page

    save()
    page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run("fold", "m.onnx", "-o", "f.onnx", "--html", "p.html")
    assert (code, err) == (2, "error: jinja2 is not installed: pip install 'onnx-fold[html]'\n")
    assert files() == {"m.onnx"}


def test_a_report_on_standard_output(run):
    save()
    code, out, err = run("fold", "m.onnx", "-o", "f.onnx", "--report", "-")
    assert code == 0
    assert json.loads(out)["weights_removed"] == D * D
    assert "Wrote f.onnx." in err
    assert files() == {"m.onnx", "f.onnx"}
    _, out, err = run("fold", "m.onnx", "--dry-run", "-q", "--report", "-")
    assert json.loads(out)["verification"]["ok"]
    assert err == ""


def test_junit(run):
    save()
    save(mlp("r = Relu(p) y = MatMul(r, M)"), "other.onnx")
    assert run("verify", "m.onnx", "m.onnx", "--junit", "j.xml")[0] == 0
    suite = ElementTree.parse("j.xml").getroot().find("testsuite")
    assert suite.get("failures") == "0"
    assert "output y" in [case.get("name") for case in suite.findall("testcase")]
    assert run("verify", "m.onnx", "other.onnx", "--junit", "j.xml")[0] == 1
    root = ElementTree.parse("j.xml").getroot()
    assert root.get("failures") == "1"
    assert "is over the limit" in root.find(".//failure").get("message")


def test_junit_of_models_that_cannot_be_compared():
    report = ParityReport(False, "the inputs differ: a\x00\x1bb became c")
    root = ElementTree.fromstring(junit(report, "a b"))
    (case,) = root.iter("testcase")
    assert case.find("failure").get("message") == report.reason.replace("\0", "\ufffd").replace(
        "\x1b", "\ufffd"
    )


def test_as_a_module():
    command = [sys.executable, "-m", "onnx_fold", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"onnx-fold, version {onnx_fold.__version__}\n"


def test_help_version_and_presets(run):
    assert "fold" in run("--help")[1]
    assert onnx_fold.__version__ in run("--version")[1]
    assert "mistral-7b" in run("presets")[1]
    for command in ("fold", "inspect", "verify", "bench", "export", "demo"):
        assert run(command, "-h")[0] == 0


# --- 1: a check failed ----------------------------------------------------------------------------


def test_other_models_do_not_verify(run):
    save()
    other = mlp()
    other.graph.initializers["P"].const_value = ir.tensor(normal(D, D, seed=9), name="P")
    save(other, "other.onnx")
    code, out, _ = run("verify", "m.onnx", "other.onnx")
    assert code == 1
    assert "differs" in out


def test_a_fold_that_does_not_verify_leaves_nothing(run, monkeypatch):
    before = save()
    check = pipeline.parity_check
    monkeypatch.setattr(pipeline, "parity_check", lambda a, b, **k: check(a, wrong(), **k))
    code, out, err = run("fold", "m.onnx", "-o", "f.onnx", "--report", "r.json", "--strict")
    assert code == 1
    assert err.startswith("error: the folded model is not the same function: output 'y'")
    assert "differs" in out
    assert files() == {"m.onnx", "r.json"}
    assert json.loads(Path("r.json").read_text())["verification"]["ok"] is False
    assert Path("m.onnx").read_bytes() == before


def test_a_fold_that_does_not_verify_is_taken_back(run, monkeypatch):
    before = save()
    check = pipeline.parity_check
    monkeypatch.setattr(pipeline, "parity_check", lambda a, b, **k: check(a, wrong(), **k))
    code, out, _ = run("fold", "m.onnx", "-o", "f.onnx", "--report", "r.json")
    assert code == 0
    assert "Taken back (" in out
    assert Path("f.onnx").read_bytes() == before
    report = json.loads(Path("r.json").read_text())
    reason = next(iter(report["taken_back"].values()))
    assert reason.startswith("with it, the folded model is not the same function: output 'y'")
    assert report["weights_removed"] == 0


def test_force_is_for_a_strategy(run):
    save()
    code, _, err = run("fold", "m.onnx", "--dry-run", "--force")
    assert code == 2
    assert "to force needs a strategy" in err


def wrong() -> ir.Model:
    model = mlp()
    model.graph.initializers["M"].const_value = ir.tensor(normal(D, D + 1, seed=9), name="M")
    return model


# --- 2: usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold", "m.onnx"], "say where to write with -o FILE"),
        (["fold", "m.onnx", "-o", "f.onnx", "--in-place"], "say where to write with -o FILE"),
        (["fold", "m.onnx", "-o", "f.onnx", "--shard-size", "0"], "'0' is not a size"),
        (["fold", "m.onnx", "-o", "f.onnx", "--shard-size", "4XB"], "'4XB' is not a size"),
        (["fold", "m.onnx", "-o", "f.onnx", "--verify", "some"], "'some' is not one of"),
        (["fold", "m.onnx", "-o", "f.onnx", "--pivot", "w"], "'w' is not one of"),
        (["fold", "m.onnx", "-o", "f.onnx", "--only", "melt"],
         "unknown pass 'melt'; there are tables"),
        (["inspect", "m.onnx", "--skip", "melt"], "unknown pass 'melt'"),
        (["fold", "m.onnx", "-o", "f.onnx", "--report", "f.onnx"], "name the same file"),
        (["fold", "m.onnx", "-o", "f.onnx", "--tolerance", "low"], "not a valid float"),
        (["verify", "m.onnx", "m.onnx", "--shape", "n"], "is not like batch=2,seq=16"),
        (["verify", "m.onnx", "m.onnx", "--provider", "tpu"], "'tpu' is not one of"),
        (["fold"], "Missing argument"),
        (["melt"], "No such command"),
        (["inspect", "."], "is a directory"),
    ],
)  # fmt: skip
def test_usage(run, arguments, message):
    save()
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert files() == {"m.onnx"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fold", "m.onnx", "-o", "f.onnx"], 2),
        (["fold", "m.onnx", "-o", "f.onnx", "--no-verify"], 0),
        (["inspect", "m.onnx"], 0),
        (["verify", "m.onnx", "m.onnx"], 2),
    ],
)
def test_without_a_runtime(run, monkeypatch, arguments, code):
    save()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    actual, _, err = run(*arguments)
    assert actual == code
    if code:
        assert "pip install 'onnx-fold[cpu]'" in err


# --- 3: not a model -------------------------------------------------------------------------------


def test_no_such_model(run):
    for arguments in (
        ["fold", "m.onnx", "-o", "f.onnx"],
        ["inspect", "m.onnx"],
        ["verify", "m.onnx", "m.onnx"],
    ):
        code, _, err = run(*arguments)
        assert (code, err) == (3, "error: cannot read m.onnx: No such file or directory\n")
    assert files() == set()


@pytest.mark.parametrize("name", ["m.onnx", "m.json", "m.textproto", "m.onnxtxt"])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff\xfe\x00" * 50, b"{}", b"\x08\x07"])
def test_not_a_model(run, name, content):
    Path(name).write_bytes(content)
    code, _, err = run("fold", name, "-o", "f.onnx")
    assert code == 3
    assert err.startswith(f"error: {name} is not an ONNX model")
    assert files() == {name}


def test_truncated(run):
    whole = save()
    for end in (len(whole) - 1, len(whole) // 2, 20):
        Path("m.onnx").write_bytes(whole[:end])
        code, _, err = run("fold", "m.onnx", "-o", "f.onnx")
        assert (code, files()) == (3, {"m.onnx"}), (end, err)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "external data file w.bin is missing (initializer 'P')"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is too short for initializer"),
        (lambda path: path.write_bytes(b""), "is too short for initializer 'P'"),
    ],
    ids=["missing", "short", "empty"],
)
def test_broken_external_data(run, spoil, message):
    save(data="w.bin")
    spoil(Path("w.bin"))
    left = files()
    code, _, err = run("fold", "m.onnx", "-o", "f.onnx")
    assert code == 3
    assert message in err
    assert files() == left


@pytest.mark.parametrize("absolute", [False, True])
def test_external_data_outside_the_folder(run, tmp_path, absolute):
    save(data="w.bin")
    (tmp_path / "in").mkdir()
    proto = onnx.load("m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(tmp_path / "w.bin") if absolute else "../w.bin"
    Path("in/m.onnx").write_bytes(proto.SerializeToString())
    code, _, err = run("fold", "in/m.onnx", "-o", "f.onnx")
    assert code == 3
    assert "'P' points outside the model's folder" in err
    assert files() == {"m.onnx", "w.bin", "in"}


# --- 4: cannot write ------------------------------------------------------------------------------


def test_output_over_the_input(run):
    before = save()
    Path("link.onnx").symlink_to("m.onnx")
    for output in ("m.onnx", "./m.onnx", "link.onnx"):
        code, _, err = run("fold", "m.onnx", "-o", output)
        assert code == 4
        assert "is the input; write to another file, or over it with --in-place" in err
    assert run("fold", "m.onnx", "-o", "f.onnx", "--report", "m.onnx")[0] == 4
    assert files() == {"m.onnx", "link.onnx"}
    assert Path("m.onnx").read_bytes() == before


def test_output_over_the_weights_of_the_input(run):
    """m.onnx with m.onnx.data is renamed to orig.onnx; then the fold goes to m.onnx."""
    model = graph(
        f"(float[n, {D}] x) => (float[n, 9] y, float[n, 9] z)"
        " { p = MatMul(x, P) y = MatMul(p, M) r = Relu(y) z = MatMul(r, S) }",
        P=normal(D, D), M=normal(D, 9), S=normal(9, 9),
    )  # fmt: skip
    save(model, data="m.onnx.data")
    Path("m.onnx").rename("orig.onnx")
    data = Path("m.onnx.data").read_bytes()
    assert run("fold", "orig.onnx", "-o", "m.onnx")[0] == 0
    assert files() == {"orig.onnx", "m.onnx.data", "m.onnx", "m.onnx-1.data"}
    assert Path("m.onnx.data").read_bytes() == data
    assert run("verify", "orig.onnx", "m.onnx")[0] == 0


def test_no_such_folder(run):
    save()
    code, _, err = run("fold", "m.onnx", "-o", "no/f.onnx")
    assert (code, err) == (4, "error: cannot write no/f.onnx: no folder no\n")


def test_a_read_only_folder(run, monkeypatch):
    save()
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK
    )  # root may write everywhere
    code, _, err = run("fold", "m.onnx", "-o", "f.onnx")
    assert (code, err) == (4, "error: cannot write f.onnx: . is read-only\n")


def test_a_full_disk(run, monkeypatch):
    before = save()
    Path("f.onnx").write_bytes(b"old")

    def full(model, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_fold.files.write.onnx.save", full)
    code, _, err = run("fold", "m.onnx", "-o", "f.onnx")
    assert (code, err) == (4, "error: cannot write f.onnx: No space left on device\n")
    assert files() == {"m.onnx", "f.onnx"}
    assert Path("f.onnx").read_bytes() == b"old"
    assert Path("m.onnx").read_bytes() == before


@pytest.mark.parametrize("where", ["fold_streams", "parity_check", "saving"])
def test_ctrl_c(run, monkeypatch, where):
    before = save()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, where, interrupt)
    code, _, err = run("fold", "m.onnx", "-o", "f.onnx")
    assert (code, err.strip()) == (130, "interrupted; nothing was written")
    assert files() == {"m.onnx"}
    assert Path("m.onnx").read_bytes() == before


def test_ctrl_c_while_writing_leaves_no_stray_file(run, monkeypatch):
    save()

    def interrupt(model, path, **_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx_fold.files.write.onnx.save", interrupt)
    assert run("fold", "m.onnx", "-o", "f.onnx")[0] == 130
    assert files() == {"m.onnx"}


def test_any_source_folds_alike(tmp_path):
    save()
    sources = ["m.onnx", Path("m.onnx"), onnx.load("m.onnx"), ir.load("m.onnx")]
    folded = [ir.to_proto(onnx_fold.fold(source).ir).SerializeToString() for source in sources]
    assert len(set(folded)) == 1
    with pytest.raises(onnx_fold.UsageError, match="got list"):
        onnx_fold.fold([])


@pytest.mark.parametrize(
    "body",
    [
        "y = Add(x, missing)",
        "a = Add(x, b) b = Neg(a) y = Neg(b)",
        "p = MatMul(x, w) y = Gather(p)",
        "p = MatMul(x, w) y = Mul(p)",
        "p = MatMul(x, w) t = Transpose<perm = [0, 5]>(p) y = MatMul(t, w)",
        "",
    ],
    ids=["undefined", "cycle", "one input", "one factor", "permutation", "no nodes"],
)
@pytest.mark.parametrize("command", ["fold", "inspect"])
def test_an_invalid_graph(run, command, body):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> '
        f"g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}> {{ {body} }}"
    )
    Path("m.onnx").write_bytes(model.SerializeToString())
    code, _, err = run(command, "m.onnx", *(["-o", "f.onnx"] if command == "fold" else []))
    assert code == 3
    assert "is not a valid ONNX model: " in err
    assert files() == {"m.onnx"}


def test_demo_tells_the_same_story_twice(run):
    code, out, err = run("demo", "--tokens", "8")
    assert (code, err) == (0, "")
    assert out.count("the same text") == 2
    assert "Folded (9 streams)" in out
    assert "And an ordinary one, trained without that, which keeps its norms" in out


def test_demo_of_the_model_that_keeps_its_norms(run):
    code, out, err = run("demo", "--norms", "--tokens", "8")
    assert (code, err) == (0, "")
    assert "the same text" in out
    assert "Folded (9 streams)" in out
    assert "8 panels" in out


def test_demo_with_a_prompt_it_cannot_read(run):
    code, out, err = run("demo", "--prompt", "é")
    assert (code, out) == (2, "")
    assert "does not know ['é']" in err
