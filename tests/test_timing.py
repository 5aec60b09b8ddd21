"""The speed check: what is run, in which order, and how it is reported. No test asserts a time."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model as named
from rich.console import Console

from onnx_fold.engine.cost import bytes_read
from onnx_fold.errors import CannotWriteError, MissingExtraError, UsageError
from onnx_fold.runtime import sessions
from onnx_fold.runtime.inputs import cache_links
from onnx_fold.runtime.sessions import MissingKernelError
from onnx_fold.speed.operator_times import side_by_side
from onnx_fold.speed.plot import plot
from onnx_fold.speed.steps import Decode, cache_values, step_values
from onnx_fold.speed.timing import BenchReport, _paired, _phase, _spread, bench


def model(*, folded: bool = False, cached: bool = False, length: str = "seq", dtype: str = "float"):
    """Two projections or their product, with the keys of a cache beside them if ``cached``."""
    kind = ir.DataType[dtype.upper()].numpy()
    tail = "y = MatMul(x, pm)" if folded else "h = MatMul(x, p)  y = MatMul(h, m)"
    cache = f", {dtype}[batch, past, 4] past_key" if cached else ""
    present = f", {dtype}[batch, total, 4] present_key" if cached else ""
    concat = "present_key = Concat<axis = 1>(past_key, y)" if cached else ""
    eye = {name: np.eye(4).astype(kind) for name in (["pm"] if folded else ["p", "m"])}
    return ir.from_onnx_text(
        f'<ir_version: 9, opset_import: ["": 18]> m ({dtype}[batch, {length}, 4] x{cache})'
        f" => ({dtype}[batch, {length}, 4] y{present}) {{ {tail} {concat} }}",
        initializers=[ir.tensor(array, name=name) for name, array in eye.items()],
    )


def run(original, folded, **options):
    few = {"prefill": 6, "repeats": 3, "tokens": 3, "warmup": 1}
    return bench(original, folded, **{"provider": "cpu", **few, **options})


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


def images(name: str = "n") -> ir.Model:
    return named(
        f"""m (float[{name}, 3, 4, 4] x) => (float[{name}, 2, 4, 4] y)
        {{ y = Conv(x, w) }}""",
        w=np.ones((2, 3, 1, 1), np.float32),
    )


def test_a_model_without_tokens_runs():
    report = run(images(), images(), batch=[1, 3], prefill=[6, 8], repeats=4)
    found = [(p.name, p.batch, p.seq, p.past, p.pairs) for p in report.phases]
    assert found == [("run", 1, 1, 0, 4), ("run", 3, 1, 0, 4)]
    words = str(report)
    assert "4 runs of each" in words
    assert "rows/s" in words
    assert not re.search("token|prefill|decode|cache", words.split("- ", 1)[0])
    fixed = run(images("2"), images("2"), batch=[1, 3])
    assert [p.batch for p in fixed.phases] == [2]


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


class Written:
    """A step that writes down what is asked of it."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def reset(self):
        self.order.append(f"reset {self.name}")

    def prepare(self):
        self.order.append(f"prepare {self.name}")

    def run(self):
        self.order.append(self.name)


def test_pairs_alternate_and_warm_up_is_not_counted():
    order = []
    first, second = _paired(Written("A", order), Written("B", order), repeats=3, warmup=1)
    runs = "".join(entry for entry in order if len(entry) == 1)
    assert runs == "BA" + "AB" + "BA" + "AB"
    assert order[4:6] == ["reset A", "reset B"]
    assert [order[i - 1] for i, entry in enumerate(order) if entry == "A"] == ["prepare A"] * 4
    assert len(first) == len(second) == 3


@pytest.mark.parametrize(("loads", "pairs"), [(2, (4, 6)), (3, (3, 6)), (4, (4, 8))])
def test_both_models_are_loaded_again_in_the_other_order(monkeypatch, loads, pairs):
    names, loaded = {}, []
    session = sessions.session

    def written(source, *arguments, **options):
        loaded.append(names[id(source)])
        return session(source, *arguments, **options)

    original, folded = model(cached=True), model(cached=True, folded=True)
    names.update({id(original): "original", id(folded): "folded"})
    monkeypatch.setattr(sessions, "session", written)
    report = run(original, folded, repeats=3, tokens=5, loads=loads)
    assert loaded == [*["original", "folded", "folded", "original"] * 2][: 2 * loads]
    assert [(p.name, p.pairs, p.loads) for p in report.phases] == [
        ("prefill", pairs[0], loads),
        ("decode", pairs[1], loads),
    ]
    for name, count in zip(("prefill", "decode"), pairs, strict=True):
        assert f"{name}: {count} pairs in {loads} loads" in str(report)


def test_a_model_against_itself(tmp_path):
    ir.save(model(cached=True), tmp_path / "a.onnx")
    report = run(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert report.bytes_ratio == report.read_ratio == 1
    assert all(phase.low <= phase.speedup <= phase.high for phase in report.phases)
    assert report.names == ("original", "folded")


def test_columns_are_named_by_the_files(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        ir.save(model(cached=True), tmp_path / name)
    report = run(tmp_path / "a.onnx", tmp_path / "b.onnx", profile=True)
    assert report.names == ("a.onnx", "b.onnx")
    assert re.search(r"past +a\.onnx +b\.onnx +tokens/s", str(report))
    assert re.search(r"nodes +b\.onnx +µs +b\.onnx", str(report))
    assert BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(("seconds", "pairs"), [(-1.0, 3), (1e9, 8)])
def test_a_phase_ends_in_time(seconds, pairs):
    order = []
    times = _paired(Written("A", order), Written("B", order), 8, 2, seconds)
    assert [len(each) for each in times] == [pairs, pairs]
    assert order.count("A") == pairs + (1 if seconds < 0 else 2)


def test_decode_feeds_each_step_what_the_last_one_left():
    source = model(cached=True)
    shape = 2, 1, 3
    cache = cache_values(source, 2, 3, "cpu", seed=0)
    steps = [step_values(source, shape, "cpu", seed=i) for i in range(3)]
    decode = Decode(sessions.session(source), cache, steps, cache_links(source), "cpu")
    for _ in range(2):  # a loop can be run again
        decode.reset()
        for _ in steps:
            decode.prepare()
            decode.run()
    keys = decode._binding.get_outputs()[1].numpy()
    expected = [cache["past_key"].numpy(), *(step["x"].numpy() for step in steps)]
    np.testing.assert_array_equal(keys, np.concatenate(expected, axis=1))


def test_layers_share_one_drawn_cache():
    source = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["": 18]> m (float16[b, 2, past, 4] past_a,'
        " float16[b, 2, past, 4] past_b, float[b, past, 4] past_c, int64[b, s] ids) => () { }"
    )
    values = cache_values(source, 2, 5, "cpu", seed=0)
    assert values["past_a"] is values["past_b"]
    assert [value.shape() for value in values.values()] == [[2, 2, 5, 4]] * 2 + [[2, 5, 4]]
    assert list(step_values(source, (2, 1, 5), "cpu", seed=0)) == ["ids"]


def test_every_batch_meets_every_length():
    report = run(model(cached=True), model(cached=True), batch=[1, 2], prefill=[3, 5], tokens=2)
    shapes = [(p.batch, p.seq, p.past) for p in report.phases]
    decodes = [(1, 1, 3), (1, 1, 5), (2, 1, 3), (2, 1, 5)]
    assert shapes[::2] == [(1, 3, 0), (1, 5, 0), (2, 3, 0), (2, 5, 0)]
    assert shapes[1::2] == decodes


def test_a_cache_of_fixed_length_does_not_grow():
    source = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["": 18]> m (float[b, s, 4] x, float[b, 6, 4] past_key)'
        " => (float[b, s, 4] y, float[b, 6, 4] present_key)"
        " { y = Neg(x) present_key = Identity(past_key) }"
    )
    report = run(source, source)
    assert any("its length is fixed" in note for note in report.notes)
    assert [p.past for p in report.phases] == [6, 6]


def test_a_cache_that_outgrows_the_model_is_said():
    source = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["": 18]> m (int64[b, s] ids, float[b, past, 4] past_key)'
        " => (float[b, t, 4] present_key)"
        " { past = Shape<start=1, end=2>(past_key) zeros = Sub(ids, ids) n = Add(past, zeros)"
        "   e = Gather(table, n) present_key = Concat<axis=1>(past_key, e) }",
        initializers=[ir.tensor(np.zeros((8, 4), np.float32), name="table")],
    )
    report = run(source, source, prefill=6, tokens=8, loads=2)
    assert [p.name for p in report.phases] == ["prefill"]
    assert any("decode of 4 tokens was left out" in note for note in report.notes)


def test_of_tables_that_are_looked_up_by_row_one_row_is_read():
    lookup = "m (int64[n] i) => (float[n, 4] y) { e = Gather(t, i)  y = MatMul(e, w) }"
    model_ = named(lookup, t=np.zeros((9, 4), np.float32), w=np.zeros((4, 4), np.float32))
    assert bytes_read(model_) == 64 + 4 * 4


def test_ratio_and_spread_of_known_times():
    times = np.array([[2.0, 4.0], [1.0, 2.0]]) * 1e-3, np.array([[9.0, 2.0], [3.0, 1.0]]) * 1e-3
    phase = _phase("decode", (3, 1, 0), times, seed=0)
    assert (phase.pairs, phase.loads) == (4, 2)
    assert phase.speedup == pytest.approx(2)
    assert phase.original.median_ms == pytest.approx(3)
    assert phase.original.tokens_per_second == pytest.approx(12 / 17e-3)
    assert phase.low == pytest.approx(2)
    assert phase.high == pytest.approx(3)
    assert phase == _phase("decode", (3, 1, 0), times, seed=0)


def test_what_loads_differ_by_is_part_of_the_spread():
    """Pairs that agree within each load say nothing of what a further load would be."""
    rng = np.random.default_rng(0)
    luck = [0.9, 1.0, 1.1, 1.2]
    loads = [each + 1e-3 * rng.standard_normal(50) for each in luck]
    low, high = _spread(loads, seed=0)
    assert low == pytest.approx(0.9, abs=0.06)
    assert high == pytest.approx(1.2, abs=0.06)
    same = [1.0 + 1e-3 * rng.standard_normal(50) for _ in luck]
    low, high = _spread(same, seed=0)
    assert high - low < 1e-3


def test_the_spread_covers_what_is_true():
    """Of 100 measurements with 12 loads, each with its luck, at least 85 hold the true ratio, 1."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        luck = 1 + 0.02 * rng.standard_normal((12, 1))
        low, high = _spread(luck + 0.01 * rng.standard_normal((12, 8)), seed, resamples=100)
        held += low <= 1 <= high
    assert held >= 85


def test_a_report_that_does_not_count_its_loads_has_two():
    data = run(model(), model()).to_dict()
    del data["names"]
    for phase in data["phases"]:
        del phase["loads"]
    report = BenchReport.from_dict(data)
    assert {phase.loads for phase in report.phases} == {2}
    assert report.names == ("original", "folded")


@pytest.mark.parametrize(
    "bad",
    [
        {"repeats": 0},
        {"tokens": 0},
        {"batch": 0},
        {"prefill": [8, 0]},
        {"past": -1},
        {"warmup": -1},
        {"loads": 1},
    ],
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
    data = json.loads(json.dumps(report.to_dict()))
    assert data["phases"][1]["name"] == "decode"
    assert data["environment"]["provider"] == "cpu"
    assert BenchReport.from_dict(data) == report
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(report)
    for word in ("prefill", "decode", "speed-up", "bytes ratio 2.000x"):
        assert word in capture.get()


@pytest.mark.parametrize("batch", [1, [1, 2]])
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture(tmp_path, batch, suffix):
    report = run(model(cached=True), model(cached=True), batch=batch, prefill=[3, 5])
    for name in ("a", "b"):
        plot(report, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    with pytest.raises(CannotWriteError, match="ends in"):
        plot(report, tmp_path / "a.txt")


def test_a_picture_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="bench"):
        plot(run(model(), model()), Path("a.svg"))


def test_where_the_time_goes():
    report = run(model(cached=True), model(cached=True, folded=True), profile=True)
    nodes = {(o.phase, o.operator): (o.original_nodes, o.folded_nodes) for o in report.operators}
    assert nodes["prefill", "MatMul"] == nodes["decode", "MatMul"] == (2, 1)
    assert nodes["decode", "Concat"] == (1, 1)
    assert BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(report)
    assert "Where the time of decode goes" in capture.get()


def test_operators_side_by_side_the_dearest_first():
    first, second, third = side_by_side("decode", {"A": (1, 2.0), "B": (2, 5.0)}, {"C": (1, 9.0)})
    assert [first.operator, second.operator, third.operator] == ["C", "B", "A"]
    assert (second.original_nodes, second.folded_nodes) == (2, 0)
    assert (second.original_us, second.folded_us) == (5.0, 0.0)
