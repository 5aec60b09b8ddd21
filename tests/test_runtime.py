"""Sessions, and what they run."""

import sys

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_fold import runtime
from onnx_fold.errors import InvalidModelError, MissingExtraError, UsageError

BFLOAT16 = ir.DataType.BFLOAT16.numpy()

DOUBLER = '<ir_version: 9, opset_import: ["": 18]> m (float[n] x) => (float[n] y) { y = Add(x, x) }'


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
