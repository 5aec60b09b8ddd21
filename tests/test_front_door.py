"""What is seen first: ``import onnx_fold``, the version and the help texts."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

import onnx_fold
from onnx_fold import cli

COMMANDS = ("fold", "inspect", "verify", "bench", "export", "presets", "demo")
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "scipy", "torch")


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["fold", "--help"]])
def test_version_and_help_load_nothing_heavy(arguments):
    code = (
        "import atexit, sys; from onnx_fold.cli import main;"
        f" atexit.register(lambda: print([n for n in {HEAVY} if n in sys.modules])); main()"
    )
    assert run(code, *arguments).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted(onnx_fold.__all__))
def test_every_name_is_there_and_is_what_it_says(name):
    assert name in dir(onnx_fold)
    found = getattr(onnx_fold, name)
    assert found.__name__ == name
    assert found.__module__.startswith("onnx_fold.")


def test_names_come_in_any_order():
    code = (
        "import onnx_fold.speed.timing, onnx_fold; from onnx_fold import *;"
        " print(bench is onnx_fold.bench is onnx_fold.speed.timing.bench, callable(fold))"
    )
    assert run(code).strip() == "True True"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'onnx_fold' has no attribute 'folds'"):
        onnx_fold.folds  # noqa: B018


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command):
    text = CliRunner().invoke(cli.cli, [*command, "--help"]).output
    assert "Usage:" in text
    assert "\\" not in text
    assert "\b" not in text
    assert "..." not in text.replace("[ARGS]...", "")


def test_examples_keep_their_lines():
    lines = CliRunner().invoke(cli.cli, ["--help"]).output.splitlines()
    for name in ("demo", "inspect", "fold", "verify", "bench"):
        assert any(line.startswith(f"    onnx-fold {name}") for line in lines)
