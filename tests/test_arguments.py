"""One thing where several may be given is one thing, not its letters."""

import inspect

import pytest
from helpers import graph, normal

import onnx_fold
from onnx_fold import cli
from onnx_fold.base.arguments import several
from onnx_fold.errors import UsageError


def model():
    text = "(float[n, 4] x) => (float[n, 4] y) { p = MatMul(x, P) y = MatMul(p, M) }"
    return graph(text, P=normal(4, 4), M=normal(4, 4, seed=1))


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("merge", ("merge",)),
        (3, (3,)),
        ({"n": 3}, ({"n": 3},)),
        (["a", "b"], ("a", "b")),
        ((), ()),
        (iter([1, 2]), (1, 2)),
    ],
)
def test_several(given, items):
    assert several(given) == items


@pytest.mark.parametrize("function", [onnx_fold.fold, onnx_fold.inspect])
def test_names_of_passes_and_layers(function):
    def strategies(**options) -> set[str]:
        result = function(model(), **options)
        report = result.plan if function is onnx_fold.inspect else result.report
        return {stream.folded.strategy for stream in report.folded}

    assert strategies(only="merge") == {"merge"}
    assert "merge" not in strategies(skip="merge")
    assert not strategies(protect="P")
    for option in ("only", "skip"):
        with pytest.raises(UsageError, match="unknown pass 'merg'"):
            strategies(**{option: "merg"})
    with pytest.raises(UsageError, match="nothing in the model is called 'head'"):
        strategies(protect="head")


def test_sizes():
    report = onnx_fold.verify(model(), model(), shapes={"n": 3})
    assert report.shapes == ["n=3"]
    with pytest.raises(UsageError, match="unknown dimension 'm'"):
        onnx_fold.verify(model(), model(), shapes={"m": 3})
    report = onnx_fold.bench(model(), model(), batch=(1,), prefill=4, repeats=2, tokens=2)
    assert report.phases


OTHERWISE = {"verify", "progress"}
"""Options that are no plain value on the command line: --no-verify, the bar."""


PAIRS = "verify", "bench"


@pytest.mark.parametrize("name", ["fold", "inspect", "verify", "bench"])
def test_defaults_are_those_of_the_command_line(name):
    known = inspect.signature(getattr(onnx_fold, name)).parameters
    files = ["a", "b"][: 1 + (name in PAIRS)]
    parent = cli.cli.make_context("onnx-fold", [name, *files])
    given = cli.cli.commands[name].make_context(name, files, parent=parent).params
    for option in given.keys() & known.keys() - OTHERWISE - {"model", "original", "folded"}:
        mine, theirs = several(known[option].default), several(given[option])
        assert [each for each in mine if each] == [each for each in theirs if each], option
