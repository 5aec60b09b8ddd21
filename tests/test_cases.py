"""Small valid models that were once folded wrongly, a kind of mistake each.

dead: a skip times zero that broadcasts. zerogain: ``p + p * zeros``. bad_convpads: a padded Conv
reads a bias. bad_rankgain, bad_rankwriter: a gain, a weight with more axes than the value.
convcastbias: a bias that is computed. bad_leftbatch: several matrices on the left. bad_custom*:
functions of another domain that are called like standard operators. hang_double30: thirty times
``s = s + s``. rec_identity: two hundred Identity on a weight. gemmscalar: a scalar bias with a
factor. reducecrash: a channel axis of width 1 that an operand does not have. crash_refattr: a
Constant that takes its value from an attribute of a function.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_close, feeds, fold, outputs, proto

FILES = sorted((Path(__file__).parent / "cases").glob("*.onnx"))
OPTIONS = [{}, *({"strategy": name} for name in ("merge", "absorb", "interpolate", "select"))]
SIZES = [(2, 3, 4, 5), (3, 2, 3, 2), (1, 1, 2, 3), (2, 3, 1, 1), (1, 1, 1, 1)]
"""Sizes of the free dims, by order of appearance: all different, some the same, some 1."""


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.get("strategy", "default"))
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_case(path, options):
    model = ir.load(path)
    before = proto(model)
    result = fold(model, **options)
    assert proto(model) == before, "the source was changed"
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    compared = 0
    for sizes in SIZES:
        inputs = feeds(model, dict(zip(free_dims(model), sizes, strict=False)))
        try:
            expected = outputs(model, **inputs)
        except Exception:  # these sizes do not fit each other
            continue
        actual = outputs(result.model, **inputs)
        compared += 1
        for name, reference in expected.items():
            assert_close(actual[name], reference, f"{name} at {sizes}")
    assert compared


def free_dims(model: ir.Model) -> list[str]:
    dims = [dim for value in model.graph.inputs for dim in value.shape]
    return list(dict.fromkeys(dim.value for dim in dims if not isinstance(dim, int)))


def test_there_are_cases():
    assert len(FILES) == 15
    assert all(np.prod(path.stat().st_size) < 10_000 for path in FILES)
