"""The shape of a skipless transformer, and how many weights that shape has; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnx_fold.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SkiplessConfig:
    """Shape and options of a :class:`~onnx_fold.models.skipless.SkiplessTransformer`.

    The names are those of Hugging Face configurations where these have one.

    Attributes:
        ffn: ``glu`` is ``O(act(gate(x)) * up(x))``, ``mlp`` is ``O(act(fc_in(x)))``.
        activation: What stands between the first and the last projection of the FFN. Without norms
            a SiLU gate makes a block quadratic in its input, which two or three blocks survive and
            thirty do not; ``sigmoid`` (the first GLU, Dauphin et al. 2017) is linear in scale.
        bias: Biases on Q, K, V, P, M and O. They are random, not zero: exporters drop zero biases.
        parallel: Attention and FFN read the same stream and are summed:
            ``attention_gain * P(attn(x)) + ffn_gain * O(act(M(x)))``.
        learned_gains: Whether the two gains are parameters, or constants of the graph.
        alibi_slope: The steepest ALiBi slope; those of the other heads fall geometrically to 2**-8.
        norm: What stays of the norms, in front of attention, FFN and head: nothing, RMSNorm, or
            LayerNorm.
        residual: The ordinary pre-norm twin of this shape, with skips and norms (RMSNorm for
            ``glu``, LayerNorm for ``mlp``): nothing in it folds.
        last_token_only: Return the logits of the last position only.
        init: Projections are semi-orthogonal, or Gaussian as a large model affords.
    """

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 224
    ffn: Literal["glu", "mlp"] = "glu"
    activation: Literal["gelu", "relu", "sigmoid", "silu"] = "silu"
    bias: bool = False
    parallel: bool = False
    attention_gain: float = 1.0
    ffn_gain: float = 1.0
    learned_gains: bool = False
    positions: Literal["rope", "learned", "alibi"] = "rope"
    rope_theta: float = 10000.0
    alibi_slope: float = 0.5
    max_position_embeddings: int = 128
    fused_qkv: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm: Literal["none", "rms", "layer"] = "none"
    residual: bool = False
    last_token_only: bool = False
    init: Literal["orthogonal", "gaussian"] = "orthogonal"

    def __post_init__(self) -> None:
        """Check what the fields say together.

        Raises:
            UsageError: The heads cannot be grouped, or RoPE has an odd head_dim.
        """
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of"
                f" num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise UsageError(f"RoPE needs an even head_dim, not {self.head_dim}")

    @property
    def kept_norm(self) -> Literal["none", "rms", "layer"]:
        """The norm in front of attention, FFN and head: a residual model has one in any case."""
        if not self.residual or self.norm != "none":
            return self.norm
        return "rms" if self.ffn == "glu" else "layer"

    @property
    def query_size(self) -> int:
        """Columns of Q, rows of P."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of K and of V."""
        return self.num_key_value_heads * self.head_dim


def num_parameters(config: SkiplessConfig) -> int:
    """Number of parameters of a model of this shape, embeddings and head included."""
    return (
        config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
        + config.max_position_embeddings * config.hidden_size * (config.positions == "learned")
        + config.num_hidden_layers * _block_parameters(config)
        + _norm_parameters(config)
    )


def _block_parameters(config: SkiplessConfig) -> int:
    d, f = config.hidden_size, config.intermediate_size
    fan_in = 2 * f if config.ffn == "glu" else f
    qkv = config.query_size + 2 * config.kv_size
    weights = d * qkv + config.query_size * d + d * fan_in + f * d
    biases = qkv + d + fan_in + d
    gains = 2 * (config.parallel and config.learned_gains and not config.residual)
    return (
        weights
        + biases * config.bias
        + 2 * config.head_dim * config.qk_norm
        + gains
        + 2 * _norm_parameters(config)
    )


def _norm_parameters(config: SkiplessConfig) -> int:
    return config.hidden_size * {"none": 0, "rms": 1, "layer": 2}[config.kept_norm]
