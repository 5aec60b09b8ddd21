"""The speed check: what is run, in which order, and how it is reported. No test asserts a time."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from onnx_fold.bench import _paired, _phase, bench
from onnx_fold.errors import UsageError
from onnx_fold.runtime import MissingKernelError


def model(*, folded: bool = False, cached: bool = False, length: str = "seq", dtype: str = "float"):
    """Two projections or their product, with the keys of a cache beside them if ``cached``."""
    kind = ir.DataType[dtype.upper()].numpy()
    tail = "y = MatMul(x, pm)" if folded else "h = MatMul(x, p)  y = MatMul(h, m)"
    cache = f", {dtype}[batch, past, 4] past_key" if cached else ""
    present = f", {dtype}[batch, total, 4] key" if cached else ""
    concat = "key = Concat<axis = 1>(past_key, y)" if cached else ""
    eye = {name: np.eye(4).astype(kind) for name in (["pm"] if folded else ["p", "m"])}
    return ir.from_onnx_text(
        f'<ir_version: 9, opset_import: ["": 18]> m ({dtype}[batch, {length}, 4] x{cache})'
        f" => ({dtype}[batch, {length}, 4] y{present}) {{ {tail} {concat} }}",
        initializers=[ir.tensor(array, name=name) for name, array in eye.items()],
    )


def run(original, folded, **options):
    return bench(original, folded, **{"prefill": 6, "repeats": 3, "warmup": 1, **options})


def test_prefill_and_decode_with_a_cache():
    report = run(model(cached=True), model(cached=True, folded=True), batch=2, past=9, threads=1)
    assert [(p.name, p.batch, p.seq, p.past) for p in report.phases] == [
        ("prefill", 2, 6, 0),
        ("decode", 2, 1, 9),
    ]
    assert (report.bytes_original, report.bytes_folded, report.bytes_ratio) == (128, 64, 2)
    assert report.notes == []
    for phase in report.phases:
        assert 0 < phase.original.median_ms <= phase.original.p90_ms
        assert 0 < phase.low <= phase.speedup <= phase.high


def test_decode_without_a_cache_is_one_token_and_said():
    report = run(model(), model(folded=True), past=9)
    assert [(p.seq, p.past) for p in report.phases] == [(6, 0), (1, 0)]
    assert report.notes == ["the model has no cache: decode is a run of one token"]


def test_the_past_is_as_long_as_the_prefill_by_default():
    report = run(model(cached=True), model(cached=True, folded=True))
    assert [p.past for p in report.phases] == [0, 6]


def test_a_phase_that_cannot_run_is_left_out():
    broken = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["": 18]> m (float[batch, seq, 4] x) => (float[b, s, d] y)'
        " { y = Reshape(x, shape) }",
        initializers=[ir.tensor(np.array([1, 6, 4]), name="shape")],
    )
    report = run(broken, broken)
    assert [p.name for p in report.phases] == ["prefill"]
    assert any(note.startswith("decode was left out: ONNX Runtime") for note in report.notes)
    with pytest.raises(UsageError, match="prefill was left out"):
        run(broken, broken, prefill=7)


def test_fixed_lengths_are_reported_as_they_ran():
    report = run(model(length="3"), model(length="3", folded=True))
    assert [p.seq for p in report.phases] == [3]
    assert any("shape of the inputs is fixed" in note for note in report.notes)


def test_pairs_alternate_and_warm_up_is_not_counted():
    order = []
    steps = [lambda: order.append("A"), lambda: order.append("B")]
    first, second = _paired(*steps, repeats=3, warmup=1)
    assert "".join(order) == "BA" + "AB" + "BA" + "AB"
    assert len(first) == len(second) == 3


def test_ratio_and_spread_of_known_times():
    times = np.array([2.0, 4.0, 9.0, 2.0]) * 1e-3, np.array([1.0, 2.0, 3.0, 1.0]) * 1e-3
    phase = _phase("decode", (1, 1, 0), times, seed=0)
    assert phase.speedup == pytest.approx(2)
    assert phase.original.median_ms == pytest.approx(3)
    assert phase.low == pytest.approx(2)
    assert phase.high == pytest.approx(3)
    assert phase == _phase("decode", (1, 1, 0), times, seed=0)


@pytest.mark.parametrize(
    "bad", [{"repeats": 0}, {"batch": 0}, {"prefill": 0}, {"past": -1}, {"warmup": -1}]
)
def test_numbers_that_make_no_sense(bad):
    with pytest.raises(UsageError, match="at least"):
        run(model(), model(folded=True), **bad)


def test_providers():
    with pytest.raises(UsageError, match="unknown provider"):
        run(model(), model(folded=True), provider="tpu")
    with pytest.raises(UsageError, match="cuda_graph needs"):
        run(model(), model(folded=True), cuda_graph=True)
    with pytest.raises(MissingKernelError, match="MatMul"):
        run(model(dtype="bfloat16"), model(dtype="bfloat16", folded=True))


def test_the_report_is_json_and_reads_well():
    report = run(model(cached=True), model(cached=True, folded=True))
    assert json.loads(json.dumps(report.to_dict()))["phases"][1]["name"] == "decode"
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(report)
    for word in ("prefill", "decode", "speed-up", "bytes ratio 2.000x"):
        assert word in capture.get()
