"""Calibration: real rows in the place of random ones."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import assert_same_function, fold, graph, normal

import onnx_fold
from onnx_fold.errors import UsageError
from onnx_fold.runtime.calibrate import record

HELD = {"M": normal(9, 16, seed=1), "O": normal(16, 6, seed=2), "R": normal(6, 64, seed=3)}


def model(kind: str = "float", dtype=np.float32):
    head = f"({kind}[b, n, 9] x) => ({kind}[b, n, 64] y)"
    body = "a = MatMul(x, M) h = Relu(a) s = MatMul(h, O) y = MatMul(s, R)"
    return graph(f"{head} {{ {body} }}", **{n: a.astype(dtype) for n, a in HELD.items()})


@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_records_what_every_layer_reads(kind, dtype):
    x = normal(2, 3, 9, dtype=dtype)
    seen = record(model(kind, dtype), {"x": x})
    assert {name: rows.shape for name, rows in seen.rows.items()} == {
        "x": (6, 9),
        "h": (6, 16),
        "s": (6, 6),
    }
    expected = np.maximum(x.reshape(6, 9).astype(np.float64) @ HELD["M"].astype(dtype), 0)
    np.testing.assert_allclose(seen.rows["h"], expected, rtol=1e-2, atol=1e-3)


def test_rows_that_are_never_active_are_not_picked(tmp_path):
    x = np.abs(normal(2, 3, 9))
    source = model()
    matrix = HELD["M"].copy()
    matrix[:, 4:] = -np.abs(matrix[:, 4:])  # dead for positive inputs
    matrix[:, :4] = np.abs(matrix[:, :4])
    matrix[:, 10:12] = 1.0
    source.graph.initializers["M"].const_value = ir.tensor(matrix, name="M")
    np.savez(tmp_path / "inputs.npz", x=x)
    result = fold(source, strategy="interpolate", calibrate=tmp_path / "inputs.npz")
    assert_same_function(source, result.model)
    kept = result.model.graph.initializers["M"].const_value.numpy()[:, -6:]  # the basis
    alive = (x.reshape(6, 9) @ kept > 0).any(axis=0)
    assert alive.all()


def test_inputs_that_do_not_fit():
    with pytest.raises(UsageError, match="unknown input 'z'"):
        onnx_fold.fold(model(), verify=False, calibrate={"z": np.zeros(1)})
