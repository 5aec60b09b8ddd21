"""Weights to measure with: random ones by kind of spectrum, and those of trained models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.fft

Matrix = npt.NDArray[np.float64]
State = dict[str, npt.NDArray[Any]]
"""Weights by the names that a SkiplessTransformer gives them, projections ``[out, in]``."""

KINDS = ("gaussian", "orthogonal", "power law")
"""Random weights. The singular values of the last fall as 1, 1/2, 1/3, ..., so cond(Q) = d."""

CHAR_GQA = Path(__file__).parents[1] / "models" / "char-gqa.onnx"


@dataclass(frozen=True)
class StreamWeights:
    """The layers at a stream: ``o [f, d]`` writes it, ``q [d, d]``, ``k`` and ``v [d, n]`` read."""

    o: Matrix
    q: Matrix
    k: Matrix
    v: Matrix
    head_dim: int


def random_stream(kind: str, width: int, seed: int) -> StreamWeights:
    """Weights of the shape of Mistral-7B: ``f = 3.5 d``, K and V a quarter as wide as Q (GQA)."""
    generator = np.random.default_rng([KINDS.index(kind), width, seed])
    return StreamWeights(
        _random(kind, 7 * width // 2, width, generator),
        _random(kind, width, width, generator),
        _random(kind, width, width // 4, generator),
        _random(kind, width, width // 4, generator),
        min(128, width // 4),
    )


def _random(kind: str, rows: int, columns: int, generator: np.random.Generator) -> Matrix:
    """A matrix ``[rows, columns]`` whose columns have unit length on average."""
    if kind == "gaussian":
        gaussian: Matrix = generator.standard_normal((rows, columns)) / np.sqrt(rows)
        return gaussian
    left = _orthogonal(rows, columns, generator)
    if kind == "orthogonal":
        return left
    values = 1.0 / np.arange(1, columns + 1)
    values *= np.sqrt(columns) / np.linalg.norm(values)
    matrix: Matrix = left * values @ _orthogonal(columns, columns, generator)
    return matrix


def _orthogonal(rows: int, columns: int, generator: np.random.Generator) -> Matrix:
    """Random orthonormal columns: random signs and a cosine transform, twice, on random axes.

    Much cheaper than the QR of a Gaussian matrix, and as dense.
    """
    matrix = np.zeros((rows, columns))
    axes = generator.permutation(rows)[:columns]
    matrix[axes, np.arange(columns)] = 1.0
    for _ in range(2):
        matrix *= generator.choice((-1.0, 1.0), (rows, 1))
        matrix = scipy.fft.dct(matrix, axis=0, norm="ortho", overwrite_x=True)
    return matrix


def char_gqa() -> State:
    """The weights of the small trained model that the package ships, float32."""
    state: State = {}
    for name, value in ir.load(CHAR_GQA).graph.initializers.items():
        if name.endswith(".weight") and value.const_value is not None:
            array = value.const_value.numpy()
            state[name] = array if name.startswith("embed") else array.T
    return state


def trained_streams(state: State, head_dim: int) -> Iterator[StreamWeights]:
    """Streams from each block to the next, of a serial model with separate Q, K and V."""
    layers = sum(name.endswith("q_proj.weight") for name in state)
    for layer in range(1, layers):
        attention = (f"{layer}.attn.{name}_proj" for name in "qkv")
        names = (f"{layer - 1}.ffn.o_proj", *attention)
        o, q, k, v = (state[f"layers.{name}.weight"].T.astype(np.float64) for name in names)
        yield StreamWeights(o, q, k, v, head_dim)
