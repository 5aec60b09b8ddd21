"""The check of a model that is too large to run: pieces around folded streams, cut out of it."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, graph, normal

from onnx_fold.check import sampled
from onnx_fold.check.sampled import fits_in_memory, verify_sampled

D = 16


def blocks(count: int = 3, mlp: int = 40) -> ir.Model:
    """Serial skipless blocks without attention: P into M, then O into three readers."""
    body, weights = "", {}
    for i in range(count):
        body += f"p{i} = MatMul(x{i}, P{i}) m{i} = MatMul(p{i}, M{i}) h{i} = Relu(m{i}) "
        body += f"o{i} = MatMul(h{i}, O{i}) q{i} = MatMul(o{i}, Q{i}) k{i} = MatMul(o{i}, K{i}) "
        body += f"a{i} = Relu(q{i}) c{i} = Tanh(k{i}) x{i + 1} = Mul(a{i}, c{i}) "
        shapes = {"P": (D, D), "M": (D, mlp), "O": (mlp, D), "Q": (D, D), "K": (D, D)}
        for seed, (name, shape) in enumerate(shapes.items()):
            weights[f"{name}{i}"] = normal(*shape, seed=10 * i + seed)
    text = f"(float[n, {D}] x0) => (float[n, {D}] y) {{ {body} y = Neg(x{count}) }}"
    return graph(text, **weights)


@pytest.fixture(params=["auto", "interpolate", "absorb"])
def result(request):
    options = {} if request.param == "auto" else {"strategy": request.param, "force": True}
    result = fold(blocks(), **options)
    assert len(result.report.folded) == 6
    return result


def check(result, samples: int = 6, **options):
    return verify_sampled(
        result.original, result.model, result.report.folded, samples=samples, **options
    )


def test_every_stream_can_be_cut_out(result):
    report = check(result)
    assert report.ok, report.reason
    assert report.scope == "6 of 6 folded streams"
    assert all(output.error_folded is not None for output in report.outputs)
    assert "same function in 6 of 6 folded streams" in "".join(
        str(part) for part in report.__rich__().renderables
    )


def test_as_many_as_were_asked_for(result):
    report = check(result, samples=2)
    assert report.scope == "2 of 6 folded streams"
    chosen = {tuple(o.name for o in check(result, samples=1, seed=s).outputs) for s in range(8)}
    assert len(chosen) > 1


def test_a_wrong_weight_anywhere_is_found(result):
    names = [name for name, v in result.model.graph.initializers.items() if len(v.shape) == 2]
    for name in names[::3]:
        wrong = result.model.clone()
        value = wrong.graph.initializers[name]
        array = np.array(value.const_value.numpy())
        array[1] *= 1.5
        value.const_value = ir.tensor(array, name=name)
        report = verify_sampled(result.original, wrong, result.report.folded, samples=6)
        assert not report.ok, name
        assert "is over the limit" in report.reason


def test_pieces_hold_no_more_weights_than_they_need(monkeypatch):
    result = fold(blocks(8), strategy="absorb", force=True)
    seen = []
    run = sampled.verify

    def counted(*models, **options):
        seen.append(len(models[0].graph.initializers))
        return run(*models, **options)

    monkeypatch.setattr(sampled, "verify", counted)
    assert check(result, samples=16).ok
    assert max(seen) <= 5
    assert len(result.original.graph.initializers) == 40


def test_nothing_that_can_be_cut_out_is_no_check():
    result = fold(blocks(1))
    for node in result.original.graph:
        for value in node.outputs:
            value.shape = None
    other = graph(f"(float[n, {D}] z) => (float[n, {D}] w) {{ w = Neg(z) }}")
    report = verify_sampled(result.original, other, result.report.folded)
    assert not report.ok
    assert "no folded stream could be cut out and run" in report.reason


def test_whether_models_fit_in_memory(monkeypatch):
    model = blocks()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    for memory, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(sampled, "available_memory", lambda memory=memory: memory)
        assert fits_in_memory(model, model) is fits
