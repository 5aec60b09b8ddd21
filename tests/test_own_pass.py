"""A caller's own pass: by class, by instance, by name, and as the example writes it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import announced_is_done, assert_same_function, graph, normal, operators

import onnx_fold
from onnx_fold.algebra.expression import literal, scale
from onnx_fold.engine import Basis, Candidate, FoldPass, Rewrite, Side, rebase, weights_of
from onnx_fold.errors import UsageError

ROOT = Path(__file__).parents[1]
D = 8


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    yield
    sys.modules.pop("examples.best_conditioned", None)


def layers() -> ir.Model:
    """A table read by two square layers, of which Q is all but singular, and by a wide one."""
    skewed = normal(D, D, seed=1) @ np.diag(np.logspace(0, -3, D)).astype(np.float32)
    held = {
        "E": normal(11, D),
        "Q": skewed,
        "K": np.linalg.qr(normal(D, D, seed=2))[0],
        "V": normal(D, 5, seed=3),
    }
    return graph(
        "(int64[b, n] ids) => (float[b, n, 8] q, float[b, n, 8] k, float[b, n, 5] v)"
        " { x = Gather(E, ids) q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V) }",
        **held,
    )


def example() -> type[FoldPass]:
    from examples.best_conditioned import BestConditionedPass

    return BestConditionedPass


@pytest.mark.parametrize("kind", ["class", "instance", "name"])
def test_the_example_folds_what_it_promises(kind):
    given = {
        "class": example(),
        "instance": example()(),
        "name": "examples.best_conditioned:BestConditionedPass",
    }[kind]
    model = layers()
    result = onnx_fold.fold(model, passes=given, only="best-conditioned")
    (stream,) = result.report.folded
    assert stream.folded.strategy == "best-conditioned"
    assert stream.folded.text.startswith("MatMul -> k into")
    assert result.report.saving.weights == D * D
    assert result.report.proof.proved == [stream.name]
    assert_same_function(model, result.model)


def test_it_stands_beside_the_others_and_answers_to_its_name():
    report = onnx_fold.inspect(layers(), passes=[example()]).plan
    weighed = [each.strategy for each in report.streams[0].candidates]
    assert "best-conditioned" in weighed
    assert "absorb" in weighed
    skipped = onnx_fold.inspect(layers(), passes=[example()], skip="best-conditioned").plan
    assert "best-conditioned" not in [each.strategy for each in skipped.streams[0].candidates]
    forced = onnx_fold.fold(layers(), passes=[example()], strategy="best-conditioned")
    assert [stream.folded.strategy for stream in forced.report.folded] == ["best-conditioned"]


def test_it_refuses_where_no_reader_is_square():
    model = graph(
        "(int64[b, n] ids) => (float[b, n, 5] v, float[b, n, 3] w)"
        " { x = Gather(E, ids) v = MatMul(x, V) w = MatMul(x, W) }",
        E=normal(11, D),
        V=normal(D, 5),
        W=normal(D, 3, seed=1),
    )
    result = onnx_fold.fold(model, passes=example(), only="best-conditioned")
    assert not result.report.folded
    assert result.report.left_alone[0].reasons == ["no strategy applies to its layers"]


class HalvedPass(FoldPass):
    """``T = R / 2``: the last square reader becomes ``2 I``, a sum of the stream with itself."""

    name = "halved"
    operators = 1

    def candidates(self, stream):
        reader = [reader for reader in stream.readers if reader.is_square][-1]
        matrix = weights_of(reader)
        basis = Basis(scale(matrix, 0.5))
        rebased = rebase(stream, basis, stream.width, pivot=reader)
        twice = literal(2 * np.eye(stream.width))
        rebased.readers[stream.readers.index(reader)] = Side(matrix, twice)
        rewrite = Rewrite(stored=rebased.stored)
        at = rewrite.before(reader.node)
        rewrite.replaced[reader.y] = at("Add", reader.x, reader.x)
        yield Candidate(self.name, "half", rewrite, rebased.writers, rebased.readers, basis)


def test_a_pass_states_operators_and_counts_nothing():
    model = layers()
    with announced_is_done():
        result = onnx_fold.fold(model, passes=HalvedPass, only="halved")
    (stream,) = result.report.folded
    assert stream.folded.weights_removed == D * D
    assert stream.folded.nodes_added == 0  # a sum for a product
    assert result.report.proof.proved == [stream.name]
    assert operators(result.model).count("Add") == 1
    assert_same_function(model, result.model)


class Nameless(FoldPass):
    pass


class Absorbing(FoldPass):
    name = "absorb"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("examples.best_conditioned", "is not like module:Class"),
        ("examples.nowhere:Pass", "cannot import the pass"),
        ("examples.best_conditioned:Nothing", "cannot import the pass"),
        ("onnx_fold:fold", "is not a FoldPass"),
        (3, "is not a FoldPass"),
        (Nameless, "with a name"),
        (Absorbing, "two passes are called 'absorb'"),
    ],
)
def test_what_is_no_pass_is_refused(given, why):
    with pytest.raises(UsageError, match=why):
        onnx_fold.fold(layers(), passes=[given])
