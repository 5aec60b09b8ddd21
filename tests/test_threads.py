"""Two computations at a time: streams that share no layer are decided side by side."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.linalg
from helpers import graph, normal, outputs, proto
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

import onnx_fold
from onnx_fold.algebra.device import divide
from onnx_fold.algebra.storage import Spool
from onnx_fold.base import threads
from onnx_fold.base.threads import once, processors, two_at_a_time
from onnx_fold.engine import Basis, FoldPass, Options, folding

WAIT = 10.0
"""Seconds until a test gives up on another thread; it never waits for so long."""


def several(count: int = 3, width: int = 8):
    """A model of ``count`` streams, with a ReLU between each and the next."""
    held = {
        f"{name}{i}": normal(width, width, seed=2 * i + j)
        for i in range(count)
        for j, name in enumerate("PQ")
    }
    steps, value = [], "x"
    for i in range(count):
        steps += [f"s{i} = MatMul({value}, P{i})", f"q{i} = MatMul(s{i}, Q{i})"]
        steps += [f"h{i} = Relu(q{i})"]
        value = f"h{i}"
    shape = f"float[n, {width}]"
    return graph(f"({shape} x) => ({shape} {value}) {{ {' '.join(steps)} }}", **held)


# --- Threads --------------------------------------------------------------------------------------


class Held:
    def __init__(self, meeting: threading.Barrier | None = None) -> None:
        self.meeting = meeting
        self.count = 0

    @once
    def value(self) -> int:
        """What is worked out."""
        self.count += 1
        if self.meeting is not None:
            self.meeting.wait(WAIT)
        return self.count


def test_what_is_worked_out_once_is_so_in_all_threads():
    held = Held()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: held.value, range(100))) == {1}
    assert Held.__dict__["value"].__doc__ == "What is worked out."


def test_two_objects_do_not_wait_for_each_other():
    meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda each: each.value, (Held(meeting), Held(meeting)))] == [1, 1]


def test_what_fails_is_tried_again():
    class Failing:
        tried = 0

        @once
        def value(self) -> int:
            self.tried += 1
            if self.tried == 1:
                raise MemoryError
            return 7

    failing = Failing()
    with pytest.raises(MemoryError):
        _ = failing.value
    assert (failing.value, failing.tried) == (7, 2)


def of_products() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


@pytest.mark.parametrize("count", [1, 2, 16])
def test_products_take_one_core_each_where_there_are_two(monkeypatch, count):
    monkeypatch.setattr(threads, "processors", lambda: count)
    before = of_products()
    with two_at_a_time():
        now = of_products()
    assert now == ([1] * len(before) if count <= 2 else before)
    assert of_products() == before
    assert processors() >= 1


def test_folds_beside_each_other_leave_products_as_they_were(monkeypatch):
    monkeypatch.setattr(threads, "processors", lambda: 2)
    before = of_products()
    first, second = two_at_a_time(), two_at_a_time()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert of_products() == [1] * len(before)
    second.__exit__(None, None, None)
    assert of_products() == before


def test_what_has_not_begun_is_not_begun_when_one_fails():
    begun, running, waiting = [], [], []

    def interrupted():
        with two_at_a_time() as pool:
            go = threading.Event()
            running.extend(pool.submit(go.wait, WAIT) for _ in range(2))
            waiting.extend(pool.submit(begun.append, i) for i in range(5))
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(each.done() for each in running)
    assert not begun
    assert all(each.cancelled() for each in waiting)


def test_threads_share_a_spool():
    spool = Spool(in_memory=0)
    arrays = [np.full((50, i % 7 + 1), i, np.float32) for i in range(200)]

    def kept(array):
        source = spool.add(array)
        assert (source.mapped() == array).all()
        return source

    with ThreadPoolExecutor(8) as pool:
        sources = [*pool.map(kept, arrays)]
    for source, array in zip(sources, arrays, strict=True):
        np.testing.assert_array_equal(source.read(), array, strict=True)


@given(st.integers(1, 600), st.integers(1, 5), st.booleans(), st.integers(0, 9))
def test_rows_are_divided_by_a_triangle(width, rows, is_unit, seed):
    lower = normal(width, width, seed=seed, dtype=np.float64) / width + 2.0 * np.eye(width)
    x = normal(rows, width, seed=seed + 1, dtype=np.float64)
    quotient = x.copy()
    divide(quotient, lower, is_unit=is_unit)
    expected = scipy.linalg.solve_triangular(
        lower, x.T, trans="T", lower=True, unit_diagonal=is_unit
    ).T
    np.testing.assert_allclose(quotient, expected, rtol=1e-9, atol=1e-12)


# --- Streams side by side -------------------------------------------------------------------------


@pytest.fixture
def small_counts(monkeypatch):
    """Streams of any size are decided side by side."""
    monkeypatch.setattr(folding, "LARGE", 0)


class Sequential:
    """What runs each job when it is asked for."""

    def map(self, function, items):
        return map(function, items)


@contextmanager
def one_at_a_time():
    yield Sequential()


def test_streams_decided_side_by_side_fold_as_one_after_the_other(small_counts, monkeypatch):
    model = several(5, 16)
    together = onnx_fold.fold(model, skip=["merge"])
    monkeypatch.setattr(folding, "two_at_a_time", one_at_a_time)
    alone = onnx_fold.fold(model, skip=["merge"])
    assert proto(together.ir) == proto(alone.ir)
    assert len(together.report.folded) == 5
    assert together.report.streams == alone.report.streams


class Meeting(FoldPass):
    """Absorbs a reader, but not before another stream is asked of at the same time."""

    name = "meeting"

    def begin(self):
        self.barrier = threading.Barrier(2)
        self.now: set = set()
        self.shared = False
        self.lock = threading.Lock()

    def candidates(self, stream):
        with self.lock:
            self.shared |= bool(self.now & stream.nodes)
            self.now |= stream.nodes
        self.barrier.wait(WAIT)
        yield self.make_identity(stream, stream.readers[0], Basis(stream.readers[0].matrix))
        with self.lock:
            self.now -= stream.nodes


def test_streams_that_share_no_layer_are_decided_at_the_same_time(small_counts):
    meeting = Meeting()
    model = several(4)
    result = onnx_fold.fold(model, passes=[meeting], only=["meeting"])
    assert len(result.report.folded) == 4
    assert not meeting.shared
    x = normal(3, 8, seed=9)
    for name, value in outputs(result.ir, x=x).items():
        np.testing.assert_allclose(value, outputs(model, x=x)[name], rtol=1e-3, atol=1e-3)


def test_small_streams_are_decided_one_after_the_other(monkeypatch):
    waves = []
    real = folding._Round.waves

    def watched(self, subjects):
        for wave in real(self, subjects):
            waves.append([each for each in wave if each.subject.is_closed])
            yield wave

    monkeypatch.setattr(folding._Round, "waves", watched)
    onnx_fold.fold(several(4), skip=["merge"])
    assert max(map(len, waves)) == 1


def test_one_stream_alone_has_all_cores(monkeypatch):
    monkeypatch.setattr(threads, "processors", lambda: 2)
    found = []

    class Looking(FoldPass):
        name = "looking"

        def candidates(self, stream):
            found.append(of_products())
            return iter(())

    onnx_fold.fold(several(1), passes=[Looking()], only=["looking"], verify=False)
    assert found
    assert all(each == of_products() for each in found)


class Counting(FoldPass):
    """Counts the streams that are offered."""

    name = "counting"

    def begin(self):
        self.offered = []

    def candidates(self, stream):
        self.offered.append(stream)
        for reader in stream.readers:
            yield self.make_identity(stream, reader, Basis(reader.matrix))


def test_an_interrupt_does_not_wait_for_all_that_would_be_decided(small_counts):
    counting = Counting()

    def interrupt(what, done, total):
        if what.startswith("choosing folds"):
            raise KeyboardInterrupt

    model = several(40)
    before = proto(model)
    with pytest.raises(KeyboardInterrupt):
        onnx_fold.fold(model, passes=[counting], only=["counting"], progress=interrupt)
    assert proto(model) == before
    assert len(counting.offered) < 40


def test_no_candidate_is_weighed_once_it_is_given_up():
    fold = folding._Fold(None, {}, Options(), None)
    with pytest.raises(KeyboardInterrupt), fold.given_up_if_it_fails():
        raise KeyboardInterrupt
    with pytest.raises(CancelledError):
        fold.judged(None, None)


def test_what_a_thread_raises_is_raised():
    class Failing(FoldPass):
        name = "failing"

        def candidates(self, stream):
            raise ZeroDivisionError("of a pass")

    with pytest.raises(ZeroDivisionError, match="of a pass"):
        onnx_fold.fold(several(), passes=[Failing()], only=["failing"])
    assert not [each for each in threading.enumerate() if each.name.startswith("ThreadPool")]
