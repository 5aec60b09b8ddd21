"""BatchNorms that several layers read, or that stand in a residual stream: gains of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, folded, graph, normal, operators, proto, refused
from test_branches import bn, norm

HEAD = "(float[n, t, 16] x) => (float[n, t, 16] z)"
NORM = "{y}t = Transpose<perm = [0, 2, 1]>({x}) {y}n = BatchNormalization({y}t, {bn})"
NORM += " {y} = Transpose<perm = [0, 2, 1]>({y}n)"


def normed(x: str, y: str, seed: int) -> str:
    """``y``, the BatchNorm of the last axis of ``x``."""
    return NORM.format(x=x, y=y, bn=bn(seed))


def block(body: str, **held: np.ndarray) -> ir.Model:
    """A block between an activation and an activation."""
    text = f"{HEAD} {{ r = Relu(x) {body} z = Relu(e) }}"
    layers = {name: normal(16, 16, seed=ord(name)) for name in "PQRST" if f", {name})" in text}
    return graph(text, **layers, **held)


def gate(of: str) -> str:
    """Two layers of one value, multiplied: nothing linear reads that."""
    return f"q = MatMul({of}, Q) k = MatMul({of}, R) e = Mul(q, k)"


def test_it_goes_into_all_that_read_it() -> None:
    """PatchTST: gain, bias, mean and variance go, and two Transposes; a bias for each comes."""
    source = block(f"{normed('r', 'b', 0)} {gate('b')}", **norm(16, 0))
    result = folded(source)
    assert sorted(operators(result.ir)) == ["Add", "Add", "MatMul", "MatMul", "Mul", "Relu", "Relu"]
    assert result.report.saving.weights == 4 * 16 - 2 * 16


def test_of_rows() -> None:
    """Without other axes it needs no Transposes."""
    assert "BatchNormalization" not in operators(folded(without_transposes("n, 16")).ir)


def without_transposes(sizes: str):
    """A BatchNorm of axis 1 in front of two layers that read the last axis."""
    return graph(
        f"(float[{sizes}] x) => (float[{sizes}] z) {{ r = Relu(x)"
        f" b = BatchNormalization(r, {bn(0)}) {gate('b')} z = Relu(e) }}",
        Q=normal(16, 16),
        R=normal(16, 16, seed=1),
        **norm(16, 0),
    )


def test_in_front_of_one_layer() -> None:
    source = block(f"{normed('r', 'b', 0)} e = MatMul(b, P)", **norm(16, 0))
    assert sorted(operators(folded(source, 4 * 16 - 16).ir)) == ["Add", "MatMul", "Relu", "Relu"]


def test_behind_a_residual_sum() -> None:
    """Each sum is normed, and the result is the residual of the next: one stream in the end."""
    text = "p = MatMul(r, P) u = MatMul(p, S) s = Add(p, u) "
    source = block(f"{text}{normed('s', 'b', 0)} {gate('b')}", **norm(16, 0))
    found = operators(folded(source).ir)
    assert "BatchNormalization" not in found
    assert "Transpose" not in found


def test_a_chain_of_residual_sums() -> None:
    text = f"p = MatMul(r, P) {normed('p', 'c', 1)} a = MatMul(c, S) g = Relu(a)"
    text += " h = MatMul(g, T) s = Add(c, h)"
    text += f" {normed('s', 'b', 0)} {gate('b')}"
    found = operators(folded(block(text, **norm(16, 0), **norm(16, 1))).ir)
    assert "BatchNormalization" not in found


@pytest.mark.parametrize(
    "behind",
    [
        f"e = Exp(b) {gate('b').replace('e = Mul(q, k)', 'f = Mul(q, k)')}",
        "e = Exp(b)",
        "e = Mul(b, b)",
    ],
)
def test_it_stays_where_something_else_reads_it(behind: str) -> None:
    source = block(f"{normed('r', 'b', 0)} {behind}", **norm(16, 0))
    before = proto(source)
    refused(source)
    assert proto(source) == before


def test_it_stays_beside_folds_of_others() -> None:
    """It is written back as it was where only something else folds."""
    body = f"{normed('r', 'b', 0)} i = Exp(b) j = MatMul(i, P) k = MatMul(j, Q) e = Relu(k)"
    found = operators(folded(block(body, **norm(16, 0)), 16 * 16).ir)
    assert found.count("BatchNormalization") == 1
    assert found.count("Transpose") == 2


def test_other_channels_stay() -> None:
    """Those of the axis in the middle are no channels of the layers behind."""
    refused(without_transposes("n, 16, 16"))


def test_a_protected_one_stays() -> None:
    source = block(f"{normed('r', 'b', 0)} {gate('b')}", **norm(16, 0))
    assert not fold(source, protect=["bn"]).report.folded
