"""The parity check: what passes, what fails, and what is said about it."""

import json
import weakref

import numpy as np
import onnx_ir as ir
import pytest
from helpers import graph, normal
from rich.console import Console

import onnx_fold
from onnx_fold.algebra.precision import unit_roundoff
from onnx_fold.check import judge, runner, stored, switchable
from onnx_fold.check.parity import verify
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.runtime import sessions
from onnx_fold.runtime.align import decided, picked
from onnx_fold.runtime.sessions import RunFailedError

BFLOAT16 = ir.DataType.BFLOAT16.numpy()


def model(text: str, opset: int = 20, **weights: np.ndarray) -> ir.Model:
    """Return ``text`` as a model; ``weights`` become initializers."""
    header = f'<ir_version: 9, opset_import: ["": {opset}]> '
    tensors = [ir.tensor(array, name=name) for name, array in weights.items()]
    return ir.from_onnx_text(header + text, initializers=tensors)


def chain(dtype="float", *, folded=False, noise=0.0, act="Tanh", vocab=16, d=32) -> ir.Model:
    """A small language model with two projections in a row, or with their product.

    ``noise`` is added to the folded projection, relative to the size of its elements.
    """
    rng = np.random.default_rng(0)
    kind = ir.DataType[dtype.upper()].numpy()

    def weight(*shape):
        return (rng.standard_normal(shape) / d**0.5).astype(kind)

    table, p, m, head = (
        weight(vocab, d) * kind.type(8),
        weight(d, d),
        weight(d, d),
        weight(d, vocab),
    )
    if folded:
        product = p.astype(np.float64) @ m.astype(np.float64) + noise * weight(d, d).astype(
            np.float64
        )
        nodes, weights = "h = MatMul(x, pm)", {"pm": product.astype(kind)}
    else:
        nodes, weights = "g = MatMul(x, p)  h = MatMul(g, m)", {"p": p, "m": m}
    return model(
        f"m (int64[batch, seq] ids) => ({dtype}[batch, seq, {vocab}] logits) "
        f"{{ x = Gather(table, ids)  {nodes}  a = {act}(h)  logits = MatMul(a, head) }}",
        table=table,
        head=head,
        **weights,
    )


def attention(*, folded=False) -> ir.Model:
    """One head of attention over a cache, with a mask, and its output projections P and M."""
    rng = np.random.default_rng(0)
    q, k, v, p, m = (rng.standard_normal((8, 8)).astype(np.float32) for _ in range(5))
    tail = "y = MatMul(c, pm)" if folded else "o = MatMul(c, p)  y = MatMul(o, m)"
    weights = {"pm": (p.astype(float) @ m).astype(np.float32)} if folded else {"p": p, "m": m}
    return model(
        """
        m (float[batch, seq, 8] x, int64[batch, total_seq] attention_mask,
           float[batch, past_seq, 8] past_key, float[batch, past_seq, 8] past_value)
            => (float[batch, seq, 8] y, float[batch, total_seq, 8] key,
                float[batch, total_seq, 8] value)
        {
            new_q = MatMul(x, q)
            new_k = MatMul(x, k)
            new_v = MatMul(x, v)
            key = Concat<axis = 1>(past_key, new_k)
            value = Concat<axis = 1>(past_value, new_v)
            key_t = Transpose<perm = [0, 2, 1]>(key)
            scores = MatMul(new_q, key_t)
            one = Constant<value_ints = [1]>()
            mask = Unsqueeze(attention_mask, one)
            is_on = Cast<to = 9>(mask)
            off = Constant<value_float = -1e30>()
            masked = Where(is_on, scores, off)
            weights = Softmax<axis = -1>(masked)
            c = MatMul(weights, value)
        """
        + tail
        + "}",
        q=q,
        k=k,
        v=v,
        **weights,
    )


def shown(report) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


# --- What passes and what fails ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16", "double"])
def test_a_correct_fold_passes(dtype):
    report = verify(chain(dtype), chain(dtype, folded=True))
    assert report.ok, report.reason
    (logits,) = report.outputs
    assert logits.ok
    assert logits.relative_error <= logits.limit
    assert logits.top1_agreement == 1.0
    assert 0 <= logits.kl_divergence < 1e-3
    if dtype == "double":
        assert logits.ratio is None
        assert any("no wider type" in note for note in report.notes)
    else:
        assert logits.ratio == pytest.approx(logits.error_folded / logits.error_original)
        assert logits.ratio < 8


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16", "double"])
def test_the_same_model_differs_by_nothing(dtype):
    (logits,) = verify(chain(dtype), chain(dtype)).outputs
    assert logits.max_abs_error == logits.relative_error == logits.kl_divergence == 0
    assert logits.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("dtype", "noise"), [("double", 1e-8), ("float", 1e-3), ("float16", 0.1), ("bfloat16", 0.4)]
)
def test_perturbed_weights_fail(dtype, noise):
    report = verify(chain(dtype), chain(dtype, folded=True, noise=noise))
    assert not report.ok
    assert "is over the limit" in report.reason
    assert report.outputs[0].margin > 1


def test_the_ratio_binds_and_a_tolerance_only_tightens():
    noisy = chain(folded=True, noise=2e-6)
    for tolerance in (None, 1e-5, 1e-3, 1.0):
        report = verify(chain(), noisy, tolerance=tolerance)
        (logits,) = report.outputs
        assert not report.ok
        assert logits.ratio > 8
        assert logits.limit_from == "8x the original's"
    assert verify(chain(), noisy, max_ratio=1000).outputs[0].ok
    right = chain(folded=True)
    assert verify(chain(), right, tolerance=1e-5).ok
    report = verify(chain(), right, tolerance=1e-9)
    (logits,) = report.outputs
    assert (logits.judged, logits.limit, logits.limit_from) == ("folded", 1e-9, "the tolerance")
    assert "is over the limit 1.00e-09" in report.reason


def test_the_ratio_never_excuses_the_loss_of_half_of_the_digits():
    report = verify(chain(), chain(folded=True, noise=1e-2), max_ratio=1e9)
    assert not report.ok
    assert report.outputs[0].limit == pytest.approx(4 * 2**-12)
    assert report.outputs[0].limit_from == "half of the digits"


def test_one_row_and_one_channel_are_seen():
    """A wrong row of a table that one token reads, and a wrong column of the head."""
    for name, where in (("table", np.s_[3]), ("head", np.s_[:, 3])):
        wrong = chain(folded=True)
        value = wrong.graph.initializers[name]
        array = np.array(value.const_value.numpy())
        array[where] *= 1 + 3e-6
        value.const_value = ir.tensor(array, name=name)
        report = verify(chain(), wrong, shapes=[{"batch": 4, "seq": 64}])
        assert not report.ok, name
        assert report.outputs[0].judged in ("row", "channel") or report.stored is not None


def test_without_a_reference_the_tolerance_decides(monkeypatch):
    report = verify(chain(), chain(folded=True), reference=False)
    assert report.ok
    assert report.outputs[0].error_original is None
    assert report.outputs[0].limit == judge.TOLERANCE[ir.DataType.FLOAT]
    monkeypatch.setattr(runner, "REFERENCE_LIMIT", 100)
    report = verify(chain(), chain(folded=True))
    assert report.ok
    assert any("no reference (its weights would take" in note for note in report.notes)


def test_a_reference_that_is_far_off_is_no_yardstick():
    # In float32 (2^24 + 1) - 2^24 is 0, in float64 it is 1.
    source = model(
        "m (float[n, 4] x) => (float[n, 4] y)"
        " { z = Mul(x, w) a = Sub(z, z) b = Add(big, one) c = Sub(b, big) d = Add(a, c)"
        " y = Add(d, w) }",
        w=np.array([1, 2, 3, 4], np.float32),
        big=np.array(2**24, np.float32),
        one=np.array(1, np.float32),
    )
    report = verify(source, source)
    assert report.ok
    assert any("which is no yardstick" in note for note in report.notes)
    assert report.outputs[0].limit == judge.TOLERANCE[ir.DataType.FLOAT]


def test_worst_over_samples_and_shapes():
    report = verify(chain(), chain(folded=True), samples=2, shapes=[{"batch": 3, "seq": 2}])
    assert report.shapes == ["batch=3 seq=2"] * 2
    assert verify(chain(), chain(folded=True)).shapes == [
        "batch=1 seq=8",
        "batch=2 seq=16",
        "batch=3 seq=1",
        "batch=1 seq=256",
        "batch=8 seq=32",
    ]


# --- Exact types, NaN and infinity ---------------------------------------------------------------


def test_integers_and_booleans_must_be_equal():
    text = (
        "m (int64[n, 4] ids) => (int64[n, 4] a, bool[n, 4] b)"
        " { a = Add(ids, k)  z = Sub(ids, ids)  b = Less(z, k) }"
    )
    one, two = (model(text, k=np.array([0, 0, 0, value])) for value in (0, 2))
    assert verify(one, one).ok
    report = verify(one, two)
    assert not report.ok
    a, b = report.outputs
    assert a.max_abs_error == 2
    assert a.limit is None
    assert a.reason == b.reason == "1 of 4 elements differ (batch=1 seq=8)"


def test_nan_or_infinity_in_one_model_fails():
    text = "m (float[batch, 4] x) => (float[batch, 4] y) { a = Add(x, k)  y = Sub(a, k) }"
    finite, infinite = (model(text, k=np.array(v, np.float32)) for v in (0, np.inf))
    assert "in 100 % of the folded model (4 of 4 elements)" in verify(finite, infinite).reason
    assert "in 100 % of the original (4 of 4 elements)" in verify(infinite, finite).reason
    both = verify(infinite, infinite)
    assert both.ok
    assert any("100 % of it is NaN or infinity in both" in note for note in both.notes)
    assert "same function but for up to 100 % of an output, left out" in shown(both)


def test_an_original_that_overflows_float16_is_called_so():
    text = "m (float16[n, 50] x) => (float16[n, 50] y) { a = Mul(x, k)  y = Mul(a, k) }"
    gains = np.full(50, 3e4, np.float16)
    gains[7] = 1
    source = model(text, k=gains)
    report = verify(source, source)
    assert report.ok
    assert report.outputs[0].left_out == pytest.approx(0.98, abs=0.02)
    note, *_ = (each for each in report.notes if "65504" in each)
    assert "NaN or infinity in both models and was left out; float16 ends at 65504" in note
    assert "use bfloat16 or float32" in note
    assert "left out" in shown(report)


def test_overflow_of_the_folded_model_in_sixteen_bits():
    text = (
        "m (float16[n, 2] x) => (float16[n, 2] y) { z = Mul(x, big) s = Mul(z, k) y = Add(s, x) }"
    )
    small, large = (
        model(text, big=np.array(1e4, np.float16), k=np.array(k, np.float16)) for k in (1, 1e4)
    )
    assert "NaN or infinity in 100 % of the folded model" in verify(small, large).reason


# --- Signatures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            "(float[n] x) => (float[n] y)",
            "(float[n] z) => (float[n] y)",
            "the inputs differ: x became z",
        ),
        (
            "(float[n] x) => (float[n] y)",
            "(float[n] x) => (float[n] z)",
            "the outputs differ: y became z",
        ),
        (
            "(float[n] x) => (float[n] y)",
            "(float16[n] x) => (float16[n] y)",
            "input 'x' was FLOAT and became FLOAT16",
        ),
        ("(float[n] x) => (float[n] y)", "(float[n] x) => (float[n, 1] y)", "output 'y' was [n]"),
        ("(float[4] x) => (float[4] y)", "(float[5] x) => (float[5] y)", "input 'x' was [4]"),
    ],
)
def test_mismatched_signatures_fail_with_the_reason(before, after, reason):
    def build(signature):
        inside, outside = signature.split("=>")
        x, y = (part.strip(" )").split()[-1] for part in (inside, outside))
        return model(f"m {signature} {{ {y} = Identity({x}) }}")

    report = verify(build(before), build(after))
    assert not report.ok
    assert reason in report.reason
    assert report.outputs == []
    assert reason in shown(report)


def test_a_folded_model_that_fails_to_load_or_run_is_a_failed_report():
    text = "m (float[n, 4] x) => (float[n, 4] y) { y = Add(x, k) }"
    report = verify(*(model(text, k=np.ones(size, np.float32)) for size in (4, 3)))
    assert not report.ok
    assert "cannot load model 'm'" in report.reason
    text = "m (float[n, k] x) => (float[n, k] y) { z = Reshape(x, shape)  y = Reshape(z, back) }"
    before, after = (
        model(text, shape=np.array(s), back=np.array([0, 0])) for s in ([0, 0], [7, -1])
    )
    report = verify(before, after)
    assert not report.ok
    assert "does not run where the original does" in report.reason


def test_an_original_that_cannot_be_loaded_is_an_error(tmp_path):
    broken = model("m (float[4] x) => (float[4] y) { y = Add(x, k) }", k=np.ones(3, np.float32))
    with pytest.raises(InvalidModelError, match="cannot load"):
        verify(broken, broken)
    with pytest.raises(InvalidModelError, match="cannot read"):
        verify(chain(), tmp_path / "missing.onnx")


def test_sequences():
    text = (
        "m (float[4, 2] x) => (seq(float[a, b]) parts)"
        " { y = Mul(x, k)  parts = SplitToSequence(y, two) }"
    )
    one, two = (model(text, k=np.array(k, np.float32), two=np.array(2)) for k in (1, 2))
    assert [output.name for output in verify(one, one).outputs] == ["parts[0]", "parts[1]"]
    assert not verify(one, two).ok


def test_a_shape_that_changed():
    text = "m (float[n, 4] x) => (float[n, k] y) { y = Slice(x, start, end, axis) }"
    fixed = {"start": np.array([0]), "axis": np.array([1])}
    before, after = (model(text, end=np.array([end]), **fixed) for end in (4, 3))
    assert "shape [1, 4] became [1, 3]" in verify(before, after).reason


# --- Inputs --------------------------------------------------------------------------------------


def test_cache_and_masks():
    report = verify(attention(), attention(folded=True), samples=2)
    assert report.ok, report.reason
    assert report.shapes[0] == "batch=1 seq=8 past=5"
    assert [output.name for output in report.outputs] == ["y", "key", "value"]
    assert report.outputs[1].relative_error == 0
    assert all(output.ratio is None or output.ratio < 8 for output in report.outputs)
    assert report.notes == []


def test_inputs_from_a_file_and_from_a_dict(tmp_path):
    ids = np.array([[1, 2, 3]])
    np.savez(tmp_path / "ids.npz", ids=ids)
    for inputs in (tmp_path / "ids.npz", {"ids": ids}, {"ids": ids.astype(np.int32)}):
        report = verify(chain(), chain(folded=True), inputs=inputs)
        assert report.ok
        assert report.shapes == ["given inputs"]


def test_bfloat16_inputs_survive_an_npz(tmp_path):
    source = model("m (bfloat16[n] x) => (bfloat16[n] y) { y = Tanh(x) }")
    np.savez(tmp_path / "x.npz", x=np.ones(3, BFLOAT16))
    report = verify(source, source, inputs=tmp_path / "x.npz")
    assert report.ok
    assert verify(source, source, inputs={"x": np.ones(3)}).ok


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": np.ones((1, 2), int), "mask": np.ones(2)}, "unknown input 'mask': .* takes ids"),
        ({}, "input 'ids' is missing"),
        ({"ids": np.ones(2, int)}, "has rank 2, not 1"),
        ({"ids": np.ones((1, 2))}, "is INT64, not float64"),
        ({"ids": np.full((1, 2), 99)}, "cannot run"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(UsageError, match=message):
        verify(chain(), chain(folded=True), inputs=inputs)


def test_requests_that_make_no_sense(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"junk")
    for options, message in [
        ({"inputs": tmp_path / "x.npz"}, "cannot read inputs"),
        ({"inputs": tmp_path / "none.npz"}, "cannot read inputs"),
        ({"inputs": {}, "shapes": [{}]}, "not both"),
        ({"shapes": [{"width": 3}]}, "unknown dimension 'width'"),
        ({"shapes": []}, "nothing to run"),
        ({"samples": 0}, "nothing to run"),
        ({"provider": "tpu"}, "unknown provider"),
    ]:
        with pytest.raises(UsageError, match=message):
            verify(chain(), chain(folded=True), **options)


def test_a_default_shape_that_the_original_cannot_run_is_skipped():
    text = "m (float[seq, 4] x) => (float[seq, 4] y) { y = Add(x, k) }"
    source = model(text, k=np.ones((8, 4), np.float32))
    report = verify(source, source)
    assert report.ok
    assert "seq=8" in report.shapes
    assert "seq=16" not in report.shapes
    assert any("seq=16 was skipped" in note for note in report.notes)
    with pytest.raises(UsageError, match="cannot run"):
        verify(source, source, shapes=[{"seq": 16}])


def test_a_size_that_the_original_runs_is_found():
    """What a Reshape holds is the only length of such a model."""
    text = (
        "m (float[batch, seq, 4] x) => (float[batch, seq, 4] y)"
        " { f = Reshape(x, flat)  g = MatMul(f, w)  y = Reshape(g, shape) }"
    )
    weights = {"flat": np.array([-1, 44]), "w": np.eye(44, dtype=np.float32)}
    source = model(text, **weights, shape=np.array([1, 11, 4]))
    report = verify(source, source)
    assert report.ok
    assert report.shapes == ["batch=1 seq=11"]
    with pytest.raises(UsageError, match="pass shapes or inputs that fit"):
        verify(*[model(text, **weights, shape=np.array([999, 11, 4]))] * 2)


def test_dimensions_of_different_names_have_different_sizes():
    """A skip times zero may still broadcast: it cannot be left out."""
    text = "m (float[B, S, 4] x, float[B2, S2, 4] x2) => (float[a, b, 4] y)"
    skip = f"{text} {{ z = Mul(x2, k)  y = Add(x, z) }}"
    weights = {"k": np.zeros(1, np.float32)}
    dead = f"{text} {{ y = Mul(x, k) }}"
    report = verify(model(skip, **weights), model(dead, k=np.ones(1, np.float32)))
    assert not report.ok
    assert "became [1, 1, 4]" in report.reason
    assert verify(model(skip, **weights), model(skip, **weights)).ok


# --- How it is run -------------------------------------------------------------------------------


def test_bfloat16_is_emulated_on_the_cpu_and_said():
    report = verify(chain("bfloat16"), chain("bfloat16", folded=True))
    assert report.dtype == "BFLOAT16"
    assert report.outputs[0].dtype == "BFLOAT16"
    assert any("rounded to BFLOAT16" in note for note in report.notes)
    assert 1e-4 < report.outputs[0].error_original < 0.05
    with pytest.raises(sessions.MissingKernelError):
        verify(chain("bfloat16"), chain("bfloat16", folded=True), emulate=False)


def test_float16_runs_as_it_is_unless_emulation_is_asked_for():
    native = verify(chain("float16"), chain("float16", folded=True), emulate=False)
    both = verify(chain("float16"), chain("float16", folded=True))
    emulated = verify(chain("float16"), chain("float16", folded=True), emulate=True)
    assert native.ok
    assert native.notes == []
    assert both.ok
    assert [note.split(":")[0] for note in both.notes] == ["float16 runs in float32 here"]
    assert emulated.ok
    assert any("rounded to FLOAT16" in note for note in emulated.notes)


def deep(*, folded: bool, noise: float = 0.0, layers: int = 16, d: int = 64) -> ir.Model:
    """Pairs of float16 projections between activations, or their products."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {}
    for i in range(layers):
        p, m = (rng.standard_normal((2, d, d)) * 2**0.25 / d**0.5).astype(np.float16)
        product = p.astype(np.float64) @ m * (1.0 + noise * rng.standard_normal((d, d)))
        weights |= {f"w{i}": product.astype(np.float16)} if folded else {f"p{i}": p, f"m{i}": m}
        linear = f"MatMul(x{i}, w{i})" if folded else f"MatMul(g{i}, m{i})"
        nodes += [] if folded else [f"g{i} = MatMul(x{i}, p{i})"]
        nodes += [f"h{i} = {linear} x{i + 1} = Relu(h{i})"]
    text = f"m (float16[n, {d}] x0) => (float16[n, {d}] x{layers}) {{ {' '.join(nodes)} }}"
    return model(text, **weights)


def test_float16_on_a_cpu_is_judged_by_what_sixteen_bits_compute():
    """A CPU rounds nothing within the original, but the weights of each fold are rounded anew."""
    before, after = deep(folded=False), deep(folded=True)
    native, emulated = (verify(before, after, max_ratio=3.0, emulate=e) for e in (None, True))
    assert native.ok, native.reason
    assert native.outputs[0].error_original == emulated.outputs[0].error_original
    assert native.outputs[0].error_folded == emulated.outputs[0].error_folded
    assert any("float16 runs in float32 here" in note for note in native.notes)
    assert not verify(before, deep(folded=True, noise=0.01)).ok


def test_operators_without_a_float64_kernel_have_a_reference_too():
    report = verify(chain(act="Gelu"), chain(act="Gelu", folded=True))
    assert report.ok
    assert report.notes == ["the reference was computed by onnx.reference"]
    assert report.outputs[0].error_original < 1e-6


def test_a_float64_model_without_kernels_runs_in_numpy():
    report = verify(chain("double", act="Gelu"), chain("double", act="Gelu", folded=True))
    assert report.ok
    assert any("both models ran in onnx.reference" in note for note in report.notes)


def test_no_reference_where_nothing_can_compute_it():
    text = (
        '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>'
        " m (float[n, 4] x, float[4] b) => (float[n, 4] y) { y = com.microsoft.BiasGelu(x, b) }"
    )
    source = ir.from_onnx_text(text)
    report = verify(source, source)
    assert report.ok
    assert any("no reference in DOUBLE" in note for note in report.notes)


def test_sources_are_left_as_they_were(tmp_path):
    source = chain("bfloat16")
    before = ir.to_proto(source).SerializeToString()
    ir.save(chain("bfloat16", folded=True), tmp_path / "b.onnx", external_data="b.onnx.data")
    assert verify(source, tmp_path / "b.onnx").ok
    assert ir.to_proto(source).SerializeToString() == before


# --- Reports -------------------------------------------------------------------------------------


def test_the_report_is_json_and_reads_well():
    text = "m (float[batch, 4] x) => (float[batch, 4] y) { y = Mul(x, k) }"
    zero, one = (model(text, k=np.array(value, np.float32)) for value in (0, 1))
    report = verify(zero, one)
    assert np.isinf(report.outputs[0].relative_error)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is False
    text = shown(verify(chain("bfloat16"), chain("bfloat16", folded=True)))
    for word in ("logits", "ratio", "top-1", "100.0%", "same function", "- both models ran"):
        assert word in text
    assert "differs: output 'y'" in shown(report)


def test_of_many_outputs_the_worst_are_shown():
    names = [f"y{i}" for i in range(20)]
    signature = ", ".join(f"float[batch, 4] {name}" for name in names)
    nodes = "  ".join(f"{name} = Mul(x, k{i})" for i, name in enumerate(names))
    scales = {f"k{i}": np.array(1, np.float32) for i in range(20)}
    text = f"m (float[batch, 4] x) => ({signature}) {{ {nodes} }}"
    report = verify(model(text, **scales), model(text, **{**scales, "k17": np.array(2, "f4")}))
    assert len(report.to_dict()["outputs"]) == 20
    lines = shown(report)
    assert "8 further outputs" in lines
    assert "y17" in lines


# --- In a fold -----------------------------------------------------------------------------------


def test_fold_passes_shapes_and_inputs_on_to_the_check():
    for options in ({"shapes": [{"batch": 3, "seq": 7}]}, {"inputs": {"ids": np.array([[1, 2]])}}):
        result = onnx_fold.fold(chain(), **options)
        (label,) = result.report.verification.shapes
        assert label in ("batch=3 seq=7", "given inputs")
    with pytest.raises(UsageError, match="either inputs or shapes"):
        onnx_fold.fold(chain(), shapes=[{"seq": 3}], inputs={"ids": np.array([[1]])})


def test_a_report_is_true_if_the_models_are_the_same_function():
    assert verify(chain(), chain(folded=True))
    assert not verify(chain(), chain(folded=True, noise=1e-2))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_constants_that_an_optimizer_made_initializers_are_no_rounded_weights(dtype):
    """Half a unit more in an exponent of 3 makes NaN of what is negative."""
    d, kind = 16, ir.DataType[dtype.upper()].numpy()
    rng = np.random.default_rng(0)
    p, m, o = (rng.standard_normal((d, d)) / 4 for _ in range(3))
    ends = f"({dtype}[batch, seq, {d}] x) => ({dtype}[batch, seq, {d}] z) {{"
    tail = "c = Pow(h, three)  y = MatMul(c, o)  t = Tanh(y)  z = MatMul(t, o) }"
    number = "three = Constant<value_float = 3.0>()" if dtype == "float" else ""
    if not number:
        number = "f = Constant<value_float = 3.0>()  three = Cast<to = 10>(f)"
    original = model(
        f"m {ends} {number}  g = MatMul(x, p)  h = MatMul(g, m)  {tail}",
        p=p.astype(kind),
        m=m.astype(kind),
        o=o.astype(kind),
    )
    product = p.astype(kind).astype(np.float64) @ m.astype(kind).astype(np.float64)

    def folded(scale: float) -> ir.Model:
        return model(
            f"m {ends} h = MatMul(x, pm)  {tail}",
            pm=(scale * product).astype(kind),
            o=o.astype(kind),
            three=np.array(3.0, kind),
        )

    right = verify(original, folded(1.0))
    assert right.ok, right.reason
    assert right.stored is not None
    assert right.stored.values > 1
    assert not verify(original, folded(1.03)).ok


def moved(array: np.ndarray) -> np.ndarray:
    """How far half a unit in the last place moves each element of a float16 weight."""
    tensor = ir.tensor(array.astype(np.float16))
    numbers = np.random.default_rng(0)
    rounded = switchable.rounded_anew(tensor, ir.DataType.FLOAT, numbers)
    return np.abs(rounded - array.astype(np.float16).astype(np.float32))


def test_what_was_not_rounded_is_not_moved():
    """A number of few digits may have them by chance; all of a row may not."""
    kernels = normal(8, 9)
    kernels[3] *= 0.01
    kernels[3, 4] = 1.0  # all that counts of its row
    assert (moved(kernels) > 0).all()
    assert moved(kernels)[3, 4] == 2.0**-11
    beside_identity = np.concatenate((np.eye(9), kernels))
    assert not moved(beside_identity)[:9].any()
    assert not moved(beside_identity.T)[:, :9].any()
    assert moved(beside_identity)[9:].all()
    assert not moved(np.array(3.0)).any()
    assert moved(np.full((2, 3), 5.3e-6)) == pytest.approx(2.0**-25)


def test_weights_are_compared_on_inputs_whose_values_fit_in_memory(monkeypatch):
    """The largest two that take no more than is enough, or the smallest; none if it does not."""
    seen: list[int] = []
    run = stored._Comparison.run

    def counted(self, feed):
        seen.append(feed["ids"].size)
        run(self, feed)

    monkeypatch.setattr(stored._Comparison, "run", counted)
    before, after = chain("float16"), chain("float16", folded=True)
    sizes = [{"batch": 1, "seq": seq} for seq in (1, 64, 4, 256)]
    assert verify(before, after, shapes=sizes).stored.ok
    assert seen == [64, 256]
    seen.clear()
    monkeypatch.setattr(stored, "ENOUGH", stored.HELD * 4 * 8 * (3 * 32 + 16))
    assert verify(before, after, shapes=sizes).stored.ok
    assert seen == [1, 4]
    seen.clear()
    monkeypatch.setattr(stored, "ENOUGH", 1)
    assert verify(before, after, shapes=sizes).stored.ok
    assert seen == [1]
    monkeypatch.setattr(stored, "available_memory", lambda: 1)
    report = verify(before, after, shapes=sizes)
    assert report.stored is None
    assert any("weights were not compared as stored" in note for note in report.notes)


def test_models_are_in_memory_one_at_a_time(monkeypatch):
    """The original, the folded model, and the original in a wider type."""
    alive, most, make = weakref.WeakSet(), [], sessions.session

    def session(*args, **options):
        most.append(len(alive))
        made = make(*args, **options)
        alive.add(made)
        return made

    monkeypatch.setattr(sessions, "session", session)
    assert verify(chain(), chain(folded=True)).ok
    assert most[:3] == [0, 0, 0]


def test_files_are_not_mapped_while_the_reference_runs(tmp_path):
    path = tmp_path / "m.onnx"
    before = chain()
    ir.save(before, path, external_data="m.data", size_threshold_bytes=0)
    source = ir.load(path)
    assert verify(source, chain(folded=True)).ok
    held = [v.const_value for v in source.graph.initializers.values()]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in held)
    np.testing.assert_array_equal(
        held[0].numpy(), before.graph.initializers[held[0].name].const_value.numpy()
    )


def test_a_bias_that_a_softmax_cancels_may_be_added_elsewhere():
    """What rounding it anew does to the outputs is no more than the wide type's own rounding."""
    d, names = 6, "PQKVO"
    held = {name: normal(d, d, seed=i) for i, name in enumerate(names)}
    c, e = normal(d, seed=8), normal(d, seed=9)

    def attention(read: str, bias: np.ndarray) -> ir.Model:
        text = f"""(float[n, {d}] h) => (float[n, {d}] y)
            {{ p = MatMul(h, P) x = Add(p, c) q = MatMul(x, Q) k0 = MatMul({read}, K)
               k = Add(k0, e) t = Transpose(k) s = MatMul(q, t) a = Softmax(s)
               v = MatMul(x, V) o = MatMul(a, v) y = MatMul(o, O) }}"""
        return graph(text, c=c, e=bias, **held)

    moved = (e + c.astype(np.float64) @ held["K"]).astype(np.float32)
    assert onnx_fold.verify(attention("x", e), attention("p", moved))


def test_of_many_column_vectors_no_number_is_judged_alone():
    """Of 200,000 numbers the largest is 3 times as far off as all are, by chance."""
    text = "(float[b, 16, 1] x) => (float[b, 24, 1] y) { p = MatMul(P, x) y = MatMul(M, p) }"
    model = graph(text, P=normal(16, 16), M=normal(24, 16, seed=1))
    result = onnx_fold.fold(model, shapes={"b": 8192})
    assert result.report.verification.stored.ratio < 2


# --- Outputs that tell nothing --------------------------------------------------------------------


def detector(seed: int, bias: float, behind: str = "z = Sigmoid(s)") -> ir.Model:
    """A layer whose Sigmoid is saturated: scores of a detector that sees nothing."""
    text = f"m (float[n, 8] x) => (float[n, k] z) {{ r = MatMul(x, W) s = Add(r, b) {behind} }}"
    weight = normal(8, 8, seed=seed)
    return model(text, W=weight, b=np.full(8, bias, np.float32))


@pytest.mark.parametrize("behind", ["z = Sigmoid(s)", "p = Sigmoid(s) z = Transpose(p)"])
def test_a_saturated_sigmoid_is_judged_by_what_it_reads(behind):
    original = detector(0, -16.0, behind)
    report = verify(original, detector(0, -16.0, behind))
    assert report
    assert [output.name for output in report.outputs] == ["s", "z"]
    other = verify(original, detector(1, -16.0, behind))
    assert not other
    assert "output 's'" in other.reason  # all scores are 1e-7 in both: these tell nothing


def test_one_input_without_a_reference_leaves_the_others_theirs(monkeypatch):
    source = detector(0, 0.0, "z = Relu(s)")
    run = sessions.run

    def failing(session, inputs):
        if inputs["x"].dtype == np.float64 and inputs["x"].shape[0] == 2:
            raise RunFailedError("no kernel for two rows")
        return run(session, inputs)

    monkeypatch.setattr(sessions, "run", failing)
    report = verify(source, source)
    assert report
    assert report.outputs[0].error_original is not None
    assert [note for note in report.notes if "no kernel for two rows" in note]


def test_outputs_whose_shape_depends_on_the_numbers():
    """With results rounded, or in a wider type, other elements are below the least."""
    source = model(
        "m (float16[n, 16] x) => (float16[k] y) { p = MatMul(x, P) q = MatMul(p, Q)"
        " flat = Reshape(q, all) kept = Less(flat, least) y = Compress(flat, kept) }",
        P=normal(16, 16, dtype=np.float16),
        Q=normal(16, 16, seed=1, dtype=np.float16),
        all=np.array([-1]),
        least=np.array(0.0005, np.float16),
    )
    assert verify(source, source, shapes={"n": 20000}).ok
    notes: list[str] = []
    outputs = {"y": np.ones(3, np.float16)}
    run = judge.Run(judge.Feed("", {}), outputs, outputs, {"y": np.ones(4, np.float32)})
    assert judge.Judge(source, None, 3.0, notes).output("y", [run]).ok
    assert "the reference has another shape" in notes[0]


def lucky(moved: float, rows: int) -> tuple[judge.OutputParity, list[str]]:
    """What is said where the folded model is off in one row, in which the original is exact.

    With the weights of the reference rounded anew that row is ``moved`` off.
    """
    source = model("m (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }", w=normal(64, 64))
    generator = np.random.default_rng(0)
    r, noise, other = (generator.standard_normal((rows, 64)) for _ in range(3))
    before = r + 1e-6 * noise
    before[0] = r[0]
    after = before.copy()
    after[0] += 4e-5 * other[0]
    drawn = before.copy()
    drawn[0] += moved * noise[0]
    run = judge.Run(judge.Feed("", {}), {"y": before}, {"y": after}, {"y": r})
    notes: list[str] = []
    judged = judge.Judge(source, None, 8.0, notes, anew=lambda _: [{"y": drawn}])
    return judged.output("y", [run]), notes


def test_an_original_may_be_lucky_in_one_row():
    """Which moves by as much as soon as its weights are rounded anew."""
    found, _ = lucky(0.0, rows=400)
    assert not found.ok
    assert "error of the worst row" in found.reason
    found, notes = lucky(1e-5, rows=400)
    assert found.ok
    assert found.row_ratio == pytest.approx(4, rel=0.3)
    assert "as far off with its weights rounded anew" in notes[0]
    assert not lucky(np.nan, rows=400)[0].ok


def test_a_whole_of_many_rows_is_not_lucky():
    """But one that is a single row may be."""
    found, _ = lucky(1e-5, rows=3)
    assert not found.ok
    assert found.judged == "folded"
    assert lucky(1e-5, rows=1)[0].ok
    assert not lucky(0.0, rows=1)[0].ok


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_weights_are_rounded_anew_where_a_row_is_over_its_limit(dtype, monkeypatch):
    """By half a unit in their last places, and only there."""
    found: list[list[dict[str, np.ndarray]]] = []
    original = runner.Runner.anew

    def watched(self, run):
        found.append([run.reference, *original(self, run)])
        return found[-1][1:]

    monkeypatch.setattr(runner.Runner, "anew", watched)
    assert verify(chain(dtype), chain(dtype, folded=True))
    assert not found
    unit = unit_roundoff(ir.DataType[dtype.upper()])
    assert not verify(chain(dtype), chain(dtype, folded=True, noise=1e3 * unit))
    reference, *draws = (each["logits"] for each in found[0])
    assert len(draws) == stored.DRAWS
    for draw in draws:
        error = np.linalg.norm(draw - reference) / np.linalg.norm(reference)
        assert 0.1 * unit < error < 10 * unit


DECISIONS = {
    "argmax": ("int64[n] y", "y = ArgMax<axis = 1, keepdims = 0>(l)", {}),
    "largest": (
        "int64[n, 5] y",
        "v, i = TopK<axis = 1>(l, five) y = Identity(i)",
        {"five": np.array([5])},
    ),
    "mask": ("bool[n, 256] y", "y = Greater(l, zero)", {"zero": np.array(0, np.float16)}),
}


def deciding(kind: str, gain: float = 1.0) -> ir.Model:
    """Two layers in a row, and what is decided by the floats behind them."""
    made, how, constants = DECISIONS[kind]
    types = {"p": (64, 64), "m": (64, 64), "head": (64, 256)}
    held = {
        name: normal(*shape, seed=seed, dtype=np.float16)
        for seed, (name, shape) in enumerate(types.items())
    }
    held["m"] = (held["m"] * np.float16(gain)).astype(np.float16)
    return model(
        f"m (float16[n, 64] x) => ({made}) {{ a = MatMul(x, p) b = MatMul(a, m) c = Relu(b)"
        f" l = MatMul(c, head) {how} }}",
        **held,
        **constants,
    )


@pytest.mark.parametrize("kind", DECISIONS)
def test_ties_of_floats_may_be_decided_otherwise(kind):
    """And the floats themselves are judged."""
    result = onnx_fold.fold(deciding(kind), shapes={"n": 4096}, provider="cpu")
    assert result.report.folded
    parity = result.report.verification
    assert [each.name for each in parity.outputs] == ["l", "y"]
    assert parity.outputs[0].ratio is not None
    if kind != "argmax":
        (note,) = (each for each in parity.notes if "elements differ" in each)
        assert "of the original in other roundings up to" in note


@pytest.mark.parametrize("kind", DECISIONS)
def test_what_decides_is_seen(kind):
    """A gain changes no largest element and no sign, but what these are of."""
    report = verify(deciding(kind), deciding(kind, gain=1.25), shapes={"n": 4})
    assert not report.ok
    assert "output 'l': error" in report.reason


def test_elements_that_no_rounding_moves_must_be_equal():
    source = model("m (float[n] x) => (int64[n] y) { y = Cast<to = 7>(x) }")
    before = np.arange(10_000)
    after = before.copy()
    after[:3] += 1

    def found(drawn: np.ndarray) -> tuple[bool, list[str]]:
        notes: list[str] = []
        run = judge.Run(judge.Feed("", {}), {"y": before}, {"y": after}, {"y": before})
        judged = judge.Judge(source, None, 3.0, notes, anew=lambda _: [{"y": drawn}])
        return judged.output("y", [run]).ok, notes

    assert found(before) == (False, [])
    moved = before.copy()
    moved[7] += 1
    is_ok, (note,) = found(moved)
    assert is_ok
    assert "3 of 10000 elements differ (), of the original in other roundings up to 1" in note
    after[3] += 1  # four times as many
    assert found(moved) == (False, [])
    after += 1  # all of them: nothing could be told
    assert found(1 - before) == (False, [])


def test_what_decides_integers():
    text = (
        "m (float[n, 4] x, int64[n] ids) => (int64[n] y, int64[k] s, int64[n] z)"
        " { l = MatMul(x, w) p = ArgMax<axis = 1, keepdims = 0>(l) y = Add(p, ids)"
        " r = Relu(x) s = Shape(r) q = Cast<to = 7>(x) z = ReduceSum<keepdims = 0>(q, one) }"
    )
    assert decided(model(text, w=normal(4, 4), one=np.array([1]))) == {"l"}
    assert decided(deciding("mask")) == {"l"}


def detector_of(gain: float = 1.0) -> ir.Model:
    """Boxes and scores behind two layers in a row, and those of them that overlap with no other."""
    shapes = {"p": (64, 64), "m": (64, 64), "head": (64, 8), "corners": (64, 4)}
    held = {
        name: normal(*shape, seed=seed, dtype=np.float16)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    held["corners"] = (held["corners"] * np.float16(gain)).astype(np.float16)
    return model(
        "m (float16[1, n, 64] x) => (float[k, 4] y, int64[k, 3] picked) {"
        " a = MatMul(x, p) b = MatMul(a, m) c = Relu(b)"
        " l = MatMul(c, head) f = Cast<to = 1>(l) scores = Transpose<perm = [0, 2, 1]>(f)"
        " e = MatMul(c, corners) boxes = Cast<to = 1>(e)"
        " picked = NonMaxSuppression(boxes, scores, most, overlap, least)"
        " at = Gather<axis = 1>(picked, two) all = Squeeze(boxes, zero) y = Gather(all, at) }",
        **held,
        most=np.array([100]),
        overlap=np.array([0.5], np.float32),
        least=np.array([0.1], np.float32),
        two=np.array(2),
        zero=np.array([0]),
    )


def test_other_roundings_may_pick_others():
    """The floats that decide are judged; what they pick, where the original is sure of it."""
    source = detector_of()
    assert picked(source) == {"y", "picked"}
    result = onnx_fold.fold(source, shapes=[{"n": 8}, {"n": 2000}], provider="cpu")
    assert result.report.folded
    parity = result.report.verification
    found = {each.name: each for each in parity.outputs}
    assert list(found) == ["scores", "boxes", "y", "picked"]
    assert found["y"].left_out == 1
    assert found["y"].ratio is not None  # of the smaller input
    assert any("other roundings pick others (n=2000)" in note for note in parity.notes)
    report = verify(source, detector_of(1.25), shapes={"n": 2000})
    assert not report.ok
    assert "output 'boxes': error" in report.reason


@pytest.mark.parametrize("shape", [(9, 4), (8, 4)])
def test_what_the_original_is_sure_of_is_not_left_out(shape):
    notes: list[str] = []
    r = np.arange(32.0).reshape(8, 4)
    drawn = np.resize(r, shape)

    def found(folded: dict[str, np.ndarray], drawn: np.ndarray) -> bool:
        run = judge.Run(judge.Feed("", {}), {"y": r}, folded, {"y": r})
        how = {"picked": {"y"}, "anew": lambda _: [{"y": drawn}]}
        return judge.Judge(detector_of(), None, 3.0, notes, **how).output("y", [run]).ok

    assert not found({"y": r[:7]}, r)
    assert not found({}, drawn)
    assert found({"y": r[:7]}, drawn if len(drawn) > 8 else r[::-1])


def test_a_large_model_is_not_written_anew_for_what_decides(monkeypatch):
    monkeypatch.setattr("onnx_fold.runtime.pair.fits_message", lambda _: False)
    report = verify(detector_of(), detector_of())
    assert report.ok
    assert [each.name for each in report.outputs] == ["y", "picked"]
