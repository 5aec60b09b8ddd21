"""A transformer without skips and norms, whose projections fold.

Serial block (row-vector convention, ``W`` is ``[in, out]``; N. Graef, arXiv 2404.12362, fig. 1)::

    x' = O act(M P attn(x Q, x K, x V))       M is fc_in, or gate and up

so P is read by M alone and O by the next block's Q, K and V alone: two closed streams of width
``hidden_size``, each of which can lose hidden_size**2 weights. Parallel block (fig. 3)::

    x' = a P attn(x Q, x K, x V) + h O act(M x)

has one such stream. B. He and T. Hofmann, arXiv 2311.01906, showed that transformers train without
skips. What keeps the signal alive here is that projections start semi-orthogonal and that each
block's last projection is scaled on a batch of data, so the stream starts with unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_fold.models.config import SkiplessConfig, num_parameters

__all__ = ["KeyValue", "SkiplessConfig", "SkiplessTransformer", "num_parameters"]

KeyValue: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [batch, num_key_value_heads, length, head_dim]."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
}


class Positions(NamedTuple):
    """What all layers share: the additive mask and, for RoPE, the rotation."""

    mask: Tensor  # [1 or batch, 1 or heads, seq, past + seq]
    cos: Tensor | None  # [seq, head_dim]
    sin: Tensor | None  # [seq, head_dim]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, in plain operators that every opset has."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal attention with MHA, MQA or GQA heads, from the stream to P's output."""

    def __init__(self, config: SkiplessConfig) -> None:
        super().__init__()
        self.config = config
        d, q, kv = config.hidden_size, config.query_size, config.kv_size
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(d, q + 2 * kv, config.bias)
        else:
            self.q_proj = nn.Linear(d, q, config.bias)
            self.k_proj = nn.Linear(d, kv, config.bias)
            self.v_proj = nn.Linear(d, kv, config.bias)
        self.p_proj = nn.Linear(q, d, config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim)
            self.k_norm = RMSNorm(config.head_dim)

    def forward(
        self, x: Tensor, positions: Positions, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Map ``x`` [batch, seq, hidden_size] to the same shape, and return all keys and values."""
        query, key, value = (self._heads(t) for t in self._project(x))
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = _rotate(query, positions), _rotate(key, positions)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        scores = query * self.config.head_dim**-0.5 @ self._repeat(key).transpose(2, 3)
        weights = torch.softmax(scores + positions.mask, dim=-1)
        out = (weights @ self._repeat(value)).transpose(1, 2).flatten(2)
        return self.p_proj(out), (key, value)

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if self.config.fused_qkv:
            q, kv = self.config.query_size, self.config.kv_size
            return torch.split(self.qkv_proj(x), [q, kv, kv], dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, seq, heads * head_dim] to [batch, heads, seq, head_dim]."""
        return x.reshape(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def _repeat(self, x: Tensor) -> Tensor:
        """Repeat each key or value head for the query heads that share it."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        if groups == 1:
            return x
        return x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


class FeedForward(nn.Module):
    """The MLP or GLU of a block."""

    def __init__(self, config: SkiplessConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.glu = config.ffn == "glu"
        if self.glu:
            self.gate_proj = nn.Linear(d, f, config.bias)
            self.up_proj = nn.Linear(d, f, config.bias)
        else:
            self.fc_in = nn.Linear(d, f, config.bias)
        self.o_proj = nn.Linear(f, d, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [batch, seq, hidden_size] to the same shape."""
        if self.glu:
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        else:
            hidden = self.activation(self.fc_in(x))
        out: Tensor = self.o_proj(hidden)
        return out


class SkiplessBlock(nn.Module):
    """Attention and FFN, in series or in parallel, with a norm in front of each or nothing."""

    def __init__(self, config: SkiplessConfig) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.attn_norm = _norm(config)
        self.attn = Attention(config)
        self.ffn_norm = _norm(config)
        self.ffn = FeedForward(config)
        self.attention_gain: Tensor | float = config.attention_gain
        self.ffn_gain: Tensor | float = config.ffn_gain
        if config.parallel and config.learned_gains:
            self.attention_gain = nn.Parameter(torch.empty(()))
            self.ffn_gain = nn.Parameter(torch.empty(()))

    def forward(
        self, x: Tensor, positions: Positions, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Map ``x`` [batch, seq, hidden_size] to the next block's input."""
        attended, present = self.attn(self.attn_norm(x), positions, past)
        if not self.parallel:
            return self.ffn(self.ffn_norm(attended)), present
        hidden = self.ffn(self.ffn_norm(x))
        return _scale(attended, self.attention_gain) + _scale(hidden, self.ffn_gain), present

    def writers(self) -> tuple[nn.Linear, ...]:
        """The projections that write the next block's input."""
        return (self.attn.p_proj, self.ffn.o_proj) if self.parallel else (self.ffn.o_proj,)


class ResidualBlock(nn.Module):
    """The ordinary pre-norm block, serial or parallel: its stream is read by norms."""

    def __init__(self, config: SkiplessConfig) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.attn_norm = _norm(config)
        self.attn = Attention(config)
        self.ffn_norm = _norm(config)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, positions: Positions, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Map ``x`` [batch, seq, hidden_size] to the next block's input."""
        attended, present = self.attn(self.attn_norm(x), positions, past)
        y = x + attended
        return y + self.ffn(self.ffn_norm(x if self.parallel else y)), present


class SkiplessTransformer(nn.Module):
    """A decoder-only language model of a :class:`SkiplessConfig`, initialised from ``seed``.

    Nothing but ``seed`` decides the weights; torch's global generator is neither read nor moved.
    With None there are none: the parameters are on the meta device, where they have only a shape.

    Attributes:
        gains: For each block, what :meth:`scale_to_data` scaled its writers by at first.
    """

    def __init__(
        self, config: SkiplessConfig, *, dtype: torch.dtype = torch.float32, seed: int | None = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.gains: list[float] = []
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            if config.positions == "learned":
                self.embed_positions = nn.Embedding(
                    config.max_position_embeddings, config.hidden_size
                )
            block = ResidualBlock if config.residual else SkiplessBlock
            self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
            self.norm = _norm(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)
        if seed is None:
            return
        self.to_empty(device="cpu")
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        generator = torch.Generator().manual_seed(seed)
        _initialize(self, generator)
        if not config.residual:
            length = min(32, config.max_position_embeddings)
            tokens = torch.randint(config.vocab_size, (4, length), generator=generator)
            self.gains = self.scale_to_data(tokens)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
    ) -> Tensor | tuple[Tensor, list[KeyValue]]:
        """Return logits, and the keys and values of every layer where those of the past are given.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: int64 [batch, past + seq], 0 where a position is padding.
            past_key_values: Per layer, keys and values of ``past`` earlier positions.

        Returns:
            Logits [batch, seq, vocab_size] (seq is 1 with ``last_token_only``), alone or with one
            :data:`KeyValue` of ``past + seq`` positions per layer.
        """
        logits, present = self.step(input_ids, attention_mask, past_key_values)
        return logits if past_key_values is None else (logits, present)

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """As :meth:`forward`, but always with keys and values."""
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        positions = self._positions(input_ids, attention_mask, past)
        x = self._embed(input_ids, past)
        presents = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, positions, past_key_values[i] if past_key_values else None)
            presents.append(present)
        x = self.norm(x)
        if self.config.last_token_only:
            x = x[:, -1:]
        return self.lm_head(x), presents

    @torch.no_grad()
    def scale_to_data(self, input_ids: Tensor) -> list[float]:
        """Scale what writes each block's output so that it has unit mean square on ``input_ids``.

        Args:
            input_ids: int64 [batch, seq].

        Returns:
            What the writers of each block were multiplied by.
        """
        gains = []
        positions = self._positions(input_ids, None, 0)
        x = self._embed(input_ids, 0)
        for layer in self._skipless_layers():
            y, _ = layer(x, positions, None)
            gain = y.float().square().mean().rsqrt()
            for writer in layer.writers():
                for parameter in writer.parameters():
                    parameter.mul_(gain)
            x = y * gain.to(y.dtype)
            gains.append(float(gain))
        return gains

    def _skipless_layers(self) -> Iterator[SkiplessBlock]:
        yield from (layer for layer in self.layers if isinstance(layer, SkiplessBlock))

    def _embed(self, input_ids: Tensor, past: int) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        if self.config.positions == "learned":
            x = x + self.embed_positions(torch.arange(past, past + input_ids.shape[1]))
        return x

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Positions:
        """Mask and rotation for ``seq`` positions after ``past`` ones; padding is only masked."""
        dtype = self.lm_head.weight.dtype
        total = past + input_ids.shape[1]
        query, key = torch.arange(past, total), torch.arange(total)
        allowed = (key <= query[:, None])[None, None]  # [1, 1, seq, past + seq]
        if attention_mask is not None:
            allowed = allowed & (attention_mask[:, None, None, :] > 0)
        bias = torch.zeros((), dtype=dtype)
        if self.config.positions == "alibi":
            distance = (key - query[:, None]).to(dtype)
            bias = distance * _alibi_slopes(self.config).to(dtype)[:, None, None]
        mask = torch.where(allowed, bias, torch.finfo(dtype).min)
        if self.config.positions != "rope":
            return Positions(mask, None, None)
        half = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angles = query[:, None].float() * (self.config.rope_theta**-half).repeat(2)
        return Positions(mask, angles.cos().to(dtype), angles.sin().to(dtype))


def _rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotary embedding, in the layout that pairs channel i with channel i + head_dim / 2."""
    if positions.cos is None or positions.sin is None:
        return x
    first, second = x.chunk(2, dim=-1)
    return x * positions.cos + torch.cat((-second, first), dim=-1) * positions.sin


def _alibi_slopes(config: SkiplessConfig) -> Tensor:
    """ALiBi slopes (Press et al. 2022) [heads], float32, geometric and steepest first."""
    steepest, heads = math.log2(config.alibi_slope), config.num_attention_heads
    step = (-8 - steepest) / max(heads - 1, 1)
    return torch.tensor([2 ** (steepest + i * step) for i in range(heads)])


def _scale(x: Tensor, gain: Tensor | float) -> Tensor:
    return x if isinstance(gain, float) and gain == 1.0 else x * gain


def _norm(config: SkiplessConfig) -> nn.Module:
    kinds: dict[str, Callable[[int], nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm}
    make = kinds.get(config.kept_norm, nn.Identity)
    return make(config.hidden_size)


def spread(name: str, shape: tuple[int, ...], config: SkiplessConfig) -> tuple[float, float]:
    """Mean and standard deviation that the parameter ``name`` of ``shape`` is initialised with."""
    match name.split("."):
        case [*_, "attention_gain"]:
            return config.attention_gain, 0.0
        case [*_, "ffn_gain"]:
            return config.ffn_gain, 0.0
        case [*_, owner, "weight"] if owner.endswith("norm"):
            return 1.0, 0.1
        case [*_, "bias"]:
            return 0.0, 0.1
        case ["embed_tokens", _]:
            return 0.0, 1.0
        case ["embed_positions", _]:
            return 0.0, 0.5
        case _:  # a projection [out, in]: it keeps the variance of its input
            return 0.0, shape[1] ** -0.5


@torch.no_grad()
def _initialize(model: SkiplessTransformer, generator: torch.Generator) -> None:
    """Fill all parameters, in the order of their registration."""
    config = model.config
    for name, parameter in model.named_parameters():
        is_projection = parameter.ndim == 2 and not name.startswith("embed_")
        mean, deviation = spread(name, tuple(parameter.shape), config)
        if is_projection and config.init == "orthogonal":
            sizes = [config.query_size, config.kv_size, config.kv_size]
            is_fused = name.endswith("qkv_proj.weight")
            for part in torch.split(parameter, sizes) if is_fused else (parameter,):
                part.copy_(_orthogonal(part.shape, generator))
        elif deviation == 0.0:
            parameter.fill_(mean)
        else:
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))


def _orthogonal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A float32 semi-orthogonal weight [out, in] that keeps the variance of its input."""
    rows, columns = shape
    weight = torch.randn(shape, generator=generator)
    wide: Tensor = torch.linalg.qr(weight if rows >= columns else weight.T).Q
    return wide * math.sqrt(rows / columns) if rows >= columns else wide.T
