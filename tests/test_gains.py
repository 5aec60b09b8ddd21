"""Gains along a residual chain (NoNorm) go into the layers beside it, and two biases become one."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, folded, graph, normal, operators, outputs, refused, square

from onnx_fold.algebra.basis import DiagonalBasis, max_ratio
from onnx_fold.algebra.expression import evaluate, literal

D, F = 6, 9
SCALE = ["scale"]


def vector(seed, spread=0.5):
    """Factors around one, and none near zero."""
    return np.exp(spread * np.random.default_rng(seed).standard_normal(D)).astype(np.float32)


def chain(blocks=2, end="y = MatMul({x}, R)", gain=vector, op="Mul", dtype=np.float32, **more):
    """Blocks ``x' = (x + relu(x U) V + c) g + e``, as those of MobileBERT, and a layer behind."""
    held = {"P": normal(F, D), "b": normal(D, seed=90), "R": normal(D, 3, seed=91)}
    body, x = ["p = MatMul(h, P) x0 = Add(p, b)"], "x0"
    for i in range(blocks):
        held |= {f"U{i}": normal(D, F, seed=i), f"V{i}": normal(F, D, seed=i)}
        held |= {f"{name}{i}": normal(D, seed=10 + i) for name in "ce"} | {f"g{i}": gain(i)}
        body.append(
            f"u{i} = MatMul({x}, U{i}) r{i} = Relu(u{i}) v{i} = MatMul(r{i}, V{i})"
            f" w{i} = Add(v{i}, c{i}) s{i} = Add(w{i}, {x}) m{i} = {op}(s{i}, g{i})"
            f" x{i + 1} = Add(m{i}, e{i})"
        )
        x = f"x{i + 1}"
    body.append(end.format(x=x))
    kind = {np.float32: "float", np.float16: "float16", np.float64: "double"}[dtype]
    width = 3 if "R)" in end else D
    text = f"({kind}[a, b, {F}] h) => ({kind}[a, b, {width}] y) {{ {' '.join(body)} }}"
    used = {name: array for name, array in (held | more).items() if f"{name})" in text}
    return graph(text, **{name: array.astype(dtype) for name, array in used.items()})


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_no_gain_is_left_and_one_bias_a_layer(blocks, op):
    """``d`` factors and ``d`` numbers of a bias go with each block, and both operators."""
    result = folded(chain(blocks, op=op), 2 * D * blocks, only=SCALE)
    left = operators(result.model)
    assert op not in left
    assert left.count("Add") == 1 + 2 * blocks
    assert left.count("MatMul") == 2 + 2 * blocks


def test_the_chain_is_one_closed_stream_then():
    """``d²`` weights go that no basis of one block alone could save."""
    result = folded(chain(3), D * D + 6 * D, skip=["merge"])
    assert {each.folded.strategy for each in result.report.folded} == {"scale", "interpolate"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_in_every_type(dtype):
    folded(chain(3, dtype=dtype), 6 * D, only=SCALE)


def test_no_digits_are_lost_to_gains_of_any_size():
    """A diagonal basis is exact but for one rounding, whatever its condition."""
    model = chain(3, gain=lambda i: np.logspace(-4, 4, D).astype(np.float32)[:: (-1) ** i])
    result = folded(model, 6 * D, only=SCALE)
    h = normal(2, 3, F)
    wide = outputs(chain(3, gain=lambda i: np.logspace(-4, 4, D)[:: (-1) ** i], dtype=np.float64),
                   h=h.astype(np.float64))["y"]  # fmt: skip
    own, new = (np.linalg.norm(outputs(m, h=h)["y"] - wide) for m in (model, result.model))
    assert new <= max_ratio(ir.DataType.FLOAT) * own


def test_shared_gains_and_biases():
    """The same numbers in every block: each use gets its own, where that does not cost more."""
    model = chain(3)
    for i in (1, 2):
        for name in "ge":
            (node,) = [
                n
                for n in model.graph
                if n.outputs[0].name == f"{'mx'[name == 'e']}{i + (name == 'e')}"
            ]
            node.replace_input_with(1, model.graph.initializers[f"{name}0"])
    result = fold(model, only=SCALE)
    assert "Mul" not in operators(result.model)
    folded(model, only=SCALE)


def test_a_gemm_s_bias_takes_the_other_one():
    text = f"""(float[n, {F}] h) => (float[n, 3] y, float[n, 4] z)
        {{ g = Gemm <beta = 2.0> (h, P, b) s = Add(g, c) t = Add(d, s)
           y = MatMul(t, R) z = MatMul(t, S) }}"""
    held = {"P": normal(F, D), "R": normal(D, 3), "S": normal(D, 4)}
    held |= {name: normal(D, seed=i) for i, name in enumerate("bcd")}
    result = folded(graph(text, **held), 2 * D, only=SCALE)
    assert operators(result.model) == ["Gemm", "MatMul", "MatMul"]


def test_a_sum_that_is_read_without_the_second_bias_keeps_both():
    text = f"""(float[n, {F}] h) => (float[n, 3] y, float[n, 4] z)
        {{ p = MatMul(h, P) s = Add(p, b) t = Add(s, c) y = MatMul(s, R) z = MatMul(t, S) }}"""
    held = {"P": normal(F, D), "R": normal(D, 3), "S": normal(D, 4)}
    refused(graph(text, b=normal(D), c=normal(D, seed=1), **held), only=SCALE)


def test_a_gain_of_zero_stays():
    model = chain(2, gain=lambda i: np.where(np.arange(D) == 2, 0, vector(i)).astype(np.float32))
    assert "multiplies a channel by zero" in refused(model, only=SCALE)
    result = fold(model, only=SCALE)
    assert operators(result.model).count("Mul") >= 1


@pytest.mark.parametrize("end", ["y = Relu({x})", "y = Identity({x})"])
def test_a_gain_in_front_of_an_open_stream_stays(end):
    """What is read as it is cannot get another basis: the gain in front of it is needed."""
    result = folded(chain(2, end=end), D, only=SCALE)
    assert operators(result.model).count("Mul") == 1


def test_a_protected_gain_stays():
    """And so do those of the streams that it opens."""
    model = chain(5)
    result = fold(model, only=SCALE, protect=["g3"])
    assert operators(result.model).count("Mul") == 3
    held = result.model.graph.initializers
    np.testing.assert_array_equal(held["g3"].const_value.numpy(), vector(3))


@pytest.mark.parametrize(
    ("body", "left"), [("w = Add(t, v) k = Add(w, u)", 1), ("k = Add(t, v)", 0)]
)
def test_two_gains_behind_one_value(body, left):
    """Where both lead to one sum, one of them goes, and the other one becomes their ratio."""
    text = f"""(float[n, {F}] h) => (float[n, 3] y, float[n, 3] z)
        {{ p = MatMul(h, P) u = Mul(p, g) v = Mul(p, f) s = MatMul(u, S) r = Relu(s)
           t = MatMul(r, T) {body} y = MatMul(k, R) z = MatMul(u, Z) }}"""
    held = {"P": normal(F, D), "S": square(D), "T": square(D, 1), "R": normal(D, 3)}
    model = graph(text, Z=normal(D, 3, seed=5), g=vector(1), f=vector(2), **held)
    result = folded(model, (2 - left) * D, only=SCALE)
    gains = [node for node in result.model.graph if node.op_type == "Mul"]
    assert len(gains) == left
    for node in gains:
        ratio = node.inputs[1].const_value.numpy()
        assert (
            min(abs(ratio - vector(1) / vector(2)).max(), abs(ratio - vector(2) / vector(1)).max())
            < 1e-5
        )


def test_the_basis():
    factors, w, r = np.array([2.0, -4.0, 0.5]), normal(2, 5, 3), normal(3, 4)
    basis = DiagonalBasis.of(literal(factors))
    np.testing.assert_array_equal(evaluate(basis.of_writer(literal(w))), w * factors)
    np.testing.assert_allclose(evaluate(basis.of_reader(literal(r))), r / factors[:, None])
    np.testing.assert_array_equal(evaluate(basis.matrix), np.diag(factors))
