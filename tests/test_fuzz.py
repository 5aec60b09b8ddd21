"""Differential fuzzing: random models are the same function after a fold, and valid.

A fixed budget here; ``make fuzz`` looks further, each time elsewhere.
"""

import os

import numpy as np
import onnx
import onnx_ir as ir
from fuzz import BATCH, SEQ, models
from helpers import feeds, fold, outputs, proto, weights
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from onnx_fold.algebra.precision import SIXTEEN_BITS, unit_roundoff
from onnx_fold.graph.constants import FLOATS
from onnx_fold.graph.widen import widen

EXAMPLES = int(os.environ.get("ONNX_FOLD_FUZZ", "0"))
BUDGET = settings(
    derandomize=not EXAMPLES,
    max_examples=EXAMPLES or 150,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SLACK = 100.0  # times the effect of rounding the weights of the original once more
READ = {"objective": "bytes-read"}
OPTIONS = [{}, {}, READ, {"only": ["merge"]}, {"skip": ["merge"]}, {"pivot": "k"}]
FORCED = [{"strategy": name} for name in ("absorb", "interpolate", "select")]


@given(models(), st.sampled_from(OPTIONS + FORCED))
@BUDGET
def test_any_model(model, options):
    if "strategy" in options and weight_type(model) in SIXTEEN_BITS:
        options = {}  # forced whatever the error
    note(onnx.printer.to_text(ir.to_proto(model)))
    before = proto(model)
    result = fold(model, **options)
    assert proto(model) == before, "the source was changed"
    saved = weights(model) - weights(result.model)
    assert saved == result.report.saving.weights
    if not result.report.folded:
        assert proto(result.model) == before
        return
    assert saved >= 0 or options is READ
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert_same_function(model, result.model)
    if options is READ:
        assert result.report.saving.before.read >= result.report.saving.after.read
        return  # the second one may let the model grow once more
    assert not fold(result.model, **options).report.folded, "a second fold finds more"


def assert_same_function(model: ir.Model, folded: ir.Model) -> None:
    """The difference is no larger than what rounding the weights once more could make."""
    unit = unit_roundoff(weight_type(model))
    original, folded = executable(model), executable(folded)
    inputs = feeds(original, {"batch": BATCH, "seq": SEQ})
    expected, actual = outputs(original, **inputs), outputs(folded, **inputs)
    rounded = outputs(nudged(original, unit), **inputs)
    assert list(expected) == list(actual)
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape, name
        size = max(np.linalg.norm(reference), 1e-3)
        own = np.linalg.norm(rounded[name] - reference) + unit * size
        assert np.linalg.norm(actual[name] - reference) <= SLACK * own, name


def weight_type(model: ir.Model) -> ir.DataType:
    return model.graph.inputs[0].dtype


def executable(model: ir.Model) -> ir.Model:
    """With the same weights, in a type for which ONNX Runtime has kernels on the CPU."""
    return widen(model, ir.DataType.DOUBLE) if weight_type(model) in SIXTEEN_BITS else model


def nudged(model: ir.Model, unit: float) -> ir.Model:
    """A copy whose weights are rounded up or down by ``unit``."""
    copy, rng = model.clone(), np.random.default_rng(0)
    for value in copy.graph.initializers.values():
        if value.const_value.dtype in FLOATS:
            array = value.const_value.numpy()
            factor = 1.0 + unit * rng.choice((-1.0, 1.0), array.shape)
            value.const_value = ir.tensor((array * factor).astype(array.dtype), name=value.name)
    return copy
