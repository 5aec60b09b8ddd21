"""Sessions, and inputs for any signature."""

import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fold import runtime
from onnx_fold.errors import InvalidModelError, MissingExtraError, UsageError
from onnx_fold.widen import precision, widen

BFLOAT16 = ir.DataType.BFLOAT16.numpy()

DOUBLER = '<ir_version: 9, opset_import: ["": 18]> m (float[n] x) => (float[n] y) { y = Add(x, x) }'


def model(text: str, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    """Return ``text`` as a model; ``weights`` become initializers."""
    header = f'<ir_version: 10, opset_import: ["": {opset}]> '
    tensors = [ir.tensor(array, name=name) for name, array in weights.items()]
    return ir.from_onnx_text(header + text, initializers=tensors)


def decoder() -> ir.Model:
    """A signature as exporters write it: token ids, a mask over the cache, one cached layer."""
    return model(
        """
        decoder (int64[b0, s0] input_ids, int64[b0, "c0 + s0"] attention_mask,
                 int64[b0, s0] position_ids, float16[b0, 2, c0, 4] past_key_values_0_key)
            => (float16[b0, s0, 4] h, float16[b0, 2, c0, 4] k, int64[b0, m] mask)
        {
            ids = Cast<to = 6>(input_ids)
            tokens = Gather(vocab, ids)
            positions = Gather(table, position_ids)
            h = Add(tokens, positions)
            k = Identity(past_key_values_0_key)
            mask = Identity(attention_mask)
        }
        """,
        vocab=np.zeros((11, 4), np.float16),
        table=np.zeros((20, 4), np.float16),
    )


# --- Sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "ir", "proto"])
def test_session_takes_any_source(kind, tmp_path):
    source = ir.from_onnx_text(DOUBLER)
    if kind == "path":
        ir.save(source, tmp_path / "m.onnx")
        source = tmp_path / "m.onnx"
    elif kind == "proto":
        source = ir.to_proto(source)
    session = runtime.session(source, threads=1, optimize=False)
    np.testing.assert_array_equal(
        runtime.run(session, {"x": np.ones(3, np.float32)})["y"], [2, 2, 2]
    )


def test_session_of_a_loaded_model_with_external_data_from_another_folder(tmp_path, monkeypatch):
    source = model(
        "m (float[2, 3] x) => (float[2, 4] y) { y = MatMul(x, w) }", w=np.eye(3, 4, dtype="f4")
    )
    (tmp_path / "a").mkdir()
    ir.save(source, tmp_path / "a" / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    monkeypatch.chdir(tmp_path)
    loaded = ir.load("a/m.onnx")
    y = runtime.run(runtime.session(loaded), {"x": np.ones((2, 3), np.float32)})["y"]
    assert y.shape == (2, 4)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_session_of_a_model_over_the_protobuf_limit_goes_through_a_folder(monkeypatch):
    monkeypatch.setattr(runtime, "PROTOBUF_LIMIT", 16)
    source = model(
        "m (float[2, 3] x) => (float[2, 4] y) { y = MatMul(x, w) }", w=np.eye(3, 4, dtype="f4")
    )
    y = runtime.run(runtime.session(source), {"x": np.ones((2, 3), np.float32)})["y"]
    np.testing.assert_array_equal(y, [[1, 1, 1, 0]] * 2)
    assert not isinstance(source.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_session_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for provider in ("cpu", "auto"):
        with pytest.raises(MissingExtraError, match=r"onnx-fold\[cpu\]"):
            runtime.session(ir.from_onnx_text(DOUBLER), provider)


def test_session_rejects_an_unknown_provider():
    with pytest.raises(UsageError, match="unknown provider 'tpu'"):
        runtime.session(ir.from_onnx_text(DOUBLER), "tpu")


def test_cuda_in_a_build_without_it_is_an_error_and_auto_is_cpu(monkeypatch):
    ort = runtime.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="built without CUDA"):
        runtime.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert runtime.resolve_provider("auto") == "cpu"


def test_cuda_that_does_not_start_is_an_error_not_a_silent_fall_back(monkeypatch, capsys):
    class Session:
        def __init__(self, source, options, providers):
            assert providers[0] == ("CUDAExecutionProvider", {"use_tf32": 0})

        def get_providers(self):
            return ["CPUExecutionProvider"]

    ort = runtime.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart"))
    monkeypatch.setattr(ort, "InferenceSession", Session)
    with pytest.raises(UsageError, match="could not start CUDA"):
        runtime.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert capsys.readouterr().out == ""
    assert runtime.resolve_provider("auto") == "cpu"


def test_a_cuda_failure_is_no_fault_of_the_model(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA failure 35: driver version is insufficient")

    ort = runtime.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(UsageError, match=r"could not start CUDA.*driver version"):
        runtime.session(ir.from_onnx_text(DOUBLER), "cuda")


def test_session_of_what_is_no_model(tmp_path):
    with pytest.raises(InvalidModelError, match="cannot read"):
        runtime.session(tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(InvalidModelError, match=r"bad\.onnx") as caught:
        runtime.session(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)


def test_session_without_a_kernel_says_which():
    source = model("m (bfloat16[n] x) => (bfloat16[n] y) { y = Tanh(x) }")
    with pytest.raises(runtime.MissingKernelError, match="Tanh"):
        runtime.session(source)


def test_run_with_bfloat16():
    session = runtime.session(
        model("m (bfloat16[n, 2] x) => (bfloat16[2, n] y) { y = Transpose(x) }")
    )
    x = np.arange(6).reshape(3, 2).astype(BFLOAT16)
    y = runtime.run(session, {"x": x})["y"]
    assert y.dtype == BFLOAT16
    np.testing.assert_array_equal(y, x.T)
    assert runtime.run(session, {"x": x[:0]})["y"].shape == (2, 0)


def test_run_with_sequences_strings_and_scalars():
    source = model(
        "m (string[n] s, bool b, float[4] x) => (string[n] t, bool c, seq(float[k]) parts)"
        " { t = Identity(s) c = Not(b) parts = SplitToSequence(x, two) }",
        two=np.array(2),
    )
    x = np.arange(4, dtype=np.float32)
    s = np.array(["a", "b"], dtype=object)
    outputs = runtime.run(runtime.session(source), {"s": s, "b": np.array(True), "x": x})
    assert list(outputs) == ["t", "c", "parts[0]", "parts[1]"]
    np.testing.assert_array_equal(outputs["parts[1]"], [2, 3])
    assert not outputs["c"]


@pytest.mark.parametrize(
    "inputs", [{}, {"x": np.ones(1, np.float64)}, {"x": np.ones(1, "f4"), "z": np.ones(1, "f4")}]
)
def test_run_with_the_wrong_inputs(inputs):
    with pytest.raises(runtime.RunFailedError, match="cannot run"):
        runtime.run(runtime.session(ir.from_onnx_text(DOUBLER)), inputs)


# --- Inputs --------------------------------------------------------------------------------------


def test_inputs_of_a_decoder_agree_on_their_sizes():
    inputs = runtime.make_inputs(decoder(), batch=2, seq=6, past=5)
    shapes = {name: array.shape for name, array in inputs.items()}
    assert shapes == {
        "input_ids": (2, 6),
        "attention_mask": (2, 11),
        "position_ids": (2, 6),
        "past_key_values_0_key": (2, 2, 5, 4),
    }
    assert inputs["past_key_values_0_key"].dtype == np.float16
    np.testing.assert_array_equal(inputs["position_ids"][0], np.arange(5, 11))
    outputs = runtime.run(runtime.session(decoder()), inputs)
    np.testing.assert_array_equal(outputs["mask"], inputs["attention_mask"])


def test_token_ids_are_in_the_vocabulary_even_when_they_are_cast():
    assert runtime.index_limits(decoder()) == {"input_ids": 11, "position_ids": 20}
    ids = runtime.make_inputs(decoder(), batch=4, seq=64)["input_ids"]
    assert ids.min() == 0
    assert ids.max() == 10
    positions = runtime.make_inputs(decoder(), seq=64)["position_ids"]
    assert positions.max() == 19


def test_token_ids_inside_a_function_and_a_branch():
    text = """
        <ir_version: 9, opset_import: ["": 18, "my": 1]>
        m (int64[n] ids, bool c, float[6, 2] table) => (float[n, 2] y)
        {
            y = If(c) <
                then_branch = a () => (float[n, 2] p) { p = my.embed(table, ids) },
                else_branch = b () => (float[n, 2] q) { q = my.embed(table, ids) }
            >
        }
        <domain: "my", opset_import: ["": 18]>
        embed (t, i) => (o) { j = Identity(i)  o = Gather(t, j) }
    """
    assert runtime.index_limits(ir.from_onnx_text(text)) == {"ids": 6}


def test_one_row_of_a_batch_is_padded_and_every_query_keeps_a_key():
    cached = runtime.make_inputs(decoder(), batch=2, seq=4, past=4)["attention_mask"]
    np.testing.assert_array_equal(cached[1], [0, 0, 1, 1, 1, 1, 1, 1])
    empty = runtime.make_inputs(decoder(), batch=2, seq=8)["attention_mask"]
    np.testing.assert_array_equal(empty[1], [1, 1, 1, 1, 1, 1, 0, 0])
    assert cached[0].all()
    assert runtime.make_inputs(decoder(), batch=1)["attention_mask"].all()


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("int64[batch_size, total_sequence_length] attention_mask", (2, 11)),
        ('int64[batch, "past_sequence_length + 1"] attention_mask', (2, 6)),
        ("int64[b, past_seq_plus_seq] attention_mask", (2, 11)),
        ('float["batch_size*8", "Max(1, seq)"] x', (16, 6)),
        ("float[?, ?, 3] x", (2, 6, 3)),
        ("float[N, weird] x", (2, 3)),
        ("float[batch, num_channels, height] x", (2, 3, 9)),
        ("float[encoder_sequence_length, 7] x", (6, 7)),
        ("int64[s] cache_position", (6,)),
        ("float[1, 4] x", (1, 4)),
        ("float x", ()),
    ],
)
def test_symbolic_dimensions(declared, expected):
    source = model(f"m (float[1, 2, past_len, 4] past_k, {declared}) => () {{ }}")
    arrays = runtime.make_inputs(source, batch=2, seq=6, past=5, sizes={"height": 9})
    assert [a.shape for name, a in arrays.items() if name != "past_k"] == [expected]


def test_past_is_ignored_without_a_cache_and_fixed_sizes_win():
    plain = model("m (int64[batch, total_len] attention_mask) => () { }")
    assert runtime.make_inputs(plain, seq=6, past=5)["attention_mask"].shape == (1, 6)
    fixed = model("m (int64[1, 4] position_ids, float[1, 2, 7, 4] past_k) => () { }")
    positions = runtime.make_inputs(fixed, batch=3, seq=9, past=5)["position_ids"]
    np.testing.assert_array_equal(positions, [[7, 8, 9, 10]])


def test_the_kinds_of_values():
    source = model(
        "m (int64[batch, seq] token_type_ids, float[batch, 1, seq, total] attention_mask,"
        " bool[batch, seq] pad_mask, bool use_cache_branch, float[batch, 2, past, 4] past_k,"
        " int32 total_sequence_length, int32[batch] seqlens_k, bfloat16[4] x, string[2] s,"
        " bool[40] flags) => () { }"
    )
    inputs = runtime.make_inputs(source, batch=2, seq=3, past=5)
    assert set(np.unique(inputs["token_type_ids"])) <= {0, 1}
    assert not inputs["attention_mask"].any()
    assert inputs["attention_mask"].shape == (2, 1, 3, 8)
    assert inputs["pad_mask"].dtype == bool
    assert inputs["use_cache_branch"].item() is True
    assert inputs["total_sequence_length"].item() == 8
    np.testing.assert_array_equal(inputs["seqlens_k"], [7, 7])
    assert inputs["x"].dtype == BFLOAT16
    assert len(np.unique(inputs["flags"])) == 2


def test_inputs_are_seeded_and_defaults_are_not_fed():
    text = "m (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 1}> { y = Mul(x, w) }"
    source = model(text)
    first, again, other = (runtime.make_inputs(source, seed=seed) for seed in (1, 1, 2))
    assert list(first) == ["x"]
    np.testing.assert_array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])


def test_inputs_that_cannot_be_made():
    with pytest.raises(UsageError, match="not a tensor"):
        runtime.make_inputs(model("m (seq(float[n]) x) => () { }"))
    with pytest.raises(UsageError, match="dimension"):
        runtime.make_inputs(model("m (float[batch] x) => () { }"), batch=-1)


# --- Widening ------------------------------------------------------------------------------------

BRANCHES = """
    m (float16[n] x, bool c) => (float16[n] y, float16[n] z)
    {
        half = Constant<value = float16 {11878}>()
        y = If(c) <
            then_branch = a () => (float16[n] p) { p = Mul(x, w) },
            else_branch = b () => (float16[n] q) { s = Cast<to = 1>(x)  q = Cast<to = 10>(s) }
        >
        z = Add(y, half)
    }
"""


def test_widening_keeps_values_and_leaves_the_model_alone():
    source = model(BRANCHES, w=np.array([0.1], np.float16))
    before = ir.to_proto(source).SerializeToString()
    wide = widen(source, ir.DataType.FLOAT)
    assert ir.to_proto(source).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(wide), full_check=True)
    assert {v.dtype for v in (*wide.graph.inputs, *wide.graph.outputs)} == {
        ir.DataType.FLOAT,
        ir.DataType.BOOL,
    }
    weight = wide.graph.initializers["w"].const_value
    assert isinstance(weight, ir.LazyTensor)
    assert weight.numpy()[0] == np.float32(np.float16(0.1))
    x = np.array([3.0], np.float32)
    y = runtime.run(runtime.session(wide), {"x": x, "c": np.array(True)})["y"]
    assert y[0] == 3 * np.float32(np.float16(0.1))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_rounding_is_that_of_the_narrow_type(dtype):
    name = "float16" if dtype == np.float16 else "bfloat16"
    source = model(
        f"m ({name}[n, 64] x) => ({name}[n, 64] y)"
        " { a = MatMul(x, w)  b = Tanh(a)  y = Add(b, x) }",
        w=np.random.default_rng(0).standard_normal((64, 64)).astype(dtype),
    )
    rounded = widen(source, ir.DataType.FLOAT, rounded=True)
    onnx.checker.check_model(ir.to_proto(rounded), full_check=True)
    assert rounded.graph.outputs[0].name == "y"
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(dtype)
    w = source.graph.initializers["w"].const_value.numpy().astype(np.float32)

    def narrow(array):
        return array.astype(dtype).astype(np.float32)

    wide = x.astype(np.float32)
    expected = narrow(narrow(np.tanh(narrow(wide @ w))) + wide)
    y = runtime.run(runtime.session(rounded), {"x": wide})["y"]
    np.testing.assert_array_equal(y, narrow(y))
    # A sum near a tie may round the other way: one unit in the last place, and seldom.
    np.testing.assert_allclose(y, expected, rtol=2.0**-7, atol=2.0**-7)
    assert np.mean(y == expected) > 0.95


def test_widening_to_double():
    source = model(
        "m (float[n] x) => (float[n] y)"
        " { c = Constant<value_float = 0.5>()  d = Cast<to = 1>(c)  y = Mul(x, d) }"
    )
    wide = widen(source, ir.DataType.DOUBLE)
    onnx.checker.check_model(ir.to_proto(wide), full_check=True)
    y = runtime.run(runtime.session(wide), {"x": np.ones(2)})["y"]
    assert y.dtype == np.float64
    with pytest.raises(ValueError, match="cannot widen"):
        widen(source, ir.DataType.FLOAT16)


def test_widening_of_functions():
    text = """
        <ir_version: 9, opset_import: ["": 18, "my": 1]>
        m (bfloat16[n] x) => (bfloat16[n] y) { y = my.twice(x) }
        <domain: "my", opset_import: ["": 18]>
        twice (a) => (b) { c = Cast<to = 16>(a)  b = Add(c, c) }
    """
    source = ir.from_onnx_text(text)
    wide = widen(source, ir.DataType.FLOAT, rounded=True)
    assert len(source.functions) == 1
    y = runtime.run(runtime.session(wide), {"x": np.ones(2, np.float32)})["y"]
    np.testing.assert_array_equal(y, [2, 2])


def test_precision_is_the_type_of_most_weights():
    weights = {"a": np.zeros(3, np.float32), "b": np.zeros(100, np.float16)}
    assert (
        precision(
            model(
                "m () => (float[3] y, float16[100] z) { y = Identity(a) z = Identity(b) }",
                **weights,
            )
        )
        == ir.DataType.FLOAT16
    )
    assert precision(model("m (double[1] x) => () { }")) == ir.DataType.DOUBLE
    assert precision(model("m (int64[1] x) => () { }")) == ir.DataType.FLOAT
