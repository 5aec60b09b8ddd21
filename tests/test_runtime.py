"""Sessions, and what they run."""

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from helpers import graph, model, normal

from onnx_fold.errors import InvalidModelError, MissingExtraError, UsageError
from onnx_fold.runtime import sessions

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
    session = sessions.session(source, threads=1, optimize=False)
    np.testing.assert_array_equal(
        sessions.run(session, {"x": np.ones(3, np.float32)})["y"], [2, 2, 2]
    )


def test_session_of_a_loaded_model_with_external_data_from_another_folder(tmp_path, monkeypatch):
    source = model(
        "m (float[2, 3] x) => (float[2, 4] y) { y = MatMul(x, w) }", w=np.eye(3, 4, dtype="f4")
    )
    (tmp_path / "a").mkdir()
    ir.save(source, tmp_path / "a" / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    monkeypatch.chdir(tmp_path)
    loaded = ir.load("a/m.onnx")
    y = sessions.run(sessions.session(loaded), {"x": np.ones((2, 3), np.float32)})["y"]
    assert y.shape == (2, 4)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_session_of_a_model_over_the_protobuf_limit_goes_through_a_folder(monkeypatch):
    monkeypatch.setattr(sessions, "PROTOBUF_LIMIT", 16)
    source = model(
        "m (float[2, 3] x) => (float[2, 4] y) { y = MatMul(x, w) }", w=np.eye(3, 4, dtype="f4")
    )
    y = sessions.run(sessions.session(source), {"x": np.ones((2, 3), np.float32)})["y"]
    np.testing.assert_array_equal(y, [[1, 1, 1, 0]] * 2)
    assert not isinstance(source.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_session_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for provider in ("cpu", "auto"):
        with pytest.raises(MissingExtraError, match=r"onnx-fold\[cpu\]"):
            sessions.session(ir.from_onnx_text(DOUBLER), provider)


def test_session_rejects_an_unknown_provider():
    with pytest.raises(UsageError, match="unknown provider 'tpu'"):
        sessions.session(ir.from_onnx_text(DOUBLER), "tpu")


def test_cuda_in_a_build_without_it_is_an_error_and_auto_is_cpu(monkeypatch):
    ort = sessions.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="built without CUDA"):
        sessions.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert sessions.resolve_provider("auto") == "cpu"


def cuda_build(monkeypatch, session, preload=lambda: None):
    """Make the installed onnxruntime look like one for CUDA, whose sessions are ``session``."""
    ort = sessions.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "__file__", "nowhere/__init__.py")  # where its libraries are
    return ort


class DroppedSession:
    """ONNX Runtime leaves the provider out if its library cannot be loaded."""

    def __init__(self, source, options, providers, enable_fallback):
        assert providers[0] == ("CUDAExecutionProvider", {"use_tf32": 0})
        assert not enable_fallback

    def get_providers(self):
        return ["CPUExecutionProvider"]


def test_cuda_that_does_not_start_is_an_error_not_a_silent_fall_back(monkeypatch, capfd):
    def preload():
        print("Failed to load libcudart")
        warnings.warn("Failed to register bundled CUDA plugin", stacklevel=2)

    cuda_build(monkeypatch, DroppedSession, preload)
    with pytest.raises(
        UsageError, match=r"could not start CUDA: check the driver.*onnx-fold\[cuda\]"
    ):
        sessions.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert capfd.readouterr() == ("", "")
    assert sessions.resolve_provider("auto") == "cpu"


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (
            "libcublasLt.so.13",
            r"CUDA: libcublasLt\.so\.13: cannot open.*'onnx-fold\[cuda\]' brings",
        ),
        ("libcuda.so.1", r"CUDA: there is no NVIDIA driver \(libcuda\.so\.1: cannot open"),
    ],
)
def test_the_missing_library_is_named(monkeypatch, tmp_path, library, message):
    def load(path):
        assert path == str(provider)
        raise OSError(f"{library}: cannot open shared object file: No such file or directory")

    provider = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    provider.parent.mkdir()
    provider.touch()
    ort = cuda_build(monkeypatch, DroppedSession)
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sessions.ctypes, "CDLL", load)
    with pytest.raises(UsageError, match=message):
        sessions.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert sessions.resolve_provider("auto") == "cpu"


CUDA_FAILURE = """\
/src/cuda_call.cc:146 std::conditional_t<THRW, void, Status> onnxruntime::CudaCall(ERRTYPE) [with
ERRTYPE = cudaError; bool THRW = true] CUDA failure 35: CUDA driver version is insufficient for CUDA
runtime version ; GPU=-1 ; hostname=vm ; expr=cudaSetDevice(info_.device_id);"""


def test_a_cuda_failure_is_no_fault_of_the_model(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(CUDA_FAILURE)

    cuda_build(monkeypatch, fail)
    said = "could not start CUDA: CUDA failure 35: CUDA driver version is insufficient for CUDA"
    with pytest.raises(UsageError, match=rf"{said} runtime version; check the driver"):
        sessions.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert sessions.resolve_provider("auto") == "cpu"


def cuda_that_runs(*on_cpu):
    """Sessions that say that all runs on CUDA but ``on_cpu``, and run it on the CPU."""
    real = sessions.onnxruntime().InferenceSession

    class Session(real):
        def __init__(self, source, options, providers, enable_fallback):
            super().__init__(source, options, providers=[providers[-1]])

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self):
            nodes = [n for g in super().get_provider_graph_assignment_info() for n in g.get_nodes()]
            for node in nodes:
                provider = "CPU" if node.op_type in on_cpu else "CUDA"
                yield SimpleNamespace(
                    ep_name=f"{provider}ExecutionProvider", get_nodes=lambda node=node: [node]
                )

    return Session


def layers():
    """A rotary embedding's product of positions, a layer, and a product of activations."""
    text = "(float[n, 16] x) => (float[n, m] y, float[n, 16] r) {"
    text += " s = Shape(x) n = Gather(s, zero) p = Range(zero, n, one) f = Cast<to = 1>(p)"
    text += " c = Unsqueeze(f, one) [rotary] r = MatMul(c, W)"
    text += " [layer] h = MatMul(x, M) t = Transpose(x) [core] y = MatMul(h, t) }"
    return graph(text, zero=np.array(0), one=np.array(1), W=normal(1, 16), M=normal(16, 16, seed=1))


def test_shape_arithmetic_may_run_on_the_cpu(monkeypatch):
    cuda_build(monkeypatch, cuda_that_runs("Shape", "Gather", "Range"))
    placed = sessions.placement(sessions.session(layers(), "cuda"))
    assert placed["CUDAExecutionProvider"]["MatMul"] == 3
    assert placed["CPUExecutionProvider"] == {"Shape": 1, "Gather": 1, "Range": 1}
    assert sessions.resolve_provider("auto") == "cuda"


def test_a_layer_on_the_cpu_is_a_missing_kernel_and_small_products_are_not(monkeypatch):
    cuda_build(monkeypatch, cuda_that_runs("MatMul", "Range"))
    with pytest.raises(sessions.MissingKernelError) as caught:
        sessions.session(layers(), "cuda")
    assert "no CUDA kernel for MatMul 'layer' (float), and would run it on the CPU" in str(
        caught.value
    )


def test_nodes_that_onnx_runtime_named_count_and_the_first_three_are_said(monkeypatch):
    gemm = {"b": normal(4), "W": normal(4, 4)}
    text = "(float16[n, 4] x) => (float16[n, 4] y) { "
    for i in range(5):
        text += f"[l{i}] h{i} = MatMul({'x' if i == 0 else f'y{i - 1}'}, W) "
        text += f"[a{i}] {'y' if i == 4 else f'y{i}'} = Add(h{i}, b) "
    source = graph(text + "}", **{name: a.astype(np.float16) for name, a in gemm.items()})
    cuda_build(monkeypatch, cuda_that_runs("Gemm"))
    with pytest.raises(sessions.MissingKernelError, match=r"Gemm 'l0.*' \(float16\).* and 2 more"):
        sessions.session(source, "cuda")


def test_where_onnx_runtime_does_not_tell_a_warning_says_so(monkeypatch, caplog):
    class Old:
        def __init__(self, *_, **__):
            pass

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    cuda_build(monkeypatch, Old)
    session = sessions.session(ir.from_onnx_text(DOUBLER), "cuda")
    assert sessions.placement(session) is None
    assert "does not tell on which provider a node runs" in caplog.text


def test_auto_is_cpu_where_cuda_starts_and_cannot_compute(monkeypatch):
    class Session(cuda_that_runs()):
        def run(self, *_):
            raise RuntimeError("CUDA error cudaErrorNoKernelImageForDevice")

    cuda_build(monkeypatch, Session)
    assert sessions.resolve_provider("auto") == "cpu"


def test_session_of_what_is_no_model(tmp_path):
    with pytest.raises(InvalidModelError, match="cannot read"):
        sessions.session(tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(InvalidModelError, match=r"bad\.onnx") as caught:
        sessions.session(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)


def test_session_without_a_kernel_says_which():
    source = model("m (bfloat16[n] x) => (bfloat16[n] y) { y = Tanh(x) }")
    with pytest.raises(sessions.MissingKernelError, match="Tanh"):
        sessions.session(source)


def test_run_with_bfloat16():
    session = sessions.session(
        model("m (bfloat16[n, 2] x) => (bfloat16[2, n] y) { y = Transpose(x) }")
    )
    x = np.arange(6).reshape(3, 2).astype(BFLOAT16)
    y = sessions.run(session, {"x": x})["y"]
    assert y.dtype == BFLOAT16
    np.testing.assert_array_equal(y, x.T)
    assert sessions.run(session, {"x": x[:0]})["y"].shape == (2, 0)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_values_of_a_device_are_filled_from_the_bits(monkeypatch, shape):
    """The host stands in for the device: the same calls, but for where the memory is."""
    value = sessions.onnxruntime().OrtValue
    make = value.ortvalue_from_shape_and_type

    def allocate(shape, kind, device):
        assert device == "cuda"
        return make(shape, kind, "cpu")

    monkeypatch.setattr(value, "ortvalue_from_shape_and_type", allocate)
    x = np.full(shape, 1.5).astype(BFLOAT16)
    held = sessions.to_ort_value(x, "cuda")
    assert held.data_type() == "tensor(bfloat16)"
    np.testing.assert_array_equal(sessions._to_numpy(held), x, strict=True)


def test_run_with_sequences_strings_and_scalars():
    source = model(
        "m (string[n] s, bool b, float[4] x) => (string[n] t, bool c, seq(float[k]) parts)"
        " { t = Identity(s) c = Not(b) parts = SplitToSequence(x, two) }",
        two=np.array(2),
    )
    x = np.arange(4, dtype=np.float32)
    s = np.array(["a", "b"], dtype=object)
    outputs = sessions.run(sessions.session(source), {"s": s, "b": np.array(True), "x": x})
    assert list(outputs) == ["t", "c", "parts[0]", "parts[1]"]
    np.testing.assert_array_equal(outputs["parts[1]"], [2, 3])
    assert not outputs["c"]


@pytest.mark.parametrize(
    "inputs", [{}, {"x": np.ones(1, np.float64)}, {"x": np.ones(1, "f4"), "z": np.ones(1, "f4")}]
)
def test_run_with_the_wrong_inputs(inputs):
    with pytest.raises(sessions.RunFailedError, match="cannot run"):
        sessions.run(sessions.session(ir.from_onnx_text(DOUBLER)), inputs)
