"""What a release says of itself agrees with itself."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import graph, normal
from wheel import NEEDED, faults

import onnx_fold
from onnx_fold.base.schema import SCHEMA_VERSION

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "report-schema.md").read_text()


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project["version"] == onnx_fold.__version__ == cited[1]


def test_links_between_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_templates_are_packaged():
    templates = {path.name for path in (ROOT / "onnx_fold" / "report" / "templates").iterdir()}
    assert {"content.html", "page.html", "parts.html", "drawing.svg", "style.css"} == templates
    assert not faults([*NEEDED, "onnx_fold-0.1.0.dist-info/METADATA"])
    assert faults([*NEEDED, "tests/test_cli.py"])
    assert faults([])


# --- Reports as JSON ------------------------------------------------------------------------------


def keys(data: object) -> set[str]:
    """All names in ``data`` but those that a model or a machine gives."""
    if isinstance(data, list):
        return set().union(*map(keys, data))
    if not isinstance(data, dict):
        return set()
    own = {"slower_on", "taken_back", "old_data", "failed", "unproved", "opsets", "versions"}
    return {*data}.union(*(keys(value) for name, value in data.items() if name not in own))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    weights = {"P": normal(8, 8), "M": normal(8, 9, seed=1)}
    text = "(float[n, 8] x) => (float[n, 9] y) { p = MatMul(x, P) y = MatMul(p, M) }"
    model = graph(text, **weights)
    result = onnx_fold.fold(model)
    return {
        "fold": result.report,
        "inspect": onnx_fold.inspect(model),
        "verify": onnx_fold.verify(model, result.model),
        "bench": onnx_fold.bench(model, result.model, repeats=2, tokens=2, warmup=0, profile=True),
    }


@pytest.mark.parametrize("name", ["fold", "inspect", "verify", "bench"])
def test_every_field_of_a_report_is_documented(reports, name):
    data = json.loads(json.dumps(reports[name].to_dict()))
    assert data["schema_version"] == SCHEMA_VERSION
    missing = {key for key in keys(data) if f"`{key}`" not in DOCUMENT}
    assert not missing


def test_every_documented_version_is_this_one():
    assert f"`schema_version` is {SCHEMA_VERSION}" in DOCUMENT


@pytest.mark.parametrize("name", ["fold", "inspect", "verify", "bench"])
def test_reports_print_as_tables_and_have_a_short_name(reports, name):
    report = reports[name]
    assert len(str(report).splitlines()) > 1
    assert "\x1b" not in str(report)
    assert len(repr(report).splitlines()) == 1
    assert len(repr(report)) < 120
    assert all(field.name for field in fields(report))
