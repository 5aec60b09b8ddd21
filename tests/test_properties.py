"""The algebra, in float64: any fold of any chain is the same function, and weights never grow."""

import numpy as np
import onnx_ir as ir
from helpers import assert_same_function, fold, graph, normal, proto, square, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.expression import FoldedTensor, evaluate, literal

settings.register_profile("engine", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("engine")

WIDTHS = st.integers(1, 7)
SEEDS = st.integers(0, 1000)


def double(*shape: int, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed, dtype=np.float64)


@st.composite
def chains(draw) -> ir.Model:
    """Linear layers in a row, as MatMul or Gemm, with biases, gains and operators in between."""
    width = draw(WIDTHS)
    start, value, held, lines = width, "x", {}, []
    seed = draw(SEEDS)
    count = 0

    def new(line: str) -> None:
        nonlocal value, count
        count += 1
        lines.append(f"v{count} = {line}")
        value = f"v{count}"

    def constant(array: np.ndarray) -> str:
        held[f"c{len(held)}"] = array
        return f"c{len(held) - 1}"

    for step in range(draw(st.integers(1, 5))):
        out, rank2 = draw(WIDTHS), draw(st.booleans())
        w, b = double(width, out, seed=seed + step), double(out, seed=seed + step + 50)
        kind = draw(st.sampled_from(["plain", "bias", "gemm", "gemm_t", "gemm_c"]))
        if kind.startswith("gemm"):
            new(f"Reshape({value}, {constant(np.array([-1, width]))})")
            alpha, beta = draw(st.sampled_from([1.0, -0.5])), draw(st.sampled_from([1.0, 2.0]))
            extra = f", {constant(b)}" if kind == "gemm_c" else ""
            stored = constant(w.T.copy() if kind == "gemm_t" else w)
            attributes = f"alpha = {alpha}, beta = {beta}, transB = {int(kind == 'gemm_t')}"
            new(f"Gemm<{attributes}>({value}, {stored}{extra})")
            new(f"Reshape({value}, {constant(np.array([2, -1, out]))})")
        else:
            new(f"MatMul({value}, {constant(w)})")
            if kind == "bias":
                new(f"Add({value}, {constant(b)})")
        width = out
        for _ in range(draw(st.integers(0, 2))):
            h = value
            match draw(
                st.sampled_from(
                    ["neg", "scale", "sum", "branch", "swap", "relu", "gain", "table", "constants"]
                )
            ):
                case "neg":
                    new(f"Neg({h})")
                case "scale":
                    new(f"Mul({constant(np.array(draw(st.sampled_from([2.0, -0.5]))))}, {h})")
                case "sum":
                    new(f"Add({h}, {h})")
                case "branch":
                    new(f"MatMul({h}, {constant(double(width, width, seed=seed + 9))})")
                    new(f"Sub({h}, {value})")
                case "swap":
                    new(f"Transpose<perm = [1, 0, 2]>({h})")
                    new(f"Transpose<perm = [1, 0, 2]>({value})")
                case "relu":
                    new(f"Relu({h})")
                case "gain":
                    new(f"Mul({h}, {constant(double(width, seed=seed))})")
                case "table":
                    new(f"Add({h}, {constant(double(3, width, seed=seed))})")
                case "constants":
                    new(f"Add({constant(double(width))}, {constant(double(width, seed=seed))})")
                    new(f"Add({h}, {value})")
        if rank2 and draw(st.booleans()):
            lines.append(f"side{step} = Identity({value})")
    readers = draw(st.integers(1, 2))
    outputs = []
    for index in range(readers):
        lines.append(f"y{index} = MatMul({value}, {constant(double(width, 3, seed=index))})")
        outputs.append(f"double[a, b, 3] y{index}")
    return graph(
        f"(double[2, 3, {start}] x) => ({', '.join(outputs)}) {{ {' '.join(lines)} }}", **held
    )


@given(chains())
def test_any_chain(model):
    before = proto(model)
    result = fold(model, tolerance=1e-9)
    assert proto(model) == before
    assert_same_function(model, result.model)
    assert weights(result.model) <= weights(model)
    assert weights(model) - weights(result.model) == result.report.saving.weights
    assert not fold(result.model, tolerance=1e-9).report.folded


@st.composite
def streams(draw) -> ir.Model:
    """One closed stream: tables and layers write it, layers of any width read it."""
    width, seed = draw(st.integers(2, 7)), draw(SEEDS)
    held, lines, terms = {}, [], []
    for index in range(draw(st.integers(1, 3))):
        rows = draw(st.integers(2, 12))
        if draw(st.booleans()):
            held[f"E{index}"] = double(rows, width, seed=seed + index)
            lines.append(f"w{index} = Gather(E{index}, ids)")
        else:
            size = draw(st.sampled_from([width, 4]))
            held[f"W{index}"] = (
                square(width, seed, np.float64) if size == width else double(4, width, seed=seed)
            )
            lines.append(f"w{index} = MatMul({'a' if size == 4 else 'b'}, W{index})")
        terms.append(f"w{index}")
        if draw(st.booleans()):
            held[f"g{index}"] = np.array(draw(st.sampled_from([2.0, -1.0])))
            lines.append(f"s{index} = Mul(w{index}, g{index})")
            terms[-1] = f"s{index}"
    lines.append(f"h = Sum({', '.join(terms)})")
    value = "h"
    if draw(st.booleans()):
        held["bias"] = double(width, seed=seed)
        lines.append("k = Add(h, bias)")
        value = "k"
    outputs = []
    for index in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([width, 1, 9]))
        held[f"R{index}"] = (
            square(width, seed + index, np.float64)
            if size == width
            else double(width, size, seed=index)
        )
        lines.append(f"y{index} = MatMul({value}, R{index})")
        outputs.append(f"double[n, {size}] y{index}")
    text = f"(int64[n] ids, double[n, 4] a, double[n, {width}] b) => ({', '.join(outputs)})"
    return graph(f"{text} {{ {' '.join(lines)} }}", **held)


@given(streams(), st.sampled_from([(), ("merge",), ("absorb",)]))
def test_any_stream(model, only):
    result = fold(model, only=only, tolerance=1e-9)
    assert_same_function(model, result.model)
    assert weights(model) - weights(result.model) == result.report.saving.weights >= 0


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), SEEDS, st.booleans())
def test_a_basis_changes_no_product(n, d, m, seed, inverted):
    w, r = double(n, d, seed=seed), double(d, m, seed=seed + 1)
    t = square(d, seed, np.float64)
    basis = Basis(literal(t), inverted=inverted)
    writer, reader = evaluate(basis.of_writer(literal(w))), evaluate(basis.of_reader(literal(r)))
    np.testing.assert_allclose(writer @ reader, w @ r, rtol=1e-9, atol=1e-11)
    assert 0.99 < basis.condition < 1e4
    expected = np.linalg.solve(t.T, w.T).T if inverted else w @ t
    np.testing.assert_allclose(writer, expected, rtol=1e-9, atol=1e-11)


def test_a_singular_basis_has_an_infinite_condition_number():
    for matrix in (np.zeros((3, 3)), np.full((3, 3), np.nan), np.full((3, 3), np.inf)):
        assert Basis(literal(matrix)).condition == np.inf


def test_a_tensor_is_rounded_once():
    third = np.full((2, 2), 1 / 3)
    tensor = FoldedTensor(literal(third), ir.DataType.FLOAT16)
    assert tensor.shape == (2, 2)
    np.testing.assert_array_equal(tensor.numpy(), third.astype(np.float16), strict=True)
    np.testing.assert_array_equal(evaluate(tensor.expression), third)


@st.composite
def blocks(draw) -> ir.Model:
    """Skipless blocks: FFNs with any activation, and attention with any number of heads."""
    seed, held, lines, outputs = draw(SEEDS), {}, [], []

    def held_as(array: np.ndarray) -> str:
        held[f"c{len(held)}"] = array
        return f"c{len(held) - 1}"

    def new(line: str) -> str:
        lines.append(f"v{len(lines)} = {line}")
        return f"v{len(lines) - 1}"

    def linear(x: str, n: int, m: int, plain: bool = False) -> str:
        w = double(n, m, seed=seed + len(lines))
        if not plain and draw(st.integers(0, 5)) == 0:
            x, n = new(f"Reshape({x}, {held_as(np.array([-1, n]))})"), n
            x = new(f"Gemm<transB = 1>({x}, {held_as(w.T.copy())}, {held_as(double(m))})")
            return new(f"Reshape({x}, {held_as(np.array([2, 3, m]))})")
        x = new(f"MatMul({x}, {held_as(w)})")
        return new(f"Add({x}, {held_as(double(m))})") if draw(st.integers(0, 3)) == 0 else x

    def ffn(x: str, d: int) -> str:
        f = draw(st.sampled_from([3, 5, 9, 12]))
        h = linear(x, d, f)
        for _ in range(draw(st.integers(1, 2))):
            match draw(st.integers(0, 8)):
                case 0:
                    h = new(f"Relu({h})")
                case 1:
                    h = new(f"Mul({new(f'Sigmoid({h})')}, {linear(x, d, f)})")
                case 2:
                    h = new(f"Add({new(f'Tanh({h})')}, {held_as(double(3, 1, seed=seed))})")
                case 3:
                    h = new(f"Mul({new(f'Tanh({h})')}, {held_as(double(f, seed=seed) + 2)})")
                case 4:
                    h = new(f"Softmax({h})")
                case 5:
                    h = new(f"Mul({h}, {h})")
                case 6:
                    h = new(f"Transpose<perm = [0, 2, 1]>({h})")
                    h = new(f"Add({h}, {held_as(double(f, 3, seed=seed))})")
                    h = new(f"Transpose<perm = [0, 2, 1]>({new(f'Elu({h})')})")
                case 7:
                    lines.append(f"h{len(outputs)} = Relu({h})")
                    outputs.append(f"double[2, 3, {f}] h{len(outputs)}")
                case 8:
                    h = new(f"Max({h}, {held_as(double(3, f, seed=seed))})")
        y = linear(h, f, d)
        return new(f"Add({y}, {x})") if draw(st.integers(0, 5)) == 0 else y

    def attention(x: str, d: int) -> tuple[str, int]:
        size, heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 4]))
        kv = draw(st.sampled_from([1, heads]))
        parts = []
        for count in (heads, kv, kv):
            y = linear(x, d, count * size)
            y = new(f"Reshape({y}, {held_as(np.array([0, 0, count, size]))})")
            parts.append(new(f"Transpose<perm = [0, 2, 1, 3]>({y})"))
        q, k, v = parts
        scores = new(f"MatMul({q}, {new(f'Transpose<perm = [0, 1, 3, 2]>({k})')})")
        y = new(f"MatMul({new(f'Softmax({scores})')}, {v})")
        y = new(f"Transpose<perm = [0, 2, 1, 3]>({y})")
        return new(f"Reshape({y}, {held_as(np.array([0, 0, heads * size]))})"), heads * size

    d = draw(st.sampled_from([2, 4, 6]))
    value = linear("x", 5, d, plain=draw(st.booleans()))
    if draw(st.booleans()):
        value = new(f"Gather({held_as(double(7, d, seed=seed))}, ids)")
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            value = ffn(value, d)
        else:
            value, width = attention(value, d)
            value = linear(value, width, d)
    lines.append(f"y = MatMul({value}, {held_as(double(d, 3))})")
    inputs = "double[2, 3, 5] x, int64[2, 3] ids"
    text = f"({inputs}) => ({', '.join([*outputs, 'double[2, 3, 3] y'])})"
    return graph(f"{text} {{ {' '.join(lines)} }}", **held)


@given(blocks())
def test_any_block(model):
    result = fold(model, tolerance=1e-9)
    assert_same_function(model, result.model)
    assert weights(model) - weights(result.model) == result.report.saving.weights >= 0
