"""Linear paths from one value to one sum become one layer: numbers, structure, refusal."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from helpers import (
    assert_same_function,
    fold,
    folded,
    graph,
    normal,
    operators,
    proto,
    refused,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.transformers.float16 import convert_float_to_float16

import onnx_fold

IMAGE = "(float[n, 8, h, w] x) => (float[n, 8, a, b] z)"
ROWS = "(float[n, t, 16] x) => (float[n, t, 16] z)"


def norm(width: int, seed: int) -> dict[str, np.ndarray]:
    """Gain, bias, mean and variance of a BatchNorm, ``g0, b0, m0, v0`` for seed 0."""
    generator = np.random.default_rng(seed)
    gain, bias, mean = generator.standard_normal((3, width)).astype(np.float32)
    variance = generator.uniform(0.5, 2.0, width).astype(np.float32)
    return {f"g{seed}": gain, f"b{seed}": bias, f"m{seed}": mean, f"v{seed}": variance}


def bn(seed: int) -> str:
    return f"g{seed}, b{seed}, m{seed}, v{seed}"


# --- Convolutions ---------------------------------------------------------------------------------


def test_repvgg_block_is_one_convolution() -> None:
    """3x3 and 1x1 convolutions and the identity, each with a BatchNorm: 8·8·9 + 8 are left."""
    source = graph(
        f"{IMAGE} {{ a0 = Conv<pads = [1, 1, 1, 1]>(x, K) a = BatchNormalization(a0, {bn(0)})"
        f" c0 = Conv(x, P) c = BatchNormalization(c0, {bn(1)}) i = BatchNormalization(x, {bn(2)})"
        " s = Add(a, c) t = Add(s, i) z = Relu(t) }",
        K=normal(8, 8, 3, 3),
        P=normal(8, 8, 1, 1, seed=1),
        **(norm(8, 0) | norm(8, 1) | norm(8, 2)),
    )
    result = folded(source, 8 * 8 + 3 * 4 * 8 - 8)
    assert operators(result.model) == ["Conv", "Relu"]
    assert weights(result.model) == 8 * 8 * 9 + 8
    (stream,) = result.report.folded
    assert stream.folded is not None
    assert stream.folded.nodes_added == -6


def test_deep_float16_networks_fold_in_full() -> None:
    """A CPU computes float16 in float32, but the rounding of deep folded weights adds up."""
    nodes, held = [], dict[str, np.ndarray]()
    for i in range(16):
        nodes += [
            f"a{i} = Conv<pads = [1, 1, 1, 1]>(x{i}, K{i}) c{i} = Conv(x{i}, P{i})",
            f"s{i} = Add(a{i}, c{i}) x{i + 1} = Relu(s{i})",
        ]
        held |= {f"K{i}": normal(8, 8, 3, 3, seed=i) / 3, f"P{i}": normal(8, 8, 1, 1, seed=i)}
    signature = "(float[n, 8, h, w] x0) => (float[n, 8, a, b] x16)"
    wide = graph(f"{signature} {{ {' '.join(nodes)} }}", **held)
    half = convert_float_to_float16(ir.to_proto(wide))
    result = onnx_fold.fold(half, strict=True)
    assert operators(result.ir) == ["Conv", "Relu"] * 16
    (output,) = result.report.verification.outputs
    assert output.ratio is not None
    assert output.ratio < 3.0
    as_run = onnx_fold.verify(half, result.model, emulate=False).outputs[0]
    assert as_run.ratio is not None
    assert as_run.ratio > 3.0


def test_strided_depthwise_block() -> None:
    """MobileOne's first block: no identity, groups, and a step of 2."""
    source = graph(
        f"{IMAGE} {{ a0 = Conv<pads = [1, 1, 1, 1], strides = [2, 2], group = 8>(x, K)"
        f" a = BatchNormalization(a0, {bn(0)}) c0 = Conv<strides = [2, 2], group = 8>(x, P)"
        f" c = BatchNormalization(c0, {bn(1)}) s = Add(c, a) z = Relu(s) }}",
        K=normal(8, 1, 3, 3),
        P=normal(8, 1, 1, 1, seed=1),
        **(norm(8, 0) | norm(8, 1)),
    )
    result = folded(source)
    assert operators(result.model) == ["Conv", "Relu"]
    assert weights(result.model) == 8 * 9 + 8


def test_fastvit_mixer() -> None:
    """``x + g · (BN(conv(x)) - BN(x))`` is one depthwise convolution."""
    source = graph(
        f"{IMAGE} {{ a0 = Conv<pads = [3, 3, 3, 3], group = 8>(x, K)"
        f" a = BatchNormalization(a0, {bn(0)}) i = BatchNormalization(x, {bn(1)}) s = Sub(a, i)"
        " t = Mul(G, s) u = Add(x, t) z = Relu(u) }",
        K=normal(8, 1, 7, 7),
        G=normal(8, 1, 1, seed=5),
        **(norm(8, 0) | norm(8, 1)),
    )
    result = folded(source)
    assert operators(result.model) == ["Conv", "Relu"]
    assert weights(result.model) == 8 * 49 + 8


def test_repvit_norm_behind_the_sum() -> None:
    source = graph(
        f"{IMAGE} {{ a = Conv<pads = [1, 1, 1, 1], group = 8>(x, K, k) c = Conv<group = 8>(x, P)"
        f" s = Add(a, c) t = Add(s, x) u = BatchNormalization(t, {bn(0)}) z = Relu(u) }}",
        K=normal(8, 1, 3, 3),
        k=normal(8, seed=9),
        P=normal(8, 1, 1, 1, seed=1),
        **norm(8, 0),
    )
    result = folded(source)
    assert operators(result.model) == ["Conv", "Relu"]


@pytest.mark.parametrize(
    ("first", "second", "kernels"),
    [
        ("pads = [2, 2, 2, 2], dilations = [2, 2]", "pads = [0, 0, 0, 0]", ((3, 3), (1, 1))),
        ('auto_pad = "SAME_UPPER"', "pads = [1, 1, 1, 1]", ((2, 2), (3, 3))),
        ("pads = [0, 0, 0, 0]", "pads = [0, 0, 0, 0]", ((3, 3), (3, 3))),
    ],
)
def test_windows_are_put_into_one(
    first: str, second: str, kernels: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    source = graph(
        f"{IMAGE} {{ a = Conv<{first}>(x, K, k) c = Conv<{second}>(x, P, p) s = Add(a, c)"
        " z = Relu(s) }",
        K=normal(8, 8, *kernels[0]),
        k=normal(8, seed=2),
        P=normal(8, 8, *kernels[1], seed=1),
        p=normal(8, seed=3),
    )
    result = folded(source)
    assert_same_function(source, result.model, sizes={"n": 2, "h": 7, "w": 6})
    assert operators(result.model) == ["Conv", "Relu"]


def test_two_windows_that_cross_stay() -> None:
    """1x3 and 3x1 have six positions, the window that holds both has nine."""
    source = graph(
        f"{IMAGE} {{ a = Conv<pads = [0, 1, 0, 1]>(x, K) c = Conv<pads = [1, 0, 1, 0]>(x, P)"
        " s = Add(a, c) z = Relu(s) }",
        K=normal(8, 8, 1, 3),
        P=normal(8, 8, 3, 1, seed=1),
    )
    assert "weights would grow by 192" in refused(source)


def test_of_windows_that_cross_those_in_the_largest_are_one() -> None:
    """1x3 and 1x1 and the identity; what 3x1 makes is added as before."""
    source = graph(
        f"{IMAGE} {{ a = Conv<pads = [0, 1, 0, 1]>(x, K) c = Conv<pads = [1, 0, 1, 0]>(x, P)"
        " e = Conv(x, E) s = Add(c, a) t = Add(s, e) u = Add(t, x) z = Relu(u) }",
        K=normal(8, 8, 1, 3),
        P=normal(8, 8, 3, 1, seed=1),
        E=normal(8, 8, 1, 1, seed=2),
    )
    result = folded(source, 8 * 8)
    assert sorted(operators(result.ir)) == ["Add", "Conv", "Conv", "Relu"]
    assert weights(result.ir) == 2 * 8 * 8 * 3


def test_windows_of_several_dilations_are_one() -> None:
    """UniRepLKNet's dilated branches lie in its large window (X. Ding et al., 2311.15599)."""
    body = [
        f"c{step} = Conv<group = 8, dilations = [{step}, {step}],"
        f" pads = [{step}, {step}, {step}, {step}]>(x, D{step}) s{step} = Add(s{step - 1}, c{step})"
        for step in (1, 2)
    ]
    source = graph(
        f"{IMAGE} {{ s0 = Conv<group = 8, pads = [3, 3, 3, 3]>(x, K) {' '.join(body)}"
        " z = Relu(s2) }",
        K=normal(8, 1, 7, 7),
        D1=normal(8, 1, 3, 3, seed=1),
        D2=normal(8, 1, 3, 3, seed=2),
    )
    result = folded(source, 2 * 8 * 9)
    assert operators(result.ir) == ["Conv", "Relu"]


@pytest.mark.parametrize("groups", [1, 2])
def test_diverse_branch_block(groups: int) -> None:
    """A 1x1 convolution in front of a 3x3 one, and in front of means (2103.13425): one of 3x3.

    The zeros are put around what the first of the two reads, where its bias is as well.
    """
    source = graph(
        f"{IMAGE} {{ k0 = Conv<pads = [1, 1, 1, 1], group = {groups}>(x, K)"
        f" k = BatchNormalization(k0, {bn(0)})"
        f" s0 = Conv<pads = [1, 1, 1, 1], group = {groups}>(x, P, p)"
        f" s1 = Conv<group = {groups}>(s0, S) s = BatchNormalization(s1, {bn(1)})"
        f" a0 = Conv<pads = [1, 1, 1, 1], group = {groups}>(x, A, p)"
        f" a1 = AveragePool<kernel_shape = [3, 3]>(a0) a = BatchNormalization(a1, {bn(2)})"
        " t = Add(k, s) u = Add(t, a) z = Relu(u) }",
        K=normal(8, 8 // groups, 3, 3),
        P=normal(8, 8 // groups, 1, 1, seed=1),
        S=normal(8, 8 // groups, 3, 3, seed=2),
        A=normal(8, 8 // groups, 1, 1, seed=3),
        p=normal(8, seed=4),
        **(norm(8, 0) | norm(8, 1) | norm(8, 2)),
    )
    result = folded(source)
    assert operators(result.ir) == ["Conv", "Relu"]
    assert weights(result.ir) == 8 * 8 * 9 // groups + 8


@pytest.mark.parametrize(
    ("means", "is_map"),
    [
        ("pads = [1, 1, 1, 1], count_include_pad = 1", True),
        ('auto_pad = "SAME_UPPER", count_include_pad = 1', True),
        ("pads = [1, 1, 1, 1]", False),  # fewer numbers at the edges
        ("pads = [1, 1, 1, 1], count_include_pad = 1, ceil_mode = 1", False),
    ],
)
def test_means_beside_a_convolution(means: str, is_map: bool) -> None:
    source = graph(
        f"{IMAGE} {{ k = Conv<pads = [1, 1, 1, 1]>(x, K) p = Conv(x, P)"
        f" a = AveragePool<kernel_shape = [3, 3], {means}>(p) s = Add(k, a) z = Relu(s) }}",
        K=normal(8, 8, 3, 3),
        P=normal(8, 8, 1, 1, seed=1),
    )
    if is_map:
        assert operators(folded(source, 8 * 8).ir) == ["Conv", "Relu"]
    else:
        assert not fold(source, shapes={"n": 2, "h": 6, "w": 5}).report.folded


def test_means_alone_stay() -> None:
    """As a convolution they would be weights, and what is in front of them nine times as many."""
    source = graph(
        f"{IMAGE} {{ p = Conv(x, P) a = AveragePool<kernel_shape = [3, 3]>(p)"
        f" b = BatchNormalization(a, {bn(0)}) z = Relu(b) }}",
        P=normal(8, 8, 1, 1, seed=1),
        **norm(8, 0),
    )
    assert "weights would grow" in refused(source)


def test_zeros_around_a_bias_stay() -> None:
    """Behind a layer with a bias they are not what it makes of zeros."""
    source = graph(
        f"{IMAGE} {{ k = Conv<pads = [1, 1, 1, 1]>(x, K) p = Conv(x, P, p0)"
        " a = Conv<pads = [1, 1, 1, 1]>(p, S) s = Add(k, a) z = Relu(s) }",
        K=normal(8, 8, 3, 3),
        P=normal(8, 8, 1, 1, seed=1),
        S=normal(8, 8, 3, 3, seed=2),
        p0=normal(8, seed=3),
    )
    assert not fold(source, only=["branches"], shapes={"n": 2, "h": 6, "w": 5}).report.folded


def test_branches_of_one_dimension() -> None:
    source = graph(
        "(float[n, 8, t] x) => (float[n, 8, s] z) { a = Conv<pads = [1, 1]>(x, K)"
        f" i = BatchNormalization(x, {bn(0)}) s = Add(a, i) z = Relu(s) }}",
        K=normal(8, 8, 3),
        **norm(8, 0),
    )
    assert operators(folded(source).model) == ["Conv", "Relu"]


def test_convolution_and_batch_norm() -> None:
    """Either order; in front only where no zeros are put around the bias."""
    behind = graph(
        f"{IMAGE} {{ a = Conv<pads = [1, 1, 1, 1]>(x, K) b = BatchNormalization(a, {bn(0)})"
        " z = Relu(b) }",
        K=normal(8, 8, 3, 3),
        **norm(8, 0),
    )
    assert operators(folded(behind, 3 * 8).model) == ["Conv", "Relu"]
    front = "{IMAGE} {{ r = Relu(x) a = BatchNormalization(r, {norm}) z = Conv{pads}(a, K) }}"
    texts = [
        front.format(IMAGE=IMAGE, norm=bn(0), pads=pads) for pads in ("", "<pads = [1, 1, 1, 1]>")
    ]
    held = {"K": normal(8, 8, 3, 3), **norm(8, 0)}
    assert operators(folded(graph(texts[0], **held)).model) == ["Relu", "Conv"]
    assert not fold(graph(texts[1], **held)).report.folded


UP = "(float[n, 8, h, w] x) => (float[n, 4, a, b] z)"


@pytest.mark.parametrize(
    ("groups", "how"),
    [
        (1, "strides = [2, 2]"),
        (1, "strides = [2, 3], pads = [1, 0, 1, 2], output_padding = [1, 2]"),
        (2, "strides = [2, 2], dilations = [2, 1]"),
        (4, "pads = [1, 1, 1, 1]"),
    ],
)
def test_transposed_convolution_and_batch_norm(groups: int, how: str) -> None:
    """U-Nets: behind it the gain is that of its outputs, in front that of what it reads."""
    source = graph(
        f"{UP} {{ r = Relu(x) m = Mul(r, g) t = ConvTranspose<group = {groups}, {how}>(m, K, k)"
        f" b = BatchNormalization(t, {bn(0)}) z = Relu(b) }}",
        K=normal(8, 4 // groups, 3, 3),
        k=normal(4, seed=1),
        g=normal(8, 1, 1, seed=2),
        **norm(4, 0),
    )
    result = folded(source, 8 + 4 * 4)
    assert operators(result.ir) == ["Relu", "ConvTranspose", "Relu"]


@pytest.mark.parametrize(
    "body",
    [
        "m = Add(r, g) t = ConvTranspose<strides = [2, 2]>(m, K) b = Identity(t)",
        "t = ConvTranspose(r, K) e = ConvTranspose(r, L) b = Add(t, e)",
        f"t = ConvTranspose<strides = [2, 2], output_shape = [13, 11]>(r, K)"
        f" b = BatchNormalization(t, {bn(0)})",
        f't = ConvTranspose<auto_pad = "SAME_UPPER", strides = [2, 2]>(r, K)'
        f" b = BatchNormalization(t, {bn(0)})",
    ],
)
def test_other_transposed_convolutions_stay(body: str) -> None:
    """A bias in front is not at every position; two are not added; sizes that are given."""
    held = {"K": normal(8, 4, 3, 3), "L": normal(8, 4, 3, 3, seed=1), "g": normal(8, 1, 1, seed=2)}
    held |= norm(4, 0)
    used = {name: array for name, array in held.items() if re.search(rf"[ (]{name}[,)]", body)}
    source = graph(f"{UP} {{ r = Relu(x) {body} z = Relu(b) }}", **used)
    assert not fold(source, shapes={"n": 2, "h": 6, "w": 5}).report.folded


@pytest.mark.parametrize(
    "behind",
    [
        "m = Mul(g, a) s = Add(m, t)",  # PP-OCR: one number each, the constant first
        "m = Div(a, g) s = Add(t, m)",
        "m = Mul(a, c) s = Sub(m, d)",
        "s = Mul(c, a)",
    ],
)
def test_gains_behind_a_convolution(behind: str) -> None:
    text = f"{IMAGE} {{ a = Conv<pads = [1, 1, 1, 1], group = 8>(x, K, b) {behind} z = Relu(s) }}"
    held = {"g": normal(1, seed=1), "t": normal(1, seed=2), "b": normal(8, seed=3)}
    held |= {"c": normal(8, 1, 1, seed=4), "d": normal(1, 8, 1, 1, seed=5)}
    source = graph(text, K=normal(8, 1, 3, 3), **{k: v for k, v in held.items() if k in text})
    assert operators(folded(source).ir) == ["Conv", "Relu"]


def test_gains_in_front_of_a_convolution() -> None:
    """A bias only where no zeros are put around it."""
    front = "r = Relu(x) m = Mul(g, r) s = Add(m, t)"
    held = {"g": normal(1, seed=1), "t": normal(1, seed=2), "b": normal(8, seed=3)}
    plain = graph(f"{IMAGE} {{ {front} z = Conv(s, K, b) }}", K=normal(8, 8, 1, 1), **held)
    assert operators(folded(plain).ir) == ["Relu", "Conv"]
    padded = graph(
        f"{IMAGE} {{ {front} z = Conv<pads = [1, 1, 1, 1]>(s, K, b) }}",
        K=normal(8, 8, 3, 3),
        **held,
    )
    assert not fold(padded).report.folded
    without_bias = front.replace("s = Add(m, t)", "s = Identity(m)")
    del held["t"]
    padded = graph(
        f"{IMAGE} {{ {without_bias} z = Conv<pads = [1, 1, 1, 1]>(s, K, b) }}",
        K=normal(8, 8, 3, 3),
        **held,
    )
    assert operators(folded(padded).ir) == ["Relu", "Conv"]


@pytest.mark.parametrize(
    "text",
    [
        "a = Conv(x, K, b) m = Mul(a, g) n = Exp(a) z = Add(m, n)",  # something else reads it
        "a = Conv(x, K, b) m = Mul(a, w) z = Relu(m)",  # one number a position
        "a = Conv(x, K, b) z = Add(a, g)",  # no gain: ONNX Runtime fuses it
        "a = Conv(x, K, b) m = Mul(a, a) z = Relu(m)",
    ],
)
def test_gains_that_are_none(text: str) -> None:
    held = {"g": normal(1, seed=1), "b": normal(8, seed=3), "w": normal(4, seed=4)}
    head = "(float[n, 8, h, 4] x) => (float[n, 8, h, 4] z)"
    used = {name: array for name, array in held.items() if f", {name})" in text}
    source = graph(f"{head} {{ {text} }}", K=normal(8, 8, 1, 1), **used)
    assert not fold(source).report.folded


@pytest.mark.parametrize(
    "gelu",
    [
        "d = Div(r, s2) e = Erf(d) p = Add(e, one) q = Mul(r, p) h = Mul(q, half)",
        "c = Mul(r, s2) e = Tanh(c) p = Add(one, e) q = Mul(r, p) h = Div(q, s2)",
    ],
)
def test_the_last_factor_of_a_gelu_stays(gelu: str) -> None:
    """ONNX Runtime makes one operator of a Gelu that is whole."""
    numbers = {"s2": np.sqrt(2), "one": 1.0, "half": 0.5}
    held = {name: np.float32(number) for name, number in numbers.items() if name in gelu}
    source = graph(
        f"{IMAGE} {{ r = Conv(x, K, b) {gelu} z = Conv(h, L, b) }}",
        K=normal(8, 8, 1, 1),
        L=normal(8, 8, 1, 1, seed=1),
        b=normal(8, seed=2),
        **held,
    )
    assert not fold(source).report.folded


@pytest.mark.parametrize(
    "behind", ["m = Mul(g, a)", "c = Add(a, b) m = Mul(c, g)", "c = Add(b, a) m = Div(c, g)"]
)
def test_layer_scale_behind_a_product(behind: str) -> None:
    """DINOv2 and CaiT: a number for each channel in front of the residual sum."""
    held = {"g": normal(16, seed=1)} | ({"b": normal(16, seed=2)} if "b" in behind else {})
    source = graph(
        f"{ROWS} {{ a = MatMul(x, W) {behind} t = Relu(x) z = Add(t, m) }}",
        W=normal(16, 16),
        **held,
    )
    found = operators(folded(source, 16).ir)
    assert sorted(found) == sorted(["MatMul", "Relu", "Add", *["Add"] * ("b" in behind)])


def test_a_gain_in_front_of_a_product_stays() -> None:
    """It may be that of a norm, which ONNX Runtime makes one operator of."""
    source = graph(
        f"{ROWS} {{ r = Relu(x) m = Mul(r, g) a = MatMul(m, W) z = Relu(a) }}",
        W=normal(16, 16),
        g=normal(16, seed=1),
    )
    assert not fold(source).report.folded


def test_a_number_behind_a_product_stays() -> None:
    source = graph(
        f"{ROWS} {{ a = MatMul(x, W) m = Mul(g, a) z = Relu(m) }}",
        W=normal(16, 16),
        g=normal(1, seed=1),
    )
    assert not fold(source).report.folded


# --- Products -------------------------------------------------------------------------------------


def lora(ops: str, **held: np.ndarray) -> ir.Model:
    """``x W`` beside what ``ops`` make of ``x``, ``c``; rank 4."""
    held = {
        "W": normal(16, 16),
        "A": normal(16, 4, seed=1),
        "B": normal(4, 16, seed=2),
    } | held
    if ", s)" in ops or "(s," in ops:
        held["s"] = np.float32([2.0])
    return graph(f"{ROWS} {{ y = MatMul(x, W) {ops} u = Add(y, c) z = Relu(u) }}", **held)


@pytest.mark.parametrize(
    "ops",
    [
        "a = MatMul(x, A) b = MatMul(a, B) c = Mul(b, s)",
        "a = MatMul(x, A) b = MatMul(a, B) c = Div(b, s)",
        "a = MatMul(x, A) b = Mul(s, a) c = MatMul(b, B)",
        "k = Constant<value_float = 0.5>() a = MatMul(x, A) b = MatMul(a, B) c = Mul(b, k)",
        "d = Identity(x) a = MatMul(d, A) b = MatMul(a, B) c = Neg(b)",
    ],
)
def test_lora_is_the_layer_itself(ops: str) -> None:
    result = folded(lora(ops), objective="speed", target="cpu")
    assert operators(result.model) == ["MatMul", "Relu"]
    assert weights(result.model) == 16 * 16


def test_several_adapters_and_biases() -> None:
    """A bias on each of them, and one on the layer: one bias is left."""
    source = graph(
        f"{ROWS} {{ y0 = MatMul(x, W) y = Add(y0, e) a = MatMul(x, A) b = MatMul(a, B)"
        " c0 = MatMul(x, C) c1 = Add(f, c0) c = MatMul(c1, D) t = Add(y, b) u = Add(t, c)"
        " z = Relu(u) }",
        W=normal(16, 16),
        e=normal(16, seed=3),
        A=normal(16, 4, seed=1),
        B=normal(4, 16, seed=2),
        C=normal(16, 2, seed=4),
        D=normal(2, 16, seed=5),
        f=normal(2, seed=6),
    )
    result = folded(source)
    assert operators(result.model) == ["MatMul", "Add", "Relu"]
    assert weights(result.model) == 16 * 16 + 16


def test_lora_of_a_gemm() -> None:
    """GPT-2's Conv1D beside an adapter; the sum is a Gemm's, and has its bias."""
    source = graph(
        "(float[n, 16] x) => (float[n, 8] z) { y = Gemm<beta = 0.5>(x, W, e)"
        " a = Gemm<transB = 1>(x, A) b = Gemm<alpha = 3.0>(a, B) u = Add(y, b) z = Relu(u) }",
        W=normal(16, 8),
        e=normal(8, seed=3),
        A=normal(2, 16, seed=1),
        B=normal(2, 8, seed=2),
    )
    assert weights(folded(source).model) == 16 * 8 + 8


def test_two_heads_averaged() -> None:
    """The heads of a distilled model: ``((x W + b) + (x V + c)) / 2``."""
    source = graph(
        "(float[n, 16] x) => (float[n, 5] z) { a = Gemm<transB = 1>(x, W, b)"
        " c = Gemm<transB = 1>(x, V, d) s = Add(a, c) z = Div(s, two) }",
        W=normal(5, 16),
        b=normal(5, seed=1),
        V=normal(5, 16, seed=2),
        d=normal(5, seed=3),
        two=np.float32(2.0),
    )
    result = folded(source)
    assert weights(result.model) == 5 * 16 + 5
    assert "Div" not in operators(result.model)


def test_a_skip_goes_into_the_layer() -> None:
    """``x + x W``: as many weights, an operator less."""
    source = graph(f"{ROWS} {{ a = MatMul(x, W) s = Add(x, a) z = Relu(s) }}", W=normal(16, 16))
    assert operators(folded(source, 0).model) == ["MatMul", "Relu"]


def test_what_comes_from_elsewhere_is_added_as_before() -> None:
    source = graph(
        "(float[n, t, 16] x, float[n, t, 16] y) => (float[n, t, 16] z) { r = Relu(y)"
        " a = MatMul(x, W) b0 = MatMul(x, A) b = MatMul(b0, B) s = Sub(r, a) t0 = Add(s, p)"
        " u = Add(t0, b) z = Relu(u) }",
        W=normal(16, 16),
        A=normal(16, 4, seed=1),
        B=normal(4, 16, seed=2),
        p=normal(3, 16, seed=4)[:1],
    )
    result = folded(source)
    assert operators(result.model).count("MatMul") == 1


def test_a_constant_that_adds_an_axis_is_added_as_before() -> None:
    source = graph(
        "(float[n, 16] x) => (float[a, n, 16] z) { y = MatMul(x, W) v = MatMul(x, V)"
        " s = Add(y, v) t = Add(s, p) z = Relu(t) }",
        W=normal(16, 16),
        V=normal(16, 16, seed=1),
        p=normal(1, 1, 16),
    )
    result = folded(source, 16 * 16)
    assert operators(result.model).count("MatMul") == 1


# --- BatchNorm behind a change of layout ----------------------------------------------------------


@pytest.mark.parametrize("shape", ["q = Shape(y)", "q = Constant<value_ints = [2, 3, 6]>()"])
def test_batch_norm_behind_a_flattened_product(shape: str) -> None:
    """LeViT: ``BN(flatten(x W))``, reshaped back; both changes of layout go."""
    source = graph(
        "(float[2, 3, 16] x) => (float[2, 3, 6] z) { y = MatMul(x, W) f = Reshape(y, to)"
        f" b = BatchNormalization(f, {bn(0)}) {shape} r = Reshape(b, q) z = Relu(r) }}",
        W=normal(16, 6),
        to=np.array([-1, 6]),
        **norm(6, 0),
    )
    result = folded(source, 3 * 6)
    assert [op for op in operators(result.model) if op != "Constant"] == ["MatMul", "Add", "Relu"]
    (stream,) = result.report.folded
    assert stream.folded is not None


def test_batch_norm_behind_a_transpose() -> None:
    """BatchNorm1d over channels first, behind a layer with channels last."""
    source = graph(
        "(float[n, t, 16] x) => (float[n, 6, t] z) { y = MatMul(x, W) f = Transpose<perm ="
        f" [0, 2, 1]>(y) b = BatchNormalization(f, {bn(0)}) z = Relu(b) }}",
        W=normal(16, 6),
        **norm(6, 0),
    )
    assert operators(folded(source).model) == ["MatMul", "Add", "Transpose", "Relu"]


# --- Refusal --------------------------------------------------------------------------------------


def test_a_low_rank_pair_stays() -> None:
    source = graph(
        f"{ROWS} {{ a = MatMul(x, A) b = MatMul(a, B) z = Relu(b) }}",
        A=normal(16, 4, seed=1),
        B=normal(4, 16, seed=2),
    )
    assert operators(fold(source, only=["branches"]).model) == operators(source)


@pytest.mark.parametrize(
    "body",
    [
        # a bias that zeros are put around
        "r = Conv(x, P, p) a = Conv<pads = [1, 1, 1, 1]>(r, K) z = Add(a, x)",
        # another step
        "a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, K) c = Conv(x, P) q = Shape(c)"
        ' e = Resize<mode = "nearest">(a, , , q) z = Add(e, c)',
        # statistics of the batch
        "a, d, e = BatchNormalization<training_mode = 1>(x, g0, b0, m0, v0) c = Conv(x, P)"
        " z = Add(a, c)",
        # a gain that is not the same at every position
        "a = Conv(x, P) c = Mul(x, W) z = Add(a, c)",
    ],
)
def test_what_is_no_linear_map_stays(body: str) -> None:
    source = graph(
        f"(float[n, 8, 6, 6] x) => (float[n, 8, a, b] z) {{ {body} }}",
        K=normal(8, 8, 3, 3),
        P=normal(8, 8, 1, 1, seed=1),
        p=normal(8, seed=2),
        W=normal(6, 6, seed=3),
        **norm(8, 0),
    )
    refused(source, only=["branches"])


def test_values_that_something_else_reads_stay() -> None:
    """The half of an adapter that is a graph output, and a weight that another layer reads."""
    source = graph(
        "(float[n, t, 16] x) => (float[n, t, 16] z, float[n, t, 4] a) { y = MatMul(x, W)"
        " a = MatMul(x, A) b = MatMul(a, B) s = Add(y, b) z = Relu(s) }",
        W=normal(16, 16),
        A=normal(16, 4, seed=1),
        B=normal(4, 16, seed=2),
    )
    assert proto(fold(source, only=["branches"]).model) == proto(source)
    tied = graph(
        "(float[n, t, 16] x) => (float[n, t, 16] z, float[n, t, 16] o) { y = MatMul(x, W)"
        " v = MatMul(x, V) s = Add(y, v) z = Relu(s) r = Relu(x) o = MatMul(r, W) }",
        W=normal(16, 16),
        V=normal(16, 16, seed=1),
    )
    result = folded(tied, only=["branches"])
    assert weights(result.model) == 2 * 16 * 16


def test_an_adapter_that_is_an_input_stays() -> None:
    source = graph(
        "(float[n, t, 16] x, float[16, 4] A, float[4, 16] B) => (float[n, t, 16] z) {"
        " y = MatMul(x, W) a = MatMul(x, A) b = MatMul(a, B) s = Add(y, b) z = Relu(s) }",
        W=normal(16, 16),
    )
    assert proto(fold(source).model) == proto(source)


def test_protected_weights_stay() -> None:
    source = lora("a = MatMul(x, A) b = MatMul(a, B) c = Mul(b, s)")
    assert "'A' is protected" in refused(source, protect=["A"], only=["branches"])


def test_a_wrong_kernel_is_caught_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window in the wrong corner: the fold is named, taken back, and the model stays right."""
    from onnx_fold.streams import maps

    offset = maps._offset
    monkeypatch.setattr(
        maps, "_offset", lambda *given: tuple(0 for _ in offset(*given) or ()) or None
    )
    source = graph(
        f"{IMAGE} {{ a = Conv<pads = [1, 1, 1, 1]>(x, K) c = Conv(x, P) s = Add(a, c)"
        " z = Relu(s) }",
        K=normal(8, 8, 3, 3),
        P=normal(8, 8, 1, 1, seed=1),
    )
    result = onnx_fold.fold(source, only="branches", shapes={"n": 2, "h": 6, "w": 5})
    assert not result.report.folded
    assert "the proof rejects it" in str(result.report.taken_back)


# --- Any block ------------------------------------------------------------------------------------


def _branch(draw: Callable[[st.SearchStrategy[str]], str], number: int, groups: int) -> str:
    """One path from ``x`` to ``p{number}``: a few linear operators that keep the size."""
    steps, value = [], "x"
    for step in range(int(draw(st.sampled_from("0123")))):
        seed = 3 * number + step  # weights of its own, so that paths do not cancel out
        kinds = [
            f"Conv<pads = [1, 1, 1, 1], group = {groups}>({value}, K{seed})",
            f"Conv<group = {groups}>({value}, P{seed})",
            f"BatchNormalization({value}, {bn(seed)})",
            f"Mul({value}, L{seed})",
            f"Add(L{seed}, {value})",
            f"Neg({value})",
            f"Conv<pads = [2, 0, 2, 0], group = {groups}>({value}, T{seed}, b{seed})",
            f"Conv<pads = [2, 2, 2, 2], dilations = [2, 2], group = {groups}>({value}, K{seed})",
            f"AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>"
            f"({value})",
            f"Conv<group = {groups}>(w{seed}, K{seed})",
        ]
        kind = draw(st.sampled_from(kinds))
        if f"w{seed}" in kind:  # the zeros are put around what a 1x1 convolution reads
            around = f"Conv<pads = [1, 1, 1, 1], group = {groups}>({value}, P{seed}, b{seed})"
            steps.append(f"w{seed} = {around}")
        steps.append(f"y{seed} = {kind}")
        value = f"y{seed}"
    return " ".join([*steps, f"p{number} = Identity({value})"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_block(data: st.DataObject) -> None:
    """Whatever is folded of random blocks is the same function, and has no more weights."""
    groups, count = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(2, 4))
    held: dict[str, np.ndarray] = {}
    for seed in range(3 * count):
        held |= norm(4, seed)
        held[f"K{seed}"] = normal(4, 4 // groups, 3, 3, seed=seed)
        held[f"P{seed}"] = normal(4, 4 // groups, 1, 1, seed=seed)
        held[f"T{seed}"] = normal(4, 4 // groups, 5, 1, seed=seed)
        held[f"L{seed}"] = normal(4, 1, 1, seed=seed)
    body = [_branch(data.draw, number, groups) for number in range(count)]
    total = "p0"
    for number in range(1, count):
        operator = data.draw(st.sampled_from(["Add", "Sub"]))
        body.append(f"s{number} = {operator}({total}, p{number})")
        total = f"s{number}"
    text = " ".join([*body, f"z = Relu({total})"])
    held = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", text)}
    source = graph(f"(float[n, 4, h, w] x) => (float[n, 4, h, w] z) {{ {text} }}", **held)
    result = fold(source, only=["branches"])
    if result.report.folded:
        folded(source, only=["branches"])


# --- Gains that a model computes from constants ---------------------------------------------------

DORA = (
    f"{ROWS} {{ y = MatMul(x, W) d0 = Transpose<perm = [1, 0]>(W) e = MatMul(A, B)"
    " e1 = Transpose<perm = [1, 0]>(e) e2 = Mul(e1, s) v = Add(d0, e2) n = ReduceL2<keepdims = 0>"
    "(v, last) q0 = Div(m, n) q = Reshape(q0, row) k = Sub(q, one) a = MatMul(x, A)"
    " b = MatMul(a, B) c0 = Mul(k, y) c1 = Mul(q, b) c2 = Mul(c1, s) c = Add(c0, c2)"
    " u = Add(y, c) z = Relu(u) }"
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dora_is_one_layer(dtype: type) -> None:
    """``x W + (q - 1) · x W + q · s x A B`` with ``q = m / ‖W + s A B‖``, all of it constant."""
    held = {
        "W": normal(16, 16),
        "A": normal(16, 4, seed=1),
        "B": normal(4, 16, seed=2),
        "m": np.abs(normal(16, seed=3)),
        "s": np.float32(2.0),
        "one": np.float32(1.0),
    }
    text = DORA.replace("float[", "double[") if dtype is np.float64 else DORA
    source = graph(
        text,
        last=np.array([1]),
        row=np.array([1, -1]),
        **{name: array.astype(dtype) for name, array in held.items()},
    )
    result = folded(source)
    assert operators(result.model) == ["MatMul", "Relu"]
    assert weights(result.model) == 16 * 16
    assert onnx_fold.fold(source, objective="size").report.proof.proved


def test_loha_of_a_product_is_the_layer_itself() -> None:
    """Its matrix is a product of two of low rank, element by element, which exporters leave."""
    source = graph(
        f"{ROWS} {{ y = MatMul(x, W) a = MatMul(A, B) c = MatMul(C, D) e = Mul(a, c)"
        " f = Mul(e, s) g = MatMul(x, f) u = Add(y, g) z = Relu(u) }",
        W=normal(16, 16),
        A=normal(16, 2, seed=1),
        B=normal(2, 16, seed=2),
        C=normal(16, 2, seed=3),
        D=normal(2, 16, seed=4),
        s=np.float32(0.5),
    )
    assert operators(folded(source, 4 * 32 + 1).ir) == ["MatMul", "Relu"]


def test_loha_of_a_convolution() -> None:
    source = graph(
        f"{IMAGE} {{ y = Conv<pads = [1, 1, 1, 1]>(x, K) e = Mul(A, B) f = Reshape(e, shape)"
        " g = Conv<pads = [1, 1, 1, 1]>(x, f) u = Add(y, g) z = Relu(u) }",
        K=normal(8, 8, 3, 3),
        A=normal(8, 72, seed=1),
        B=normal(8, 72, seed=2),
        shape=np.array([8, 8, 3, 3]),
    )
    assert operators(folded(source, 2 * 8 * 72).ir) == ["Conv", "Relu"]


def test_a_matrix_of_the_input_stays() -> None:
    source = graph(
        "(float[16, 16] x) => (float[16, 16] z) { y = MatMul(x, W) f = Mul(x, A)"
        " g = MatMul(x, f) u = Add(y, g) z = Relu(u) }",
        W=normal(16, 16),
        A=normal(16, 16, seed=1),
    )
    assert not fold(source).report.folded


def test_random_numbers_are_no_constants() -> None:
    source = graph(
        f"{ROWS} {{ r = RandomNormal<shape = [16]>() y = MatMul(x, W) c = Mul(y, r)"
        " u = Add(y, c) z = Relu(u) }",
        W=normal(16, 16),
    )
    assert proto(fold(source).model) == proto(source)


def test_without_the_pass_its_subjects_are_not_reported() -> None:
    source = lora("a = MatMul(x, A) b = MatMul(a, B) c = Mul(b, s)")
    streams = fold(source, only=["select"]).report.streams
    assert all("x" not in stream.writers for stream in streams)


def test_adapters_that_are_graph_inputs_stay_with_that_reason() -> None:
    source = graph(
        "(float[b, n, 16] x, float[16, 4] down, float[4, 16] up) => (float[b, n, 16] z) {"
        " w = MatMul(x, base) a = MatMul(x, down) view = Identity(up) c = MatMul(a, view)"
        " y = Add(w, c) g = Sigmoid(y) z = MatMul(g, out) }",
        base=normal(16, 16),
        out=normal(16, 16, seed=1),
    )
    reasons = refused(source)
    assert "'x' is read by MatMul -> a, whose weight is a graph input" in reasons
    report = fold(source).report
    assert report.given == report.to_dict()["given"] == ["MatMul -> a", "MatMul -> c"]
    shown = "Left alone because their weights are graph inputs: 2 layers (MatMul -> a, MatMul -> c)"
    assert shown in " ".join(str(report).split())


def test_an_input_that_a_constant_multiplies_is_no_weight() -> None:
    source = graph("(float[16, 8] x) => (float[16, 8] z) { z = MatMul(W, x) }", W=normal(16, 16))
    assert fold(source).report.given == []


def test_an_adapter_beside_a_gemm_of_any_number_of_rows() -> None:
    """GPT-2 with dynamic shapes: inference does not know that ``[n, t]`` is what comes back."""
    source = graph(
        "(int64[n, t] i) => (float[n, t, 16] z) { m = Shape<start = 1, end = 2>(i)"
        " k = Concat<axis = 0>(rest, m) v = Reshape(i, k) x = Gather(E, v) r = Reshape(x, flat)"
        " g = Gemm(r, W, w) n = Shape<start = 0, end = 1>(i) q = Concat<axis = 0>(n, m, width)"
        " y = Reshape(g, q) a = MatMul(x, A) b = MatMul(a, B) s = Add(y, b) z = Relu(s) }",
        E=normal(9, 16),
        W=normal(16, 16, seed=1),
        w=normal(16, seed=2),
        A=normal(16, 4, seed=3),
        B=normal(4, 16, seed=4),
        rest=np.array([-1]),
        flat=np.array([-1, 16]),
        width=np.array([16]),
    )
    result = folded(source, 2 * 16 * 4, only=["branches"])
    assert [name for name in operators(result.model) if name in ("Gemm", "MatMul")] == ["MatMul"]


# --- Channels that are moved ----------------------------------------------------------------------

PIXELS = {"W": normal(32, 24), "b": normal(24, seed=1), "flat": np.array([0, 32, -1])}


@pytest.mark.parametrize(
    ("dims", "back"), [("2, 32, 3, 4", np.array([2, 24, 3, 4])), ("n, 32, h, 4", None)]
)
def test_a_layer_that_reads_pixels_is_a_convolution(dims: str, back: np.ndarray | None) -> None:
    """``[n, c, h·w]``, transposed, a product, and back: a 1x1 convolution of the image."""
    shape = "" if back is not None else "n = Shape<start = 0, end = 1>(x)"
    shape += (
        ""
        if back is not None
        else " p = Shape<start = 2, end = 4>(x) back = Concat<axis = 0>(n, width, p)"
    )
    held = {"back": back} if back is not None else {"width": np.array([24])}
    source = graph(
        f"(float[{dims}] x) => (float[{dims.replace('32', '24')}] z) {{ r = Reshape(x, flat)"
        f" t = Transpose<perm = [0, 2, 1]>(r) y = MatMul(t, W) a = Add(y, b) {shape}"
        " u = Transpose<perm = [0, 2, 1]>(a) v = Reshape(u, back) z = Relu(v) }",
        **PIXELS,
        **held,
    )
    result = folded(source, 0, only=["branches"])
    assert operators(result.model) == ["Conv", "Relu"]
    (stream,) = result.report.folded
    assert stream.folded is not None
    assert "what moves its channels" in stream.folded.text


def test_a_convolution_of_rows_is_a_product() -> None:
    source = graph(
        "(float[2, 12, 8] x) => (float[2, 12, 6] z) { t = Transpose<perm = [0, 2, 1]>(x)"
        " r = Reshape(t, image) y = Conv(r, K, b) g = Reshape(y, rows)"
        " u = Transpose<perm = [0, 2, 1]>(g) z = Relu(u) }",
        K=normal(6, 8, 1, 1),
        b=normal(6, seed=1),
        image=np.array([0, 8, 3, 4]),
        rows=np.array([2, 6, 12]),
    )
    assert operators(folded(source, 0, only=["branches"]).model) == ["MatMul", "Add", "Relu"]


@pytest.mark.parametrize(
    "body",
    [
        # the positions come back in another order
        "t = Transpose<perm = [0, 3, 2, 1]>(x) y = MatMul(t, W)"
        " z = Transpose<perm = [0, 3, 1, 2]>(y)",
        # what was moved is read elsewhere
        "t = Transpose<perm = [0, 2, 3, 1]>(x) y = MatMul(t, W) k = ReduceMean(t)"
        " v = Transpose<perm = [0, 3, 1, 2]>(y) z = Add(v, k)",
        # something else than a linear layer between
        "t = Transpose<perm = [0, 2, 3, 1]>(x) y = MatMul(t, W) e = Relu(y)"
        " z = Transpose<perm = [0, 3, 1, 2]>(e)",
    ],
)
def test_other_moves_stay(body: str) -> None:
    source = graph(f"(float[2, 32, 4, 4] x) => (float[2, 24, 4, 4] z) {{ {body} }}", W=PIXELS["W"])
    assert proto(fold(source, only=["branches"]).model) == proto(source)


@pytest.mark.parametrize("is_image", [True, False])
def test_few_channels_of_an_image_are_no_convolution(is_image: bool) -> None:
    """Four heads that are mixed, as in CaiT: a convolution of an image is no faster there."""
    there, back = ([0, 2, 3, 1], [0, 3, 1, 2]) if is_image else ([0, 2, 1], [0, 2, 1])
    dims = "5, 5" if is_image else "25"
    source = graph(
        f"(float[2, 4, {dims}] x) => (float[2, 4, {dims}] z) {{ t = Transpose<perm = {there}>(x)"
        f" y = MatMul(t, W) v = Transpose<perm = {back}>(y) z = Softmax<axis = -1>(v) }}",
        W=normal(4, 4),
    )
    found = fold(source, only=["branches"])
    assert bool(found.report.folded) is not is_image


def test_a_bias_behind_a_sum_goes_into_a_convolution() -> None:
    """``conv(x) + r + b``, where a Resize in between keeps the size: one operator a term."""
    source = graph(
        "(float[2, 8, 4, 4] x, float[2, 6, 2, 2] r) => (float[2, 6, 4, 4] z) { y = Conv(x, K)"
        ' a = Resize<mode = "linear">(y, , , size) q = Resize<mode = "linear">(r, , , size)'
        " s = Add(q, a) t = Add(s, B) z = Relu(t) }",
        K=normal(6, 8, 1, 1),
        B=normal(6, 1, 1, seed=2),
        size=np.array([2, 6, 4, 4]),
    )
    result = folded(source, 0, only=["branches"])
    assert sorted(operators(result.model)) == ["Add", "Conv", "Relu", "Resize"]


def test_a_resize_by_a_scale_stays() -> None:
    """4 pixels times 1.1 are 4, and each is taken between two others."""
    source = graph(
        "(float[2, 8, 4, 4] x, float[2, 6, 4, 4] r) => (float[2, 6, 4, 4] z) { y = Conv(x, K)"
        ' a = Resize<mode = "linear">(y, , by) s = Add(a, r) z = Add(s, B) }',
        K=normal(6, 8, 1, 1),
        B=normal(6, 1, 1, seed=2),
        by=np.array([1, 1, 1.1, 1.1], np.float32),
    )
    assert proto(fold(source, only=["branches"]).model) == proto(source)


def test_a_shape_that_a_long_chain_reads_stays() -> None:
    """What is computed from a shape is followed without recursion, and not without end."""
    chain = " ".join(f"k{i + 1} = Add(k{i}, one)" for i in range(1200))
    source = graph(
        f"(float[n, 8, 5, 5] x) => (float[n, 8, 5, 5] z, int64[4] k1200) {{ y = Conv(x, P)"
        f" k0 = Shape(y) {chain} s = Add(y, x) z = Relu(s) }}",
        P=normal(8, 8, 1, 1),
        one=np.array([1]),
    )
    assert proto(fold(source, only=["branches"]).model) == proto(source)


# --- Parts of the channels -----------------------------------------------------------------------

PARTS = "(float[n, t, 12] x) => (float[n, t, 5] z)"
CUTS = {
    "Split": "p, q = Split<axis = -1, num_outputs = 2>(w)",
    "Slice": "q = Slice(w, six, end, last) p = Slice(w, zero, six, last)",
}


@pytest.mark.parametrize("front", ["w = Relu(x)", "w = MatMul(x, W)"])
@pytest.mark.parametrize("cut", CUTS)
def test_layers_of_the_parts_are_one_layer(cut: str, front: str) -> None:
    """``[p, q]``: ``p U + q V`` is one product by U above V; with a layer in front one with it."""
    numbers = {"zero": [0], "six": [6], "end": [12], "last": [-1]} if cut == "Slice" else {}
    source = graph(
        f"{PARTS} {{ {front} {CUTS[cut]} a = MatMul(p, U) b = MatMul(q, V) s = Add(a, b)"
        " z = Relu(s) }",
        **{name: np.array(each) for name, each in numbers.items()},
        **({"W": normal(12, 12)} if "W" in front else {}),
        U=normal(6, 5, seed=1),
        V=normal(6, 5, seed=2),
    )
    result = folded(source, 12 * 12 if "W" in front else 0)
    assert operators(result.model) == ["Relu"] * ("W" not in front) + ["MatMul", "Relu"]


def test_convolutions_of_the_parts_are_one_convolution() -> None:
    source = graph(
        "(float[n, 12, h, w] x) => (float[n, 5, a, b] z) { p, q = Split<axis = 1>(x, sizes)"
        " c = Conv<pads = [1, 1, 1, 1]>(p, K) d = Conv<pads = [1, 1, 1, 1]>(q, L, e)"
        " s = Add(c, d) z = Relu(s) }",
        K=normal(5, 4, 3, 3),
        L=normal(5, 8, 3, 3, seed=1),
        e=normal(5),
        sizes=np.array([4, 8]),
    )
    assert operators(folded(source, 0).model) == ["Conv", "Relu"]


def test_a_part_that_something_else_reads_is_cut_out_as_before() -> None:
    source = graph(
        "(float[n, t, 12] x) => (float[n, t, 5] z, float[n, t, 4] r) {"
        " p, q, o = Split<axis = -1, num_outputs = 3>(x) a = MatMul(p, U) b = MatMul(q, V)"
        " s = Add(a, b) z = Relu(s) r = Tanh(o) }",
        U=normal(4, 5, seed=1),
        V=normal(4, 5, seed=2),
    )
    refused(source)


def test_a_part_without_a_layer_is_no_branch() -> None:
    """``p U + q`` would be a product by U above the identity."""
    source = graph(
        f"{PARTS.replace('5] z', '6] z')} {{ p, q = Split<axis = -1, num_outputs = 2>(x)"
        " a = MatMul(p, U) s = Add(a, q) z = Relu(s) }",
        U=normal(6, 6),
    )
    assert "grow" not in refused(source)
