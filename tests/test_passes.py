"""Passes inside somebody else's pipeline: one that fails leaves the model as it was."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import assert_same_function, chain, fold, graph, normal, proto, square
from onnx_ir.passes import PassError, Sequential

from onnx_fold.engine.candidate import Options
from onnx_fold.engine.folding import FoldPass
from onnx_fold.passes import AbsorbPass, MergePass

D = 6


class Failing(FoldPass):
    """Proposes what merging would, and then fails."""

    name = "failing"
    is_basis_change = False
    good = 0

    def candidates(self, stream):
        if self.good == 0:
            raise RuntimeError("a mistake in a pass")
        self.good -= 1
        yield from MergePass(self.options).candidates(stream)


def two_streams() -> ir.Model:
    """Two places to fold, one behind a gain."""
    text = f"""(float[n, {D}] x, float[n, {D}] z) => (float[n, 5] y, float[n, 5] w)
        {{ p = MatMul(x, P) g = Mul(p, G) y = MatMul(g, M) q = MatMul(z, Q) w = MatMul(q, M2) }}"""
    held = {"P": square(D, 1), "M": normal(D, 5), "Q": square(D, 2), "M2": normal(D, 5, seed=4)}
    return graph(text, G=1 + normal(D, seed=3), **held)


@pytest.mark.parametrize("good", [0, 1])
def test_a_pass_that_fails_leaves_the_model_as_it_was(good):
    model = two_streams()
    before = proto(model)
    failing = Failing()
    failing.good = good
    with pytest.raises(PassError):
        Sequential(failing)(model)
    assert proto(model) == before


def test_a_pass_that_finds_nothing_leaves_the_model_as_it_was():
    model = chain("r = Relu(p)", "m = Mul(r, g)", g=1 + normal(4))
    before = proto(model)
    result = Sequential(MergePass(), AbsorbPass())(model)
    assert not result.modified
    assert proto(model) == before


def test_passes_fold_in_place():
    model = two_streams()
    original = model.clone()
    assert Sequential(MergePass(), AbsorbPass())(model).modified
    assert_same_function(original, model, {"n": 3})
    assert sum(np.prod(v.shape.numpy()) for v in model.graph.initializers.values()) == 2 * D * 5


def test_the_stated_shape_of_a_picked_weight_goes_with_the_weight():
    text = f"""(float[n, 2, 8] x, int64[n] i) => (float[n, 2, 5] y) <float[n, {D}, 5] w>
        {{ p = MatMul(x, P) w = Gather(E, i) y = MatMul(p, w) }}"""
    model = graph(text, P=normal(8, D), E=normal(2, D, 5))
    result = fold(model, only=["merge"])
    assert result.report.folded
    assert_same_function(model, result.model, {"n": 3})
    (picked,) = (node.outputs[0] for node in result.model.graph if node.op_type == "Gather")
    assert picked.shape is None


def test_options_of_a_pass_are_keywords():
    assert AbsorbPass(tolerance=1e-3).options == Options(tolerance=1e-3)
    assert AbsorbPass(Options(pivot="q"), force=True).options == Options(pivot="q", force=True)
    with pytest.raises(TypeError, match="tolerence"):
        AbsorbPass(tolerence=1e-3)
    model = two_streams()
    assert not Sequential(MergePass(protect=set("PQG") | {"M", "M2"}))(model.clone()).modified
    assert Sequential(MergePass())(model).modified
