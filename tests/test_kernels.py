"""Kernels of the reference compute what ONNX Runtime computes, in any shape."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_close, feeds, graph, normal, outputs
from onnx.reference import ReferenceEvaluator
from scipy import special

from onnx_fold.check import kernels
from onnx_fold.check.runner import evaluator

CONVS = {
    "plain": ("", (6, 4, 3, 3), "h, w"),
    "pads": ("pads = [1, 0, 2, 3]", (6, 4, 3, 2), "h, w"),
    "strides": ("strides = [2, 3], pads = [1, 1, 1, 1]", (6, 4, 3, 3), "h, w"),
    "dilations": ("dilations = [2, 1]", (6, 4, 2, 3), "h, w"),
    "groups": ("group = 2", (6, 2, 3, 3), "h, w"),
    "depthwise": ("group = 4, pads = [1, 1, 1, 1]", (8, 1, 3, 3), "h, w"),
    "same upper": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (6, 4, 2, 4), "h, w"),
    "same lower": ('auto_pad = "SAME_LOWER"', (6, 4, 2, 4), "h, w"),
    "valid": ('auto_pad = "VALID"', (6, 4, 2, 4), "h, w"),
    "one axis": ("pads = [2, 1]", (6, 4, 3), "h"),
    "three axes": ("", (6, 4, 2, 1, 3), "h, w, d"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_conv(kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 500)  # some rows at a time
    attributes, shape, sizes = CONVS[kind]
    check_convolution(f"Conv<{attributes}>", shape, sizes, biases=shape[0] * bias)


def check_convolution(name: str, shape: tuple[int, ...], sizes: str, *, biases: int) -> None:
    """The operator ``name<attributes>`` makes of four channels what ONNX Runtime does."""
    held = {"k": normal(*shape)} | ({"b": normal(biases, seed=1)} if biases else {})
    made = ", ".join(f"{size}2" for size in sizes.split(", "))
    model = graph(
        f"(float[n, 4, {sizes}] x) => (float[n, m, {made}] y) {{ y = {name}"
        f"(x, k{', b' if biases else ''}) }}".replace("<>", ""),
        **held,
    )
    inputs = feeds(model, {"n": 2, "h": 9, "w": 8, "d": 5})
    assert_close(evaluator(model)(inputs)["y"], outputs(model, **inputs)["y"])


TRANSPOSED = {
    "plain": ("", (4, 6, 3, 2), "h, w"),
    "strides": ("strides = [2, 3]", (4, 6, 3, 2), "h, w"),
    "a step past the window": ("strides = [3, 4]", (4, 6, 2, 2), "h, w"),
    "pads": ("strides = [2, 2], pads = [1, 0, 2, 1]", (4, 6, 3, 4), "h, w"),
    "output padding": ("strides = [2, 3], output_padding = [1, 2]", (4, 6, 3, 3), "h, w"),
    "output shape": ("strides = [2, 2], output_shape = [18, 16]", (4, 6, 3, 3), "h, w"),
    "same upper": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (4, 6, 3, 3), "h, w"),
    "same lower": ('auto_pad = "SAME_LOWER", strides = [2, 2]', (4, 6, 3, 3), "h, w"),
    "dilations": ("dilations = [2, 1]", (4, 6, 2, 3), "h, w"),
    "groups": ("group = 2, strides = [2, 2]", (4, 3, 2, 2), "h, w"),
    "one axis": ("strides = [4], pads = [2, 1]", (4, 6, 8), "h"),
    "three axes": ("strides = [1, 2, 1]", (4, 6, 1, 2, 3), "h, w, d"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_conv_transpose(kind: str, bias: bool) -> None:
    attributes, shape, sizes = TRANSPOSED[kind]
    check_convolution(f"ConvTranspose<{attributes}>", shape, sizes, biases=6 * bias)


POOLS = {
    "plain": "kernel_shape = [2, 3]",
    "strides": "kernel_shape = [3, 2], strides = [2, 3]",
    "pads": "kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]",
    "uneven pads": "kernel_shape = [2, 3], pads = [0, 1, 1, 2]",
    "dilations": "kernel_shape = [2, 2], dilations = [2, 3]",
    "ceil": "kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1",
    "ceil and pads": "kernel_shape = [3, 3], strides = [3, 3], pads = [1, 1, 1, 1], ceil_mode = 1",
    "ceil past the end": "kernel_shape = [1, 1], strides = [3, 4], ceil_mode = 1",
    "same upper": 'kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_UPPER"',
    "same lower": 'kernel_shape = [2, 2], auto_pad = "SAME_LOWER"',
}


@pytest.mark.parametrize("kind", POOLS)
def test_max_pool(kind: str) -> None:
    text = f"(float[n, 4, h, w] x) => (float[n, 4, p, q] y) {{ y = MaxPool<{POOLS[kind]}>(x) }}"
    model = graph(text)
    for sizes in ({"n": 2, "h": 9, "w": 8}, {"n": 1, "h": 8, "w": 11}):
        inputs = feeds(model, sizes)
        expected = outputs(model, **inputs)["y"]
        np.testing.assert_array_equal(evaluator(model)(inputs)["y"], expected)


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 18])
def test_batch_normalization_has_given_statistics(opset: int) -> None:
    text = "(float[n, 4, h] x) => (float[n, 4, h] y) { y = BatchNormalization(x, s, b, m, v) }"
    held = {name: normal(4, seed=seed) for seed, name in enumerate("sbm")}
    model = graph(text, opset, **held, v=np.abs(normal(4, seed=5)))
    inputs = feeds(model, {"n": 2, "h": 9})
    assert_close(evaluator(model)(inputs)["y"], outputs(model, **inputs)["y"])


def test_erf_is_as_wide_as_its_input() -> None:
    model = graph("(double[n] x) => (double[n] y) { y = Erf(x) }")
    x = np.linspace(-3.0, 3.0, 50)
    np.testing.assert_array_equal(evaluator(model)({"x": x})["y"], special.erf(x))


@pytest.mark.parametrize("how", ["none", "tanh"])
def test_gelu_is_as_wide_as_its_input(how: str) -> None:
    text = f'(double[n] x) => (double[n] y) {{ y = Gelu<approximate = "{how}">(x) }}'
    x = np.linspace(-3.0, 3.0, 50)
    inner = (
        special.erf(x / np.sqrt(2))
        if how == "none"
        else np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    )
    found = evaluator(graph(text, opset=20))({"x": x})["y"]
    np.testing.assert_allclose(found, x * (1 + inner) / 2, rtol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(3, 70, 2), (2, 40, 1), (3, 1, 2)])
def test_gather_elements(axis: int, shape: tuple[int, ...]) -> None:
    """Of an axis longer than onnx.reference takes, from both ends, from a part of the others."""
    model = graph(
        "(float[a, b, c] x, int64[d, e, f] i) => (float[d, e, f] y)"
        f" {{ y = GatherElements<axis = {axis}>(x, i) }}"
    )
    x = normal(3, 70, 2)
    size = x.shape[axis]
    i = np.random.default_rng(0).integers(-size, size, shape)
    found = evaluator(model)({"x": x, "i": i})["y"]
    np.testing.assert_array_equal(found, outputs(model, x=x, i=i)["y"])


def test_values_are_dropped_behind_their_last_reader() -> None:
    """And what bodies of control flow read is kept."""
    text = (
        "(float[n] x, bool c) => (float[n] y, float[n] a) { a = Neg(x) b = Abs(a) y = Add(b, a) }"
    )
    model = graph(text)
    inputs = {"x": normal(5), "c": np.array(True)}
    found = kernels.run(kernels.evaluator(ir.to_proto(model)), inputs)
    np.testing.assert_array_equal(found[0], np.abs(inputs["x"]) - inputs["x"])
    branch = onnx.parser.parse_graph("then () => (float[n] o) { o = Neg(a) }")
    other = onnx.parser.parse_graph("else () => (float[n] o) { o = Abs(a) }")
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)
    proto = ir.to_proto(model)
    del proto.graph.node[1:]
    proto.graph.node.append(node)
    expected = ReferenceEvaluator(proto).run(None, inputs)
    found = kernels.run(kernels.evaluator(proto), inputs)
    np.testing.assert_array_equal(found[0], expected[0])


def test_batch_normalization_that_trains() -> None:
    text = """
        (float[n, 4, h] x) => (float[n, 4, h] y, float[4] p, float[4] q)
        { y, p, q = BatchNormalization<training_mode = 1, momentum = 0.7>(x, s, b, m, v) }
    """
    held = {name: normal(4, seed=seed) for seed, name in enumerate("sbm")}
    model = graph(text, 15, **held, v=np.abs(normal(4, seed=5)))
    inputs = feeds(model, {"n": 2, "h": 9})
    expected = outputs(model, **inputs)
    for name, found in evaluator(model)(inputs).items():
        assert_close(found, expected[name])


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(1, 1, 2, 3), (1, 1, 1.5, 0.5)])
def test_resize_of_opset_10(mode: str, scales: tuple[float, ...]) -> None:
    text = f'(float[n, 4, h, w] x) => (float[n, 4, p, q] y) {{ y = Resize<mode = "{mode}">(x, s) }}'
    model = graph(text, 10, s=np.array(scales, np.float32))
    inputs = feeds(model, {"n": 2, "h": 4, "w": 6})
    assert_close(evaluator(model)(inputs)["y"], outputs(model, **inputs)["y"])


VECTORS = {
    "OneHot": ("int64[n, m] x", "float[n, p, m] y", "OneHot<axis = 1>(x, d, v)", "d"),
    "CumSum": ("float[n, m] x", "float[n, m] y", "CumSum<reverse = 1>(x, a)", "a"),
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_may_be_a_vector_of_one(kind: str, shape: tuple[int, ...]) -> None:
    """As PaddlePaddle writes it, and ONNX Runtime takes it."""
    read, made, call, name = VECTORS[kind]
    held = {name: np.full(shape, 5 if kind == "OneHot" else -1, np.int64)}
    if kind == "OneHot":
        held["v"] = np.array([0.5, 2.0], np.float32)
    model = graph(f"({read}) => ({made}) {{ y = {call} }}", **held)
    x = np.array([[0, 4, -2], [1, -5, 3]]) if kind == "OneHot" else normal(2, 3)
    found = evaluator(model)({"x": x})["y"]
    np.testing.assert_array_equal(found, outputs(model, x=x)["y"])


def test_scatter_of_opset_10() -> None:
    text = "(float[n, m] x, int64[k, m] i) => (float[n, m] y) { y = Scatter<axis = 0>(x, i, u) }"
    model = graph(text, 10, u=normal(2, 3, seed=1))
    x, i = normal(4, 3), np.array([[0, 2, 1], [3, 0, 2]])
    found = evaluator(model)({"x": x, "i": i})["y"]
    np.testing.assert_array_equal(found, outputs(model, x=x, i=i)["y"])
