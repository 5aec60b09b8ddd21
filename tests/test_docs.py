"""The pages say what is so: their Python runs, their commands are known, their tables agree."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnx_fold import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The arguments of each call of ``onnx-fold`` in lines of a shell."""
    found = []
    for line in text.splitlines():
        for call in re.split(r"&&|\|", line):
            words = shlex.split(call, comments=True)
            if words[:1] == ["onnx-fold"]:
                found.append(words[1:])
    return found


@pytest.fixture(autouse=True)
def in_a_folder_with_a_model(tmp_path, monkeypatch):
    """The pages call it ``model.onnx``; here it is the one that comes along."""
    shutil.copy(ROOT / "models" / "char-gqa.onnx", tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    yield
    sys.modules.pop("examples.best_conditioned", None)


def run(*pieces: str, **names: object) -> dict[str, object]:
    """Run Python of a page, one piece after another; what it has defined."""
    for piece in pieces:
        exec(compile(piece, "page", "exec"), names)
    return names


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_readme_quick_start():
    (shell,) = [text for text in blocks("README.md", "sh") if "onnx-fold" in text]
    called = commands(shell)
    assert [words[0] for words in called] == ["inspect", "fold", "verify", "bench"]
    for words in called:
        result = CliRunner().invoke(cli.cli, words)
        assert result.exit_code == 0, result.output
    run(*blocks("README.md", "python"))


def test_python_page():
    first, second = blocks("docs/python.md", "python")
    result = run(first)["result"]
    assert Path("report.html").is_file()
    model = ir.load("model.onnx")
    run(second, model=model)
    assert len(model.graph) < len(ir.load("model.onnx").graph)
    assert result.report.saving.share > 0.15


def test_theory_in_numpy():
    (code,) = blocks("docs/theory.md", "python")
    found = run(code)
    assert found["same"] == [True, True, True]
    assert found["removed"] == 64 * 64
    assert len(code.splitlines()) <= 13


def test_theory_names_every_pass():
    text = (ROOT / "docs" / "theory.md").read_text()
    for path in (ROOT / "passes").glob("[a-z]*.py"):
        assert f"(../passes/{path.name})" in text


def test_tutorial():
    found = run(*blocks("docs/tutorial.md", "python"))
    (shown,) = [text for text in blocks("docs/tutorial.md", "text") if "Folded" in text]
    assert shown in str(found["result"].report)


def test_tutorial_builds_the_example():
    text = (ROOT / "examples" / "best_conditioned.py").read_text()
    body = text[text.index("class BestConditionedPass") :]
    assert body in "".join(blocks("docs/tutorial.md", "python"))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_cookbook():
    pytest.importorskip("torch")
    run(*blocks("docs/cookbook.md", "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page):
    """Each command that a page shows, in a block or in a line, has these options."""
    text = page.read_text()
    spans = re.findall(r"(?<!`)`(onnx-fold [a-z][^`]*)`(?!`)", re.sub(r"\s*\n\s*", " ", text))
    for words in commands(
        "\n".join([*re.findall(r"^ *(onnx-fold .*)$", text, re.MULTILINE), *spans])
    ):
        command = cli.cli.commands[words[0]]
        parent = cli.cli.make_context("onnx-fold", [], resilient_parsing=True)
        context = command.make_context(words[0], words[1:], parent, resilient_parsing=True)
        assert not context.args, words
        known = {name for option in command.params for name in option.opts}
        assert {word for word in words if word.startswith("-")} <= {*known, "-"}, words


def test_tables_of_readme_agree_with_the_measured_ones():
    cells = re.findall(r"\d\.\d\dx \(\d\.\d\d-\d\.\d\d\)", (ROOT / "README.md").read_text())
    measured = "".join(
        (ROOT / "docs" / f"{name}.md").read_text() for name in ("speed-cpu", "speed-cuda", "zoo")
    )
    assert len(cells) > 15
    assert all(cell in measured for cell in cells)
