"""Skipless models as ONNX files, through either of PyTorch's exporters."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from onnx_fold.base.progress import Report, ignore
from onnx_fold.base.silence import silenced
from onnx_fold.errors import CannotWriteError, MissingExtraError, UsageError
from onnx_fold.files.load import load
from onnx_fold.files.targets import check_format, check_target
from onnx_fold.files.write import saving
from onnx_fold.models import presets
from onnx_fold.models.config import SkiplessConfig, num_parameters

if TYPE_CHECKING:
    from onnx_fold.models.skipless import SkiplessTransformer

Exporter = Literal["dynamo", "torchscript"]
DType = Literal["float64", "float32", "float16", "bfloat16"]

Axes: TypeAlias = dict[int, str]
DEFAULT_OPSET: Final[dict[str, int]] = {"dynamo": 20, "torchscript": 17}
OPSETS: Final[dict[str, range]] = {"dynamo": range(18, 25), "torchscript": range(13, 21)}
"""What each exporter is asked for; others it refuses, or writes as something else."""

DRAWN_LIMIT: Final = 2**30
"""Bytes of weights up to which there is a PyTorch model of them; larger ones are only drawn."""


def export(
    preset: str | SkiplessConfig,
    output: str | os.PathLike[str],
    *,
    layers: int | None = None,
    dtype: DType = "float32",
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    kv_cache: bool = False,
    residual: bool = False,
    seed: int = 0,
    progress: Report = ignore,
) -> Path:
    """Write a freshly initialised model of a preset's shape to ``output``.

    A model of more than 1 GiB is never in memory (with dynamo): its weights are drawn one by one
    while they are written, and are Gaussian.

    Args:
        preset: A name in :data:`~onnx_fold.models.presets.PRESETS`, or a shape.
        output: The file to write; weights over 1 GiB go to ``<output>.data``.
        layers: Number of blocks, instead of the shape's own.
        dtype: Type of all weights and of the logits.
        exporter: ``torch.onnx.export`` with ``dynamo=True``, or the older TorchScript one.
        opset: ONNX opset; by default 20, and 17 for TorchScript.
        kv_cache: Take and return keys and values, see :func:`export_module`.
        residual: Export the ordinary twin, with skips and norms.
        seed: Decides the weights; equal arguments give equal files.
        progress: Is called with what is being done, bytes written, and bytes in all.

    Returns:
        The path of the graph file.

    Raises:
        MissingExtraError: torch or onnxscript is not installed.
        UsageError: Unknown preset, dtype or exporter, or an opset that the exporter cannot write.
        CannotWriteError: The output cannot be written.
    """
    config = presets.config(preset) if isinstance(preset, str) else preset
    config = presets.with_layers(config, layers)
    _check(dtype, get_args(DType), "dtype")
    opset = _check_target(output, exporter, opset)
    torch = _import_torch()
    from onnx_fold.models.skipless import SkiplessTransformer

    config = dataclasses.replace(config, residual=residual or config.residual)
    kind = getattr(torch, dtype)
    progress("exporting", 0, 0)
    if exporter == "dynamo" and num_parameters(config) * kind.itemsize > DRAWN_LIMIT:
        from onnx_fold.models.large import trace

        to_onnx = partial(_to_onnx, opset=opset, kv_cache=kv_cache, optimize=False)
        graph = trace(config, kind, seed, to_onnx)
        return _write(graph, output, progress=progress)
    model = SkiplessTransformer(config, dtype=kind, seed=seed)
    return export_module(model, output, exporter=exporter, opset=opset, kv_cache=kv_cache)


def export_module(
    model: SkiplessTransformer,
    output: str | os.PathLike[str],
    *,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    kv_cache: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``model`` to ``output``, with ``metadata`` in the model's metadata_props.

    The graph maps ``input_ids`` (int64 [batch, sequence_length]) to ``logits`` [batch,
    sequence_length, vocab_size]. With ``kv_cache`` it also takes ``attention_mask`` (int64 [batch,
    past_sequence_length + sequence_length]) and per layer ``past_key_values.N.key`` and ``.value``
    ([batch, num_key_value_heads, past_sequence_length, head_dim]; the length may be 0), and returns
    ``present.N.key`` and ``.value``, which hold past and new positions.

    Returns and raises as :func:`export`.
    """
    opset = _check_target(output, exporter, opset)
    if exporter == "dynamo":
        return _write(_to_onnx(model, opset, kv_cache), output, metadata)
    with tempfile.TemporaryDirectory() as folder:
        graph = _to_torchscript(model, Path(folder), opset, kv_cache)
        return _write(graph, output, metadata)


def _write(
    graph: ir.Model,
    output: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    progress: Report = ignore,
) -> Path:
    name_weights(graph)
    ClearMetadataAndDocStringPass()(graph)  # stack traces name the exporting machine's folders
    graph.metadata_props.update(metadata or {})
    with saving(graph, Path(output), report=progress):
        return Path(output)


def _check(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise UsageError(f"unknown {what} '{value}'; there are: {', '.join(known)}")


def _check_target(output: str | os.PathLike[str], exporter: Exporter, opset: int | None) -> int:
    """Return the opset to write, after all checks that need no model."""
    _check(exporter, get_args(Exporter), "exporter")
    opset = DEFAULT_OPSET[exporter] if opset is None else opset
    if opset not in OPSETS[exporter]:
        first, *_, last = OPSETS[exporter]
        raise UsageError(f"{exporter} writes opset {first} to {last}, not {opset}")
    if not Path(output).parent.is_dir():
        raise CannotWriteError(f"cannot write {output}: there is no folder {Path(output).parent}")
    check_format(Path(output))
    check_target(Path(output))
    return opset


def _import_torch() -> Any:
    try:
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "torch") from error
    return torch


def _to_onnx(
    model: SkiplessTransformer, opset: int, kv_cache: bool, optimize: bool = True
) -> ir.Model:
    torch = _import_torch()
    args, inputs, outputs = _signature(model, kv_cache)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            args,
            dynamo=True,
            verbose=False,
            dynamic_shapes=_nest(list(inputs.values())),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            optimize=optimize,
        )
    graph: ir.Model = program.model
    return graph


def _to_torchscript(
    model: SkiplessTransformer, folder: Path, opset: int, kv_cache: bool
) -> ir.Model:
    """Run the older exporter, which leaves large weights in ``folder``."""
    torch = _import_torch()
    args, inputs, outputs = _signature(model, kv_cache)
    file = folder / "model.onnx"
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            model.eval(),
            args,
            str(file),
            dynamo=False,
            dynamic_axes=inputs | outputs,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
        )
    return load(file)


def _signature(
    model: SkiplessTransformer, kv_cache: bool
) -> tuple[tuple[Any, ...], dict[str, Axes], dict[str, Axes]]:
    """Return example arguments, and for all inputs and outputs the names of their dynamic axes."""
    torch = _import_torch()
    config, dtype = model.config, model.lm_head.weight.dtype
    batch, seq, past = 2, 5, 7
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    axes = {0: "batch", 1: "sequence_length"}
    logits = {0: "batch"} if config.last_token_only else axes
    if not kv_cache:
        return (ids,), {"input_ids": axes}, {"logits": logits}
    total = "past_sequence_length + sequence_length"
    inputs = {"input_ids": axes, "attention_mask": {0: "batch", 1: total}}
    outputs = {"logits": logits}
    for layer, part in itertools.product(range(config.num_hidden_layers), ("key", "value")):
        inputs[f"past_key_values.{layer}.{part}"] = {0: "batch", 2: "past_sequence_length"}
        outputs[f"present.{layer}.{part}"] = {0: "batch", 2: total}
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    cache = [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
    mask = torch.ones(batch, past + seq, dtype=torch.int64)
    return _nest([ids, mask, *cache]), inputs, outputs


def _nest(flat: list[Any]) -> tuple[Any, ...]:
    """Pair the keys and values among the inputs, as ``SkiplessTransformer.forward`` takes them."""
    if len(flat) == 1:
        return tuple(flat)
    return flat[0], flat[1], list(zip(flat[2::2], flat[3::2], strict=True))


def name_weights(model: ir.Model) -> None:
    """Name transposed weights after the module that owns them, instead of val_41 and so on.

    The module is the last but one scope of the node, which dynamo keeps in the metadata and
    TorchScript in the node's name, such as ``/layers.0/attn/q_proj/MatMul``.
    """
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        owner = (
            ast.literal_eval(scopes)[-2]
            if scopes
            else ".".join(str(node.name).strip("/").split("/")[:-1])
        )
        weight = node.inputs[-1] if node.op_type == "MatMul" else None
        name = f"{owner}.weight"
        if weight is not None and weight.is_initializer() and name not in model.graph.initializers:
            weight.name = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress lines, warnings and log records to themselves."""
    with (
        silenced("torch", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx"),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
