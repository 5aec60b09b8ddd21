"""What the layers of a model really read: rows of one run, for probes and row selection."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.precision import SIXTEEN_BITS
from onnx_fold.base.arguments import Provider
from onnx_fold.graph.linear import find_linears
from onnx_fold.graph.widen import precision, widen
from onnx_fold.runtime.inputs import given_inputs
from onnx_fold.runtime.sessions import run, session
from onnx_fold.streams.ends import Activations

MAX_ROWS = 256
"""Rows that are kept of each value."""


def record(
    model: ir.Model,
    inputs: str | os.PathLike[str] | Mapping[str, Array],
    provider: Provider = "cpu",
) -> Activations:
    """Run ``model`` once and keep rows of what each linear layer of its main graph reads.

    Args:
        model: The model; it is not changed. 16-bit models run in float32.
        inputs: Arrays by name, or an ``.npz`` file.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The inputs do not fit the model.
    """
    feeds = given_inputs(model, inputs)
    copy = model.clone()
    if precision(model) in SIXTEEN_BITS:
        copy = widen(model, ir.DataType.FLOAT)
        feeds = {name: _float32(array) for name, array in feeds.items()}
    axes = {layer.x: layer.x_axis for layer in find_linears(copy.graph) if layer.x_axis is not None}
    known = {value.name for value in (*copy.graph.inputs, *copy.graph.outputs)}
    copy.graph.outputs.extend(value for value in axes if value.name not in known)
    outputs = {**feeds, **run(session(copy, provider), feeds)}
    return Activations(
        {
            value.name: _rows(outputs[value.name], axis)
            for value, axis in axes.items()
            if value.name is not None and value.name in outputs
        }
    )


def _float32(array: Array) -> Array:
    is_narrow = array.dtype.itemsize == 2 and array.dtype.kind in "fV"
    return array.astype(np.float32) if is_narrow else array


def _rows(array: Array, axis: int) -> Array:
    rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    kept = np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS)).astype(np.intp)
    return rows[kept].astype(np.float64)
