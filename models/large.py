"""Large skipless models as graphs whose weights do not exist: each is drawn when it is written.

The model is traced with fake tensors, which have a shape and no values. The graph's initializers
are then Gaussian matrices with a seed of their own, so that a model of any size is exported in the
memory of its largest weight.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  # numpy then knows bfloat16
import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onnx_fold.models.config import SkiplessConfig
from onnx_fold.models.skipless import SkiplessBlock, SkiplessTransformer, spread

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 22
_NARROW = 512


def trace(
    config: SkiplessConfig,
    dtype: torch.dtype,
    seed: int,
    to_onnx: Callable[[SkiplessTransformer], ir.Model],
) -> ir.Model:
    """Return the graph of a model of this shape; its weights are drawn each time they are read.

    Weights are Gaussian whatever ``config.init`` says. What writes the output of a block is scaled
    as in :meth:`SkiplessTransformer.scale_to_data`, by the gains of a narrow model of the same
    depth: how a random layer changes the size of its input depends little on its width.

    Args:
        config: The shape.
        dtype: Type of all weights.
        seed: Decides the weights, each together with its name.
        to_onnx: Exports a model, without optimising the graph.
    """
    model = SkiplessTransformer(config, dtype=dtype, seed=None)
    with FakeTensorMode():
        _fake_parameters(model)
        graph = to_onnx(model)
    scales = _scales(model, seed)
    for name, value in graph.graph.initializers.items():
        if name in scales:
            _store_as_read(graph.graph, value)
            value.const_value = _drawn(value, seed, *scales[name])
    onnxscript.optimizer.optimize(graph)
    return graph


def _fake_parameters(model: SkiplessTransformer) -> None:
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            fake = torch.empty(old.shape, dtype=old.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=False))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def _scales(model: SkiplessTransformer, seed: int) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of every parameter."""
    config = model.config
    scales = {
        name: spread(name, tuple(parameter.shape), config)
        for name, parameter in model.named_parameters()
    }
    if config.residual:
        return scales
    factor = max(1, config.hidden_size // _NARROW)
    narrow = dataclasses.replace(
        config,
        vocab_size=min(config.vocab_size, 1024),
        hidden_size=config.hidden_size // factor,
        head_dim=max(2, config.head_dim // factor),
        intermediate_size=config.intermediate_size // factor,
        init="gaussian",
    )
    gains = SkiplessTransformer(narrow, seed=seed).gains
    blocks = [layer for layer in model.layers if isinstance(layer, SkiplessBlock)]
    for index, (layer, gain) in enumerate(zip(blocks, gains, strict=True)):
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        for writer in layer.writers():
            for parameter in writer.parameters():
                name = f"layers.{index}.{names[id(parameter)]}"
                mean, deviation = scales[name]
                scales[name] = mean * gain, deviation * gain
    return scales


def _drawn(value: ir.Value, seed: int, mean: float, deviation: float) -> ir.LazyTensor:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape, dtype = tuple(value.shape.numpy()), value.dtype
    draw = functools.partial(_draw, value.name, shape, dtype, seed, mean, deviation)
    return ir.LazyTensor(draw, dtype, ir.Shape(shape), name=value.name)


def _draw(
    name: str, shape: tuple[int, ...], dtype: ir.DataType, seed: int, mean: float, deviation: float
) -> ir.TensorProtocol:
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    array = np.empty(shape, dtype.numpy())
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        drawn = generator.standard_normal(part.size, dtype=np.float32)
        drawn *= np.float32(deviation)
        part[:] = drawn if mean == 0.0 else drawn + np.float32(mean)
    return ir.Tensor(array, dtype, name=name)


def _store_as_read(graph: ir.Graph, value: ir.Value) -> None:
    """Store transposed what is only read through a Transpose, as exporters do."""
    readers = [node for node, _ in value.uses()]
    if value.shape is None or any(node.op_type != "Transpose" for node in readers):
        return
    value.shape = ir.Shape(reversed(value.shape.numpy()))
    for node in readers:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
