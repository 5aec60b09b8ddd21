"""Shapes by name: small ones that cover every layout, and the paper's two; needs no torch.

The large shapes are those of Mistral-7B and Pythia-6.9B, the examples of N. Graef,
arXiv 2404.12362, without their norms and skips, and the former with its norms.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from onnx_fold.errors import UsageError
from onnx_fold.models.config import SkiplessConfig

_MISTRAL = SkiplessConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    activation="sigmoid",
    max_position_embeddings=32768,
    init="gaussian",
)

PRESETS: Final[dict[str, SkiplessConfig]] = {
    "tiny-mha": SkiplessConfig(
        num_key_value_heads=4, ffn="mlp", activation="gelu", bias=True, positions="learned"
    ),
    "tiny-gqa": SkiplessConfig(num_hidden_layers=3),
    "tiny-mqa": SkiplessConfig(
        num_key_value_heads=1, ffn="mlp", activation="relu", positions="alibi"
    ),
    "tiny-parallel": SkiplessConfig(
        num_key_value_heads=4,
        ffn="mlp",
        activation="gelu",
        bias=True,
        parallel=True,
        attention_gain=0.8,
        ffn_gain=0.6,
        learned_gains=True,
    ),
    "tiny-parallel-glu": SkiplessConfig(parallel=True, attention_gain=0.6, ffn_gain=0.8),
    "tiny-fused": SkiplessConfig(
        num_key_value_heads=4,
        ffn="mlp",
        activation="gelu",
        bias=True,
        positions="learned",
        fused_qkv=True,
    ),
    "tiny-qk-norm": SkiplessConfig(qk_norm=True),
    "tiny-gemma": SkiplessConfig(
        num_attention_heads=6, num_key_value_heads=2, activation="sigmoid"
    ),
    "tiny-palm": SkiplessConfig(
        num_attention_heads=3, num_key_value_heads=1, parallel=True, activation="sigmoid"
    ),
    "tiny-norms": SkiplessConfig(norm="rms"),
    "tiny-layer-norms": SkiplessConfig(
        num_key_value_heads=4,
        ffn="mlp",
        activation="gelu",
        bias=True,
        positions="learned",
        norm="layer",
    ),
    "small-gqa": SkiplessConfig(
        vocab_size=1024,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1792,
        activation="sigmoid",
        max_position_embeddings=2048,
    ),
    "tinyllama-1.1b": SkiplessConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=5632,
        activation="sigmoid",
        max_position_embeddings=2048,
        init="gaussian",
    ),
    "pythia-1.4b": SkiplessConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=8192,
        ffn="mlp",
        activation="gelu",
        bias=True,
        parallel=True,
        max_position_embeddings=2048,
        init="gaussian",
    ),
    "mistral-7b": _MISTRAL,
    "mistral-7b-norms": dataclasses.replace(_MISTRAL, norm="rms", activation="silu"),
    "pythia-6.9b": SkiplessConfig(
        vocab_size=50432,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        intermediate_size=16384,
        ffn="mlp",
        activation="gelu",
        bias=True,
        parallel=True,
        max_position_embeddings=2048,
        init="gaussian",
    ),
}


def config(preset: str, layers: int | None = None) -> SkiplessConfig:
    """Return the shape called ``preset``, with ``layers`` blocks if given.

    Raises:
        UsageError: There is no such preset, or ``layers`` is not positive.
    """
    if preset not in PRESETS:
        raise UsageError(f"unknown preset '{preset}'; there are: {', '.join(PRESETS)}")
    return with_layers(PRESETS[preset], layers)


def with_layers(config: SkiplessConfig, layers: int | None) -> SkiplessConfig:
    """Return ``config`` with ``layers`` blocks, or as it is for None.

    Raises:
        UsageError: ``layers`` is not positive.
    """
    if layers is None:
        return config
    if layers < 1:
        raise UsageError(f"a model needs at least one layer, not {layers}")
    return dataclasses.replace(config, num_hidden_layers=layers)
