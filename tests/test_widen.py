"""Models in a wider type."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model

from onnx_fold.graph.widen import precision, widen
from onnx_fold.runtime import sessions

BFLOAT16 = ir.DataType.BFLOAT16.numpy()


BRANCHES = """
    m (float16[n] x, bool c) => (float16[n] y, float16[n] z)
    {
        half = Constant<value = float16 {11878}>()
        y = If(c) <
            then_branch = a () => (float16[n] p) { p = Mul(x, w) },
            else_branch = b () => (float16[n] q) { s = Cast<to = 1>(x)  q = Cast<to = 10>(s) }
        >
        z = Add(y, half)
    }
"""


def test_widening_keeps_values_and_leaves_the_model_alone():
    source = model(BRANCHES, w=np.array([0.1], np.float16))
    before = ir.to_proto(source).SerializeToString()
    wide = widen(source, ir.DataType.FLOAT)
    assert ir.to_proto(source).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(wide), full_check=True)
    assert {v.dtype for v in (*wide.graph.inputs, *wide.graph.outputs)} == {
        ir.DataType.FLOAT,
        ir.DataType.BOOL,
    }
    weight = wide.graph.initializers["w"].const_value
    assert isinstance(weight, ir.LazyTensor)
    assert weight.numpy()[0] == np.float32(np.float16(0.1))
    x = np.array([3.0], np.float32)
    y = sessions.run(sessions.session(wide), {"x": x, "c": np.array(True)})["y"]
    assert y[0] == 3 * np.float32(np.float16(0.1))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_rounding_is_that_of_the_narrow_type(dtype):
    name = "float16" if dtype == np.float16 else "bfloat16"
    source = model(
        f"m ({name}[n, 64] x) => ({name}[n, 64] y)"
        " { a = MatMul(x, w)  b = Tanh(a)  y = Add(b, x) }",
        w=np.random.default_rng(0).standard_normal((64, 64)).astype(dtype),
    )
    rounded = widen(source, ir.DataType.FLOAT, rounded=True)
    onnx.checker.check_model(ir.to_proto(rounded), full_check=True)
    assert rounded.graph.outputs[0].name == "y"
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(dtype)
    w = source.graph.initializers["w"].const_value.numpy().astype(np.float32)

    def narrow(array):
        return array.astype(dtype).astype(np.float32)

    wide = x.astype(np.float32)
    expected = narrow(narrow(np.tanh(narrow(wide @ w))) + wide)
    y = sessions.run(sessions.session(rounded), {"x": wide})["y"]
    np.testing.assert_array_equal(y, narrow(y))
    # A sum near a tie may round the other way: one unit in the last place, and seldom.
    np.testing.assert_allclose(y, expected, rtol=2.0**-7, atol=2.0**-7)
    assert np.mean(y == expected) > 0.95


def test_widening_to_double():
    source = model(
        "m (float[n] x) => (float[n] y)"
        " { c = Constant<value_float = 0.5>()  d = Cast<to = 1>(c)  y = Mul(x, d) }"
    )
    wide = widen(source, ir.DataType.DOUBLE)
    onnx.checker.check_model(ir.to_proto(wide), full_check=True)
    y = sessions.run(sessions.session(wide), {"x": np.ones(2)})["y"]
    assert y.dtype == np.float64
    with pytest.raises(ValueError, match="cannot widen"):
        widen(source, ir.DataType.FLOAT16)


def test_widening_of_functions():
    text = """
        <ir_version: 9, opset_import: ["": 18, "my": 1]>
        m (bfloat16[n] x) => (bfloat16[n] y) { y = my.twice(x) }
        <domain: "my", opset_import: ["": 18]>
        twice (a) => (b) { c = Cast<to = 16>(a)  b = Add(c, c) }
    """
    source = ir.from_onnx_text(text)
    wide = widen(source, ir.DataType.FLOAT, rounded=True)
    assert len(source.functions) == 1
    y = sessions.run(sessions.session(wide), {"x": np.ones(2, np.float32)})["y"]
    np.testing.assert_array_equal(y, [2, 2])


def test_precision_is_the_type_of_most_weights():
    weights = {"a": np.zeros(3, np.float32), "b": np.zeros(100, np.float16)}
    assert (
        precision(
            model(
                "m () => (float[3] y, float16[100] z) { y = Identity(a) z = Identity(b) }",
                **weights,
            )
        )
        == ir.DataType.FLOAT16
    )
    assert precision(model("m (double[1] x) => () { }")) == ir.DataType.DOUBLE
    assert precision(model("m (int64[1] x) => () { }")) == ir.DataType.FLOAT


def test_a_function_that_is_called_nowhere_hinders_nothing():
    text = """
        <ir_version: 9, opset_import: ["": 18, "my": 1]>
        m (float16[n] x) => (float16[n] y) { y = Neg(x) }
        <domain: "my", opset_import: ["": 17]>
        twice (a) => (b) { b = Add(a, a) }
    """
    source = ir.from_onnx_text(text)
    assert not widen(source, ir.DataType.DOUBLE).functions
    assert len(source.functions) == 1
