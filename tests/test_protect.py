"""What stays as it is: by the name of an initializer, node, value or layer, or by a pattern."""

import onnx_ir as ir
import pytest
from helpers import folded, graph, normal, refused

import onnx_fold
from onnx_fold.engine.protect import known_names, matching
from onnx_fold.errors import UsageError
from onnx_fold.models.export import export

D = 6


def two_blocks() -> ir.Model:
    """``x -> a.0 -> a.1 -> Tanh -> b.0 -> b.1 -> y``; a pair is a fold of ``D * D`` weights."""
    names = "a.0", "a.1", "b.0", "b.1"
    model = graph(
        f"(float[n, {D}] x) => (float[n, {D}] y)"
        " { h = MatMul(x, A) k = MatMul(h, B) t = Tanh(k) p = MatMul(t, C) y = MatMul(p, E) }",
        **{key: normal(D, D, seed=seed) for seed, key in enumerate("ABCE")},
    )
    for key, name in zip("ABCE", names, strict=True):
        model.graph.initializers[key].name = f"{name}.weight"
    return model


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("h", D * D),  # a value
        ("a.0.weight", D * D),  # an initializer
        ("a.1", D * D),  # a layer, as the report calls it
        ("a.*", D * D),  # a module
        ("*.1", 0),
        ("?.0.weight", 0),
        ("x", 2 * D * D),  # where no stream is
    ],
)
def test_what_a_name_means(name, removed):
    model = two_blocks()
    if removed:
        folded(model, removed, protect=name)
    else:
        assert "is protected" in refused(model, protect=name)


def test_a_name_is_not_a_pattern_where_something_is_spelled_so():
    assert matching("a[0]", {"a[0]", "a0"}) == {"a[0]"}
    assert matching("a[0]", {"a0"}) == {"a0"}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.0.weigth", "did you mean 'a.0.weight'?"),
        ("b.1.wieght", "did you mean 'b.1.weight'?"),
        ("a", "all of that module is 'a.*'"),
        ("c.*", "called 'c.*'"),
        ("d.1.*", "did you mean 'b.1.*'?"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, advice):
    with pytest.raises(UsageError) as caught:
        onnx_fold.inspect(two_blocks(), protect=["a.0", name])
    assert f"nothing in the model is called '{name}'" in str(caught.value)
    assert advice in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_every_layer_of_a_report_can_be_named(exporter, tmp_path):
    model = export("tiny-gqa", tmp_path / "m.onnx", layers=1, exporter=exporter)
    model = ir.load(tmp_path / "m.onnx")
    report = onnx_fold.inspect(model, objective="size").plan
    layers = {layer.name for stream in report.streams for layer in stream.layers}
    assert layers <= known_names(model)
    assert report.folded
    assert not onnx_fold.inspect(model, objective="size", protect="*").plan.folded


def test_a_layer_in_a_function_can_be_named():
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": 18, "f": 1]>
        m (float[n, {D}] x) => (float[n, {D}] y) {{ p = f.proj(x, P) y = MatMul(p, M) }}
        <domain: "f", opset_import: ["": 18]> proj (x, w) => (y) {{ y = MatMul(x, w) }}""",
        initializers=[ir.tensor(normal(D, D, seed=n), name=name) for n, name in enumerate("PM")],
    )
    (stream,) = onnx_fold.inspect(model, objective="size").plan.folded
    for layer in stream.layers:
        assert not onnx_fold.inspect(model, objective="size", protect=layer.name).plan.folded
