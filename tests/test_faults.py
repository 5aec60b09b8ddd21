"""The score of the check: of the faults planted in folded models all are noticed."""

import pytest

pytest.importorskip("torch")
from faults import DTYPES, MODELS, folded, score

import onnx_fold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", MODELS)
def test_no_fault_goes_unnoticed(preset, dtype, capsys):
    planted, missed = score(preset, dtype, cache=False, seed=0, weights=2)
    with capsys.disabled():
        print(f"\n{preset} {dtype}: {len(planted) - len(missed)} of {len(planted)} faults noticed")
    assert not missed, [f"{fault.kind} in {fault.weight}" for fault in missed]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["tiny-gqa", "tiny-mha", "tiny-parallel", "tiny-palm"])
def test_a_right_model_is_not_refused(preset, dtype):
    report = onnx_fold.verify(*folded(preset, dtype, cache=True, seed=1))
    assert report, report.reason
