"""Damaged files end with an exit code and a sentence; ``make fuzz`` tries many more of them."""

import os
from pathlib import Path

import mutate
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import graph, normal
from test_cli import run  # noqa: F401

import onnx_fold
from onnx_fold import cli
from onnx_fold.errors import InvalidModelError

BUDGET = 30
EXAMPLES = int(os.environ.get("ONNX_FOLD_FUZZ", "0"))


def test_any_mutant():
    seeds = list(range(EXAMPLES or BUDGET))
    if EXAMPLES:  # elsewhere each time
        seeds = [int(seed) for seed in np.random.default_rng().integers(2**31, size=EXAMPLES)]
    _, failures, _ = mutate.run_all(seeds)
    assert not failures


def model(**notes: str) -> onnx.ModelProto:
    made = ir.to_proto(
        graph(
            "(float[n, 4] x) => (float[n, 4] y) { p = MatMul(x, P) y = MatMul(p, M) }",
            P=normal(4, 4),
            M=normal(4, 4, seed=1),
        )
    )
    for node in made.graph.node:
        for key, value in notes.items():
            node.metadata_props.add(key=key.replace("__", "."), value=value)
    return made


@pytest.mark.parametrize(
    "scopes",
    [
        "[",
        "['a",
        "__import__('os')",
        "1 +",
        "\0",
        "[1, 2, 3]",
        "{'a': 'b'}",
        "['', 'x.q', 'x.q.w']",
    ],
)
def test_metadata_is_text_and_no_program(scopes):
    result = onnx_fold.fold(model(pkg__torch__onnx__name_scopes=scopes))
    assert result.report.folded


def damaged(old: bytes, new: bytes) -> Path:
    """A file in which bytes are replaced by as many others."""
    assert len(old) == len(new)
    made = model(note="twelve bytes")
    made.graph.doc_string = made.producer_name = "for people"
    data = made.SerializeToString()
    assert old in data
    path = Path("m.onnx")
    path.write_bytes(data.replace(old, new))
    return path


def test_notes_that_are_no_text_are_not_fatal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for old, new in ((b"for people", b"f\xfcr people"), (b"twelve bytes", b"zw\xf6lf bytes.")):
        assert onnx_fold.fold(damaged(old, new), output="f.onnx").report.folded
        onnx.checker.check_model("f.onnx")


def test_a_name_that_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidModelError, match="a name is no text: b'Mat"):
        onnx_fold.inspect(damaged(b"MatMul", b"MatM\xfcl"))


def attribute(**fields) -> onnx.ModelProto:
    made = model()
    node = made.graph.node.add(op_type="Softmax", input=["p"], output=["q"])
    made.graph.node[1].input[0] = "q"
    made.graph.node.insert(1, made.graph.node.pop())
    node = made.graph.node[1]
    node.attribute.add(name="axis", **fields)
    return made


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"i": 1}, "attribute 'axis' has no type that is known"),
        ({"i": 1, "type": 1}, "attribute 'axis' is not of the type that it says"),
        ({"type": 2}, "attribute 'axis' is not of the type that it says"),
        ({"i": 1, "ints": [1], "type": 2}, "attribute 'axis' is not of the type that it says"),
    ],
)
def test_attributes_of_another_type(fields, reason):
    with pytest.raises(InvalidModelError, match=reason):
        onnx_fold.inspect(attribute(**fields))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.dims.append(-1), r"'P' has an impossible shape: \[4, 4, -1\]"),
        (lambda t: t.dims.extend([2**40, 2**40]), "'P' has an impossible shape"),
        (lambda t: t.dims.append(9), r"'P' has 64 bytes, but its shape \[4, 4, 9\] takes 576"),
        (lambda t: setattr(t, "raw_data", bytes(65)), "'P' has 65 bytes"),
        (lambda t: setattr(t, "data_type", 7), "'P' has 64 bytes, .* takes 128"),
        (lambda t: t.ClearField("raw_data"), "'P' has 0 elements, .* takes 16"),
        (lambda t: setattr(t, "data_type", 99), "'P' is of the unknown type 99"),
    ],
)
def test_tensors_that_cannot_be(change, reason):
    made = model()
    change(made.graph.initializer[0])
    with pytest.raises(InvalidModelError, match=reason):
        onnx_fold.inspect(made)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: g.node[1].output.append("p"), "'p' is redeclared"),
        (lambda g: setattr(g.output[0], "name", "z"), "nothing writes the output 'z'"),
    ],
)
def test_values_that_are_not_written_once(change, reason):
    made = model()
    change(made.graph)
    with pytest.raises(InvalidModelError, match=reason):
        onnx_fold.inspect(made)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_call_with_more_than_the_function_takes(kind):
    made = mutate.function()
    getattr(made.graph.node[0], kind).append("z" if kind == "output" else "x")
    with pytest.raises(InvalidModelError, match="a node f does not fit the function"):
        onnx_fold.inspect(made)


def test_a_device_that_is_not_known():
    made = model()
    made.graph.node[0].device_configurations.add()
    with pytest.raises(InvalidModelError, match="MatMul has a device that is not known"):
        onnx_fold.inspect(made)


def test_an_error_that_nobody_expected(tmp_path, monkeypatch, run):  # noqa: F811
    """With a model that is valid it is an error of the program: the library raises, a sentence."""
    monkeypatch.chdir(tmp_path)
    onnx.save(model(), "m.onnx")

    def fail(*_, **__):
        raise KeyError("x\ny")

    monkeypatch.setattr("onnx_fold.pipeline.find_quantised", fail)
    with pytest.raises(KeyError):
        onnx_fold.inspect("m.onnx")
    code, _, err = run("inspect", "m.onnx")
    assert code == cli._UNEXPECTED
    assert err.startswith("error: unexpected KeyError in test_mutate.py, line ")
    assert err.count("\n") == 1


def test_an_error_that_nobody_expected_in_an_invalid_model(monkeypatch):
    made = model()
    made.graph.node[0].op_type = "NoSuchOperator"
    monkeypatch.setattr("onnx_fold.pipeline.find_quantised", lambda graph: 1 / 0)
    with pytest.raises(InvalidModelError, match=r"is not a valid ONNX model: .*NoSuchOperator"):
        onnx_fold.inspect(made)


def test_verify_and_bench_say_that_signatures_differ(tmp_path, monkeypatch, run):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    other = model()
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    onnx.save(model(), "m.onnx")
    onnx.save(other, "o.onnx")
    code, out, _ = run("verify", "m.onnx", "o.onnx")
    assert code == 1
    assert "the inputs differ: x became z" in out
    code, _, err = run("bench", "m.onnx", "o.onnx")
    assert code == 2
    assert "these are not two versions of one model: the inputs differ: x became z" in err


@pytest.mark.parametrize("seed", [103991, 105081, 106939, 107796])
def test_mutants_that_once_got_through(seed, tmp_path):
    """A Transpose of another rank, a body that is a reference, line ends in names."""
    mutate.run_mutant(seed, tmp_path)


def test_an_attribute_that_refers_to_a_function_outside_of_one():
    proto = ir.to_proto(graph("(float[2] x) => (float[2] y) { y = Softmax<axis = 0>(x) }"))
    proto.graph.node[0].attribute[0].ref_attr_name = "axis"
    with pytest.raises(InvalidModelError, match="refers to one of a function, but is in none"):
        onnx_fold.inspect(proto)


def test_a_message_is_one_line():
    assert str(InvalidModelError("cannot read 'a\n\tb\x7f\udc80é'")) == (
        "cannot read 'a\\n\\tb\\x7f\\udc80é'"
    )
