"""The error of a planned change is predicted from what the change says, and from nothing else."""

import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from helpers import graph, normal, square, stream_of
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_fold
from onnx_fold.algebra.basis import TOLERANCES, Basis
from onnx_fold.algebra.expression import SAMPLE, FoldedTensor, scale
from onnx_fold.engine import Rewrite, become_identity, candidate, rebase
from onnx_fold.engine.probe import Subject, probe
from onnx_fold.rewriting.record import Held

ONNX = {np.float64: "double", np.float32: "float", np.float16: "float16"}
BOTH = "s = MatMul(x, W) y = MatMul(s, R) z = MatMul(s, T)"


def model(body: str, results: str, dtype: type = np.float64, **held: np.ndarray) -> ir.Model:
    kind = ONNX[dtype]
    outputs = ", ".join(f"{kind}[n, {size}] {name}" for name, size in
                        (each.split(":") for each in results.split()))  # fmt: skip
    inputs = f"{kind}[n, {held['W'].shape[0]}] x"
    typed = {name: array.astype(dtype) for name, array in held.items()}
    return graph(f"({inputs}) => ({outputs}) {{ {body} }}", **typed)


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_an_exact_change_has_an_error_of_rounding(d, seed):
    held = {"W": normal(9, d, seed=seed), "R": normal(d, 5, seed=seed + 1), "T": square(d, seed)}
    stream = stream_of(model(BOTH, f"y:5 z:{d}", **held), "s")
    pivot = stream.readers[1]
    rewrite = rebase(stream, Basis(pivot.matrix), pivot=pivot)
    become_identity(rewrite, pivot)
    error, own = probe(stream, rewrite)
    assert 0.0 <= own < TOLERANCES[ir.DataType.DOUBLE]
    assert 0.0 <= error < TOLERANCES[ir.DataType.DOUBLE]


def test_a_wrong_change_and_an_overflow_are_seen():
    held = {"W": normal(9, 4), "R": normal(4, 5)}
    body = "s = MatMul(x, W) y = MatMul(s, R)"
    stream = stream_of(model(body, "y:5", np.float16, **held), "s")
    (writer,), (reader,) = stream.writers, stream.readers
    wrong = Rewrite({reader.edge: reader.store(scale(reader.matrix, -1.0))})
    assert probe(stream, wrong)[0] == pytest.approx(2.0, rel=1e-2)
    large = {
        end.edge: end.store(scale(end.matrix, by)) for end, by in ((writer, 1e6), (reader, 1e-6))
    }
    assert probe(stream, Rewrite(large))[0] == np.inf


def test_writers_that_read_one_value_read_the_same_rows():
    """Two branches that all but cancel each other: what is left is what the readers see."""
    near = normal(8, 8)
    held = {"W": near, "V": near - 1e-3 * square(8), "R": normal(8, 5)}
    body = "a = MatMul(x, W) b = MatMul(x, V) s = Sub(a, b) y = MatMul(s, R)"
    stream = stream_of(model(body, "y:5", np.float16, **held), "s")
    unchanged = {end.edge: end.store(end.matrix) for end in (*stream.writers, *stream.readers)}
    error, own = probe(stream, Rewrite(unchanged))
    assert error == own < 1e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_sample_predicts_as_well_as_the_whole(dtype):
    """The same basis change, of layers wider than a sample and of ones cut into narrow layers."""
    width = 2 * SAMPLE
    w, t, r = normal(3 * width, width), normal(width, width, seed=1), normal(width, 3 * width)
    whole = model(
        "s = MatMul(x, W) y = MatMul(s, R) z = MatMul(s, T)",
        f"y:{3 * width} z:{width}",
        dtype,
        W=w,
        R=r,
        T=t,
    )
    rows, columns = np.split(w, 6), np.split(r, 6, axis=1)
    held = {f"W{i}": part for i, part in enumerate(rows)} | {
        f"R{i}": part for i, part in enumerate(columns)
    }
    names = [f"p{i}" for i in range(6)]
    body = f"{', '.join(f'x{i}' for i in range(6))} = Split<axis = -1, num_outputs = 6>(x) "
    body += " ".join(f"{name} = MatMul(x{i}, W{i})" for i, name in enumerate(names))
    body += f" s = Sum({', '.join(names)}) z = MatMul(s, T) "
    body += " ".join(f"y{i} = MatMul(s, R{i})" for i in range(6))
    results = " ".join(f"y{i}:{SAMPLE}" for i in range(6)) + f" z:{width}"
    parts = model(body, results, dtype, T=t, W=w, **held)
    errors = []
    for each in (whole, parts):
        stream = stream_of(each, "s")
        (pivot,) = [reader for reader in stream.readers if reader.is_square]
        rewrite = rebase(stream, Basis(pivot.matrix), pivot=pivot)
        become_identity(rewrite, pivot)
        errors.append(probe(stream, rewrite))
    assert errors[0] == pytest.approx(errors[1], rel=0.3)


D, FFN = 16, 40
ROTATED = """p = Pow(s, two) m = ReduceMean<keepdims = 1>(p, last) e = Add(m, eps) r = Sqrt(e)
    u = Div(s, r) n = Mul(u, g) y = MatMul(n, T) z = MatMul(n, U)"""
HEADS = """y = MatMul(s, T) z = MatMul(s, U) y4 = Reshape(y, heads) z4 = Reshape(z, heads)
    yt = Transpose<perm = [0, 2, 1, 3]>(y4) zt = Transpose<perm = [0, 2, 3, 1]>(z4)
    c = MatMul(yt, zt) v = Softmax(c)"""
STRATEGIES = ("absorb", "interpolate", "select", "rotate")
CASES = {  # strategy → body, from x to y, z or v
    "merge": "s = MatMul(x, W) y = MatMul(s, R) z = MatMul(s, U)",
    "absorb": "s = MatMul(x, W) y = MatMul(s, T) z = MatMul(s, U)",
    "absorb a part": "s = MatMul(x, W) f = MatMul(s, F) y, z = Split<axis = -1>(f, sizes)",
    "absorb a writer": """h = Relu(x) a = MatMul(h, W) b = MatMul(w, T) c = Add(b, B)
        s = Add(a, c) y = MatMul(s, R)""",
    "interpolate": "h = Relu(x) s = MatMul(h, W) y = MatMul(s, R) z = MatMul(s, U)",
    "interpolate, a bias": "s = Gemm(x, W, B) y = MatMul(s, R) z = MatMul(s, U)",
    "interpolate, columns": """a = MatMul(x, W) b = MatMul(w, V) s = Add(a, b)
        y = MatMul(s, M) z = Relu(y)""",
    "interpolate, hidden": "h = MatMul(x, N) i = Relu(h) s = MatMul(i, W) y = MatMul(s, R)",
    "select": f"s = MatMul(x, W) {HEADS}",
    "rotate": f"s = MatMul(x, W) {ROTATED}",
    "branches": "a = MatMul(x, W) b = MatMul(x, X) c = MatMul(b, Y) s = Add(a, c) y = Relu(s)",
    "split": "s = MatMul(x, G) a, z = Split<axis = -1>(s, sizes) y = MatMul(a, R)",
    "split, a bias": "p = MatMul(x, G) s = Add(p, I) a, z = Split<axis = -1>(s, sizes)"
    " b = Add(a, B) y = MatMul(b, R)",
    "split, two readers": "s = MatMul(x, G) a, b = Split<axis = -1>(s, sizes) y = MatMul(a, R)"
    " z = MatMul(a, L)",
    "concat": "a = MatMul(x, W) b = MatMul(w, V) s = Concat<axis = -1>(a, b) y = MatMul(s, C)",
}
HELD = {
    "W": normal(FFN, D, seed=1),
    "R": normal(D, 5, seed=2),
    "U": normal(D, 16, seed=3),
    "T": square(D, 4),
    "F": np.hstack([square(D, 5), normal(D, 8, seed=6)]),
    "B": normal(D, seed=7),
    "V": normal(D, D, seed=8),
    "M": normal(D, 40, seed=9),
    "N": normal(FFN, FFN, seed=10),
    "X": normal(FFN, 4, seed=11),
    "Y": normal(4, D, seed=12),
    "C": normal(2 * D, 7, seed=12),
    "G": normal(FFN, D + 8, seed=14),
    "I": normal(D + 8, seed=15),
    "L": normal(D, 6, seed=16),
    "g": 1.0 + normal(D, seed=13),
    "two": np.array(2.0),
    "eps": np.array(0.1),
}
INTEGERS = {"sizes": [D, 8], "heads": [0, 0, 4, 4], "last": [-1]}


def case(name: str) -> ir.Model:
    body = CASES[name]
    made = [each for each in ("y", "z", "v") if f"{each} =" in body or f"{each}, " in body]
    results = ["v"] if "v" in made else [each for each in made if f"Relu({each})" not in body]
    dims = "b, h, n, k" if results == ["v"] else "b, n, k"
    outputs = ", ".join(f"double[{dims.replace('k', 'k' + each)}] {each}" for each in results)
    inputs = ["x"] if "w" not in body.replace("two", "") else ["x", "w"]
    read = ", ".join(f"double[b, n, {FFN if each == 'x' else D}] {each}" for each in inputs)
    arrays = {key: array.astype(np.float64) for key, array in HELD.items()}
    arrays |= {key: np.array(numbers) for key, numbers in INTEGERS.items()}
    used = {key: each for key, each in arrays.items() if re.search(rf"[(,] ?{key}[,)]", body)}
    return graph(f"({read}) => ({outputs}) {{ {body} }}", **used)


def probed(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Subject, Rewrite]]:
    """Every change that is probed when the strategy of a case is asked alone."""
    found: list[tuple[str, Subject, Rewrite]] = []

    def record(subject: Subject, rewrite: Rewrite, *rest: object) -> tuple[float, float]:
        errors = [probe(subject, rewrite), *spoiled(subject, rewrite)]
        found.append((name, subject, errors))
        return probe(subject, rewrite, *rest)

    monkeypatch.setattr(candidate, "probe", record)
    only = name.split(",")[0].split()[0]
    how = {"strategy": only, "force": True} if only in STRATEGIES else {"only": only}
    onnx_fold.fold(case(name), objective="size", verify=False, **how)
    return found


def spoiled(subject: Subject, rewrite: Rewrite) -> list[tuple[float, float]]:
    """The errors of the same change with one of its matrices negated, for each of them."""
    errors = []
    own = {member.edge for member in subject.members}
    for edge, tensor in rewrite.stored.items():
        if edge in own and isinstance(tensor, FoldedTensor) and len(tensor.shape) > 1:
            wrong = FoldedTensor(scale(tensor.expression, -1.0), tensor.dtype)
            errors.append(probe(subject, replace(rewrite, stored=rewrite.stored | {edge: wrong})))
    for held in rewrite.recorded:
        tensor = held.content if isinstance(held, Held) else None
        if isinstance(tensor, FoldedTensor) and len(tensor.shape) > 1:
            wrong = FoldedTensor(scale(tensor.expression, -1.0), tensor.dtype)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(held.__dict__, "content", wrong)
                errors.append(probe(subject, rewrite))
    return errors


@pytest.mark.parametrize("name", CASES)
def test_every_new_weight_counts(name, monkeypatch):
    """The change of every strategy has an error of rounding; with one matrix negated it has not."""
    found = probed(name, monkeypatch)
    assert found, "nothing was probed"
    for _, _, ((error, own), *wrong) in found:
        assert max(error, own) < 1e-12
        assert min(each for each, _ in wrong) > 0.05
