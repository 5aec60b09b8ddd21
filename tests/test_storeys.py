"""The storeys of the house: imports go downward only, and no folder outgrows a glance."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STOREYS = (
    *("base", "algebra", "files", "graph", "streams", "rewriting", "engine"),
    *("runtime", "check", "speed", "report", "models", "passes", "integrations"),
)
"""From the ground up. What lies beside these folders stands as high as the last, but for errors."""

GROUND, TOP = -1, len(STOREYS) - 1
LARGEST = 10


def folder_of(storey: str) -> Path:
    return ROOT / storey if storey in ("models", "passes") else ROOT / "onnx_fold" / storey


def modules() -> Iterator[tuple[str, Path]]:
    for storey in STOREYS:
        for path in folder_of(storey).glob("*.py"):
            yield f"onnx_fold.{storey}.{path.stem}", path
    for path in (ROOT / "onnx_fold").glob("*.py"):
        yield f"onnx_fold.{path.stem}", path


def height(module: str) -> int:
    """On which storey a module stands."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in STOREYS:
        return STOREYS.index(parts[1])
    return GROUND if parts[1:2] == ["errors"] else TOP


def imported(path: Path) -> Iterator[str]:
    """What a module imports of this project, at its head, in a function or for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnx_fold":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.startswith("onnx_fold"))


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_imports_go_downward(module, path):
    above = [name for name in imported(path) if height(name) > height(module)]
    assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("storey", STOREYS)
def test_a_folder_can_be_taken_in_at_a_glance(storey):
    folder = folder_of(storey)
    assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= LARGEST
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_every_folder_is_a_storey():
    found = {path.parent.name for path in (ROOT / "onnx_fold").glob("*/*.py")}
    assert found == {*STOREYS} - {"models", "passes"}


def test_the_map_shows_every_storey():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert all(f"    {storey}[" in page for storey in STOREYS)
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", page):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "onnx_fold")), path
