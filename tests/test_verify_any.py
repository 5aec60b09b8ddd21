"""Verify as a tool for any two models: other names, other float types, inner values, allclose."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from helpers import model, normal
from onnxruntime.transformers.float16 import convert_float_to_float16

from onnx_fold import cli
from onnx_fold.check.parity import verify
from onnx_fold.errors import UsageError

D = 16
TEXT = (
    "m (float[n, 16] {x}) => (float[n, 16] {y})"
    " {{ {h} = MatMul({x}, A) {k} = Tanh({h}) {y} = MatMul({k}, B) }}"
)
NAMES = {"x": "x", "h": "h", "k": "k", "y": "y"}


def two(noise: float = 0.0, **names: str) -> ir.Model:
    """``x -> MatMul -> h -> Tanh -> k -> MatMul -> y``; ``noise`` is added to the last weight."""
    return model(
        TEXT.format(**NAMES | names),
        A=normal(D, D, seed=1),
        B=normal(D, D, seed=2) + np.float32(noise) * normal(D, D, seed=3),
    )


def halved(keep_io_types: bool = False, noise: float = 0.0) -> ir.Model:
    """Its float16 version, as ONNX Runtime's converter makes it."""
    source = ir.to_proto(two(noise))
    return ir.from_proto(convert_float_to_float16(source, keep_io_types=keep_io_types))


# --- Other names ----------------------------------------------------------------------------------


def test_mapped_names():
    other = two(x="input", y="k", k="y")  # an inner value has the name of the output
    assert "the inputs differ: x became input" in verify(two(), other).reason
    report = verify(two(), other, map={"x": "input", "y": "k"})
    assert report, report.reason
    assert [output.name for output in report.outputs] == ["y"]
    assert not verify(two(), two(1e-2, x="input", y="k", k="y"), map={"x": "input", "y": "k"})
    assert [value.name for value in other.graph.outputs] == ["k"]  # it is as it was


def test_two_names_change_places():
    inner = model("m (float[n, 4] x) => (float[n, 4] y) { h = Neg(x) k = Exp(x) y = Add(h, k) }")
    other = model("m (float[n, 4] x) => (float[n, 4] y) { k = Neg(x) h = Exp(x) y = Add(k, h) }")
    assert not verify(inner, other, at=["h", "k"])
    assert verify(inner, other, at=["h", "k"], map={"h": "k", "k": "h"})


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"yy": "y"}, "the original has no value 'yy'; did you mean 'y'?"),
        ({"y": "A"}, "the folded model has no value 'A'"),
        ({"x": "h", "y": "h"}, "cannot be mapped to one"),
        ({"x": "y"}, "the folded model has an own 'x': map what it is, too"),
    ],
)
def test_names_that_cannot_be_mapped(names, reason):
    with pytest.raises(UsageError) as caught:
        verify(two(), two(), map=names)
    assert reason in str(caught.value)


# --- Inner values ---------------------------------------------------------------------------------


def test_where_two_models_part():
    other = two()
    node = next(each for each in other.graph if each.op_type == "Tanh")
    node.op_type = "Sigmoid"
    report = verify(two(), other, at=["k", "h"])
    assert [(output.name, output.ok) for output in report.outputs] == [
        ("h", True),
        ("k", False),
        ("y", False),
    ]
    assert report.outputs[0].dtype == "FLOAT"
    assert report.reason.startswith("output 'k'")
    assert verify(two(), two(), at="y").outputs[0].name == "y"  # an output is there already


def test_inner_values_are_no_logits():
    """Not even where they are as wide as the vocabulary."""
    text = (
        "m (int64[b, s] ids) => (float[b, s, 16] logits)"
        " { x = Gather(T, ids) h = MatMul(x, A) logits = MatMul(h, B) }"
    )
    source = model(text, T=normal(D, D), A=normal(D, D, seed=1), B=normal(D, D, seed=2))
    inner, logits = verify(source, source, at="h").outputs
    assert inner.top1_agreement is None
    assert logits.top1_agreement == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "double"])
def test_inner_values_of_other_types(dtype):
    kind = ir.DataType[dtype.upper()].numpy()
    weights = {"A": normal(D, D).astype(kind), "B": normal(D, D, seed=1).astype(kind)}
    source = model(TEXT.format(**NAMES).replace("float", dtype), **weights)
    report = verify(source, source, at="h")
    assert [(output.name, output.dtype) for output in report.outputs] == [
        ("h", dtype.upper()),
        ("y", dtype.upper()),
    ]
    assert report


@pytest.mark.parametrize(
    ("after", "name", "reason"),
    [
        ({}, "hh", "the original has no inner value 'hh'; did you mean 'h'?"),
        ({}, "x", "the original has no inner value 'x'"),
        ({"h": "h2"}, "h", "the folded model has no inner value 'h'; did you mean 'h2'?"),
    ],
)
def test_inner_values_that_are_not_there(after, name, reason):
    with pytest.raises(UsageError) as caught:
        verify(two(), two(**after), at=[name])
    assert reason in str(caught.value)


def test_the_inner_value_that_a_layer_makes():
    text = """m (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, W) y = Relu(h) }"""
    source = model(text, W=normal(4, 4))
    source.graph.initializers["W"].name = "layers.0.proj.weight"
    message = r"no inner value 'layers.0.proj'; the layer of that name makes 'h'"
    with pytest.raises(UsageError, match=message):
        verify(source, source, at="layers.0.proj")


def test_an_inner_value_of_another_name():
    assert verify(two(), two(h="h2"), at="h", map={"h": "h2"})


# --- Other float types ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep_io_types", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_model_and_its_float16_version(keep_io_types, turned):
    pair = [two(), halved(keep_io_types)]
    bad = [two(), halved(keep_io_types, noise=0.3)]
    if turned:
        pair, bad = pair[::-1], bad[::-1]
    report = verify(*pair)
    assert not report
    report = verify(*pair, any_float=True)
    (y,) = report.outputs
    assert report, report.reason
    assert (y.judged, y.limit, y.limit_from) == (
        "relative",
        1e-2,
        "float16's, without a yardstick",
    )
    assert 1e-5 < y.relative_error < 1e-3
    assert any("different float types" in note for note in report.notes)
    assert "the rule is the tolerance of the coarser type" in report.notes
    close = verify(*pair, any_float=True, atol=0.1)
    assert close
    assert not any("coarser" in note for note in close.notes)
    assert report.stored is None
    assert not verify(*bad, any_float=True)
    assert not verify(*pair, any_float=True, tolerance=1e-6)


def test_bfloat16_is_emulated():
    weights = {
        name: tensor.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
        for name, tensor in two().graph.initializers.items()
    }
    other = model(TEXT.format(**NAMES).replace("float", "bfloat16"), **weights)
    report = verify(two(), other, any_float=True)
    assert report, report.reason
    assert report.outputs[0].limit == 5e-2
    assert any("rounded to BFLOAT16" in note for note in report.notes)
    assert any("different float types" in note for note in report.notes)


def test_equal_types_are_judged_by_the_ratio():
    report = verify(two(), two(1e-4), any_float=True)
    assert not report
    assert report.outputs[0].error_original is not None
    assert report.notes == verify(two(), two(1e-4)).notes


def test_other_types_than_floats_are_no_matter_of_precision():
    text = "m ({} [n] x) => (int64[n] y) {{ y = Cast<to = 7>(x) }}"
    report = verify(model(text.format("int32")), model(text.format("float")), any_float=True)
    assert "input 'x' was" in report.reason


def test_numbers_that_the_other_type_cannot_hold():
    with pytest.raises(UsageError, match="input 'x' has numbers that FLOAT16 cannot hold"):
        verify(two(), halved(), any_float=True, inputs={"x": np.full((1, D), 1e6, np.float32)})


# --- Allclose -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("close", "ok"),
    [
        ({"atol": 0.11}, True),
        ({"atol": 0.09}, False),
        ({"rtol": 0.3}, True),
        ({"rtol": 0.09}, False),
        ({"atol": 0.05, "rtol": 0.12}, True),
    ],
)
def test_allclose(close, ok):
    """``y`` is 0.1 off everywhere, where the original is 1 or 0.5."""
    text = "m (float[n, 2] x) => (float[n, 2] y) { z = Mul(x, zero) y = Add(z, k) }"
    zero, k = np.zeros(2, np.float32), np.array([1, 0.5], np.float32)
    report = verify(
        model(text, zero=zero, k=k), model(text, zero=zero, k=k + np.float32(0.1)), **close
    )
    a, b = k, k + np.float32(0.1)
    assert report.ok == ok == np.allclose(b, a, **{"atol": 0, "rtol": 0, **close})
    (y,) = report.outputs
    assert y.judged == "element"
    assert y.error_original is None
    assert y.margin == pytest.approx(y.max_abs_error / y.limit)
    assert any("the rule is NumPy's allclose" in note for note in report.notes)
    if not ok:
        assert "difference of the worst element 1.00e-01 is over the limit" in report.reason


def test_allclose_of_equal_models():
    (y,) = verify(two(), two(), atol=0).outputs
    assert (y.ok, y.margin) == (True, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"atol": -1.0},
        {"rtol": float("nan")},
        {"atol": 1e-3, "tolerance": 1e-3},
        {"atol": 1e-3, "greedy": 3},
        {"any_float": True, "greedy": 3},
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(UsageError):
        verify(two(), two(), **options)


# --- Where inputs lie -----------------------------------------------------------------------------


def positive(operator: str) -> ir.Model:
    """A layer behind ``operator``: Relu and Identity agree where no input is negative."""
    text = f"m (float[n, 16] x) => (float[n, 16] y) {{ h = {operator}(x) y = MatMul(h, A) }}"
    return model(text, A=normal(D, D))


def test_ranges_of_inputs(tmp_path):
    pair = positive("Relu"), positive("Identity")
    assert not verify(*pair)
    assert verify(*pair, ranges={"x": (0, 255)})
    with pytest.raises(UsageError, match="ranges are for random inputs"):
        verify(*pair, ranges={"x": (0, 1)}, inputs={"x": np.ones((1, D), np.float32)})
    with pytest.raises(UsageError, match="unknown input 'z'"):
        verify(*pair, ranges={"z": (0, 1)})
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, each in zip(paths, pair, strict=True):
        ir.save(each, path)
    arguments = ["verify", *map(str, paths), "--range"]
    for text, code in {"x=0:255": 0, "x=-1:1": 1, "x=0": 2, "0:1": 2}.items():
        done = CliRunner().invoke(cli.cli, [*arguments, text])
        assert done.exit_code == code, done.output
    arguments = ["bench", *map(str, paths), "--repeats", "4", "--warmup", "0", "--range", "x=0:1"]
    assert CliRunner().invoke(cli.cli, arguments).exit_code == 0


# --- The command line -----------------------------------------------------------------------------


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ir.save(two(), "a.onnx")
    ir.save(two(x="input"), "b.onnx")
    arguments = ["verify", "a.onnx", "b.onnx", "--map", "x=input", "--at", "h", "--at", "k"]
    done = CliRunner().invoke(cli.cli, arguments)
    assert done.exit_code == 0, done.output
    assert "a.onnx, b.onnx: relative error against a wider reference" in done.output
    done = CliRunner().invoke(cli.cli, [*arguments, "--atol", "1e-3", "--rtol", "1e-3", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["names"] == ["a.onnx", "b.onnx"]
    assert [each["name"] for each in data["outputs"]] == ["h", "k", "y"]
    ir.save(halved(), "half.onnx")
    arguments = ["verify", "a.onnx", "half.onnx", "--any-float"]
    assert CliRunner().invoke(cli.cli, arguments).exit_code == 0
    assert CliRunner().invoke(cli.cli, arguments[:-1]).exit_code == 1
    for bad in ("x", "x=", "x=a=b"):
        assert (
            CliRunner().invoke(cli.cli, ["verify", "a.onnx", "b.onnx", "--map", bad]).exit_code == 2
        )


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a.onnx", "b.onnx"), ("a.onnx", "b.onnx")),
        (("old/a.onnx", "new/b.onnx"), ("a.onnx", "b.onnx")),
        (("old/a.onnx", "new/a.onnx"), ("original", "folded")),
        (("a.onnx", "a-name-that-is-too-long.onnx"), ("original", "folded")),
    ],
)
def test_columns_are_named_by_the_files(paths, names, tmp_path):
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        ir.save(two(), tmp_path / path)
    assert verify(*(tmp_path / path for path in paths)).names == names
    assert verify(str(tmp_path / paths[0]), two()).names == ("original", "folded")
