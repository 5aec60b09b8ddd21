"""ONNX Runtime: sessions that do what was asked or say why not."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.base.arguments import Provider
from onnx_fold.errors import InvalidModelError, MissingExtraError, UsageError
from onnx_fold.files.load import PROTOBUF_LIMIT, TEXT_SUFFIXES, ModelSource, load, weight_bytes
from onnx_fold.files.write import read_in, write
from onnx_fold.runtime.placement import CPU, RECORD, misplaced, placement

__all__ = [
    "MissingKernelError",
    "RunFailedError",
    "fits_message",
    "one_line",
    "onnxruntime",
    "placement",
    "resolve_provider",
    "run",
    "session",
    "to_ort_value",
]

logger = logging.getLogger(__name__)


_CUDA = "CUDAExecutionProvider"
_WARNINGS, _FATAL_ONLY = 2, 4
_NO_CUDA = "provider 'cuda': ONNX Runtime could not start CUDA"
_INSTALL = "check the driver, and the CUDA and cuDNN libraries (pip install 'onnx-fold[cuda]')"


class MissingKernelError(InvalidModelError):
    """The model is valid, but the provider has no kernel for an operator with its types."""


class RunFailedError(UsageError):
    """ONNX Runtime loaded the model but cannot run it on these inputs."""


def session(
    model: ModelSource,
    provider: Provider = "cpu",
    *,
    threads: int | None = None,
    optimize: bool = True,
    provider_options: Mapping[str, object] | None = None,
    config: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of ``model`` that runs on ``provider``.

    On CUDA the session is asked where its nodes run: shape arithmetic may run on the CPU, layers
    with weights and attention may not. A version of ONNX Runtime that cannot tell is only asked
    whether CUDA is among its providers, and a warning is logged.

    Args:
        model: A file is opened by ONNX Runtime itself. Anything else is handed over in memory, or
            through a temporary folder if it does not fit one protobuf message.
        provider: ``"cpu"``, ``"cuda"`` (TensorFloat-32 off), or ``"auto"``: cuda if it works.
        threads: Threads of one operator; None lets ONNX Runtime decide.
        optimize: Let ONNX Runtime rewrite the graph.
        provider_options: Further options of the CUDA provider, such as ``enable_cuda_graph``.
        config: Session configuration entries of ONNX Runtime.
        profile: How the name of the file begins to which ``end_profiling`` writes; None for none.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The provider is unknown, or cannot be used here, and why; there is no silent
            fall-back.
        MissingKernelError: The provider lacks a kernel that the model needs, or CUDA one of a layer
            or of attention, which would then run on the CPU.
        InvalidModelError: ONNX Runtime cannot load the model.
    """
    provider = resolve_provider(provider)
    ort = onnxruntime()
    providers = _providers(ort, provider, dict(provider_options or {}))
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    for key, entry in {RECORD: "1", **(config or {})}.items():
        options.add_session_config_entry(key, entry)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _as_file_or_bytes(model) as (source, name), _quiet(ort):
        try:
            created = ort.InferenceSession(
                source, options, providers=providers, enable_fallback=False
            )
        except Exception as error:
            raise _load_error(error, name, provider) from error
    if provider == "cuda":
        _check_placement(ort, created, model)
    return created


def _check_placement(ort: Any, session: Any, model: ModelSource) -> None:
    if _CUDA not in session.get_providers():
        raise UsageError(f"{_NO_CUDA}: {_missing_library(ort) or _INSTALL}")
    if placement(session) is None:
        logger.warning(
            "onnxruntime %s does not tell on which provider a node runs: only that CUDA is there"
            " was checked",
            ort.__version__,
        )
    elif nodes := misplaced(session, lambda: load(model)):
        more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
        raise MissingKernelError(
            f"provider 'cuda': ONNX Runtime has no CUDA kernel for {', '.join(nodes[:3])}{more},"
            " and would run it on the CPU"
        )


def _missing_library(ort: Any) -> str:
    """Return the library without which that of the CUDA provider cannot be loaded, in words.

    To be asked after ONNX Runtime has tried itself: before, the library would be loaded without
    the host that it looks up when it is loaded, and stay so.
    """
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        return ""
    try:
        ctypes.CDLL(os.fspath(library))
    except OSError as error:
        if "libcuda.so" in str(error):
            return f"there is no NVIDIA driver ({error})"
        return f"{error}; pip install 'onnx-fold[cuda]' brings the CUDA and cuDNN libraries"
    return ""


def onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error


def resolve_provider(provider: Provider) -> Provider:
    """Return ``"cuda"`` or ``"cpu"`` for ``"auto"``, by whether CUDA works; others as they are."""
    if provider != "auto":
        return provider
    trial = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["": 17]> trial (float[1, 1] x) => (float[1, 1] y)'
        " { y = MatMul(x, x) }"
    )
    try:
        run(session(trial, "cuda"), {"x": np.ones((1, 1), np.float32)})
    except MissingExtraError:
        raise
    except (UsageError, InvalidModelError) as error:
        logger.debug("auto: cpu, because %s", error)
        return "cpu"
    return "cuda"


def _providers(ort: Any, provider: str, options: dict[str, object]) -> list[Any]:
    if provider == "cpu":
        return [CPU]
    if provider != "cuda":
        raise UsageError(f"unknown provider '{provider}': expected cpu, cuda or auto")
    if _CUDA not in ort.get_available_providers():
        raise UsageError(
            "provider 'cuda': the installed onnxruntime was built without CUDA:"
            " pip uninstall onnxruntime, then pip install 'onnx-fold[cuda]'"
        )
    if hasattr(ort, "preload_dlls"):
        with _quiet(ort):
            ort.preload_dlls()
    return [(_CUDA, {"use_tf32": 0, **options}), CPU]


@contextlib.contextmanager
def _quiet(ort: Any) -> Iterator[None]:
    """Send what ONNX Runtime prints about missing libraries to the log.

    What its default logger writes to the standard error cannot be redirected: it is switched off,
    and then back to the level that it has by default.
    """
    said = io.StringIO()
    ort.set_default_logger_severity(_FATAL_ONLY)
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)
    if said.getvalue().strip():
        logger.debug("onnxruntime: %s", said.getvalue().strip())


@contextlib.contextmanager
def _as_file_or_bytes(source: ModelSource) -> Iterator[tuple[str | bytes, str]]:
    """Yield what ONNX Runtime opens, and a name for error messages."""
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise InvalidModelError(f"cannot read {source}: No such file")
        if Path(source).suffix not in TEXT_SUFFIXES:
            yield os.fspath(source), os.fspath(source)
            return
    model = load(source)
    name = f"model '{model.graph.name}'"
    if fits_message(model):
        copy = model.clone()
        read_in(copy)
        yield ir.to_proto(copy).SerializeToString(), name
        return
    with tempfile.TemporaryDirectory(prefix="onnx-fold-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        write(model, path)
        yield os.fspath(path), name


def fits_message(model: ir.Model) -> bool:
    """Whether a model that is in no file of its own is handed over in memory, not written first."""
    return weight_bytes(model) <= PROTOBUF_LIMIT // 2


_CUDA_FAILURE = re.compile(r"\b(cuda|cudnn|cublas)\w* (error|failure)[^;]*", re.IGNORECASE)
_NO_KERNEL = re.compile(r"NOT_IMPLEMENTED|Type Error: Type 'tensor\((bfloat16|float16|double)\)'")


def _load_error(error: Exception, name: str, provider: str) -> Exception:
    reason = one_line(error)
    if provider == "cuda" and (failure := _CUDA_FAILURE.search(reason)):
        return UsageError(f"{_NO_CUDA}: {failure.group().strip()}; {_INSTALL}")
    kind = MissingKernelError if _NO_KERNEL.search(str(error)) else InvalidModelError
    return kind(f"ONNX Runtime cannot load {name}: {reason}")


def one_line(error: Exception) -> str:
    """Return the message of an error of ONNX Runtime in one line, without its codes."""
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)


def run(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run ``session`` on ``inputs`` and return its outputs by name, on the CPU.

    bfloat16 and float8 inputs and outputs are arrays of ``ml_dtypes``, of which ONNX Runtime's own
    ``run`` knows nothing. The elements of a sequence output ``y`` are called ``y[0]``, ``y[1]``.

    Raises:
        RunFailedError: An input is missing, unknown or of the wrong type or shape, or an operator
            cannot work with the values.
    """
    outputs = session.get_outputs()
    unknown = any(array.dtype.isbuiltin != 1 for array in inputs.values())
    try:
        if unknown or any(value.type in _NOT_IN_NUMPY for value in outputs):
            results = _run_bound(session, inputs)
        else:
            results = session.run(None, dict(inputs))
    except Exception as error:
        raise RunFailedError(f"ONNX Runtime cannot run the model: {one_line(error)}") from error
    return dict(_named([value.name for value in outputs], results))


def _run_bound(session: Any, inputs: Mapping[str, Array]) -> list[Array]:
    """Run with values that NumPy does not know; ONNX Runtime copies each output to the host."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, to_ort_value(array))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    return [_to_numpy(value) for value in binding.get_outputs()]


def _named(names: Sequence[str], results: Sequence[Any]) -> Iterator[tuple[str, Array]]:
    for name, result in zip(names, results, strict=True):
        if isinstance(result, list):
            yield from ((f"{name}[{i}]", np.asarray(item)) for i, item in enumerate(result))
        else:
            yield name, np.asarray(result)


def to_ort_value(array: Array, device: str = "cpu") -> Any:
    """Return ``array`` as an ``onnxruntime.OrtValue`` on ``device``; bfloat16 keeps its type."""
    ort = onnxruntime()
    array = np.require(array, requirements=["C_CONTIGUOUS"])
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array, device)
    element = int(ir.DataType.from_numpy(array.dtype))
    bits = array.view(f"u{array.itemsize}")
    if device == "cpu":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, element, device)
    value.update_inplace(bits)
    return value


_NOT_IN_NUMPY = {
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
    "tensor(float8e4m3fn)": ir.DataType.FLOAT8E4M3FN,
    "tensor(float8e4m3fnuz)": ir.DataType.FLOAT8E4M3FNUZ,
    "tensor(float8e5m2)": ir.DataType.FLOAT8E5M2,
    "tensor(float8e5m2fnuz)": ir.DataType.FLOAT8E5M2FNUZ,
}
"""Types of ONNX Runtime whose values it cannot hand over itself."""


def _to_numpy(value: Any) -> Array:
    """Return a copy of an ``OrtValue`` of the host's memory."""
    dtype = _NOT_IN_NUMPY.get(value.data_type())
    if dtype is None:
        return np.asarray(value.numpy())
    array = np.empty(value.shape(), dtype.numpy())
    if array.size:
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array
