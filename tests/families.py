"""Architectures as their own libraries build them, with their skips and norms or without.

Models come from ``transformers`` configurations (nothing is downloaded), from PyTorch's own
modules, or from a few lines here: the blocks of He and Hofmann, the fused attention of timm.
:func:`without_skips` puts the identity in the place of each norm on the stream and leaves the
residual sums out; attention, caches, masks and position codes stay the library's.
"""

from __future__ import annotations

import io
import logging
import math
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

WIDTH, LAYERS, HEADS, KV_HEADS, FFN, VOCAB = 32, 2, 4, 2, 96, 101
BATCH, SEQ, PAST = 2, 5, 3
FRAMES, MELS, IMAGE, PATCH = 10, 8, 8, 4

Forward = Callable[..., object]
Axes = dict[int, str]
MakeCase = Callable[[nn.Module, bool], "Case"]


# Blocks without skips, by the class whose forward has them.


def in_series(attention: str, mlp: str) -> Forward:
    """The forward of a block that is ``mlp(attention(x))``."""

    def forward(self, hidden_states, *args, **kwargs):
        return getattr(self, mlp)(getattr(self, attention)(hidden_states, *args, **kwargs)[0])

    return forward


def in_parallel(attention: str, mlp: str, *, returns_tuple: bool = False) -> Forward:
    """The forward of a block that is ``attention(x) + mlp(x)``."""

    def forward(self, hidden_states, *args, **kwargs):
        attended, weights = getattr(self, attention)(hidden_states, *args, **kwargs)
        output = attended + getattr(self, mlp)(hidden_states)
        return (output, weights) if returns_tuple else output

    return forward


def gpt2_block(self, hidden_states, past_key_values, attention_mask, *_, **kwargs):
    attended, _ = self.attn(
        hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
    )
    return self.mlp(attended)


def bert_output(self, hidden_states, input_tensor):
    return self.dense(hidden_states)


def whisper_ffn(self, hidden_states):
    return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def whisper_encoder_layer(self, hidden_states, attention_mask, **kwargs):
    attended, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
    return whisper_ffn(self, attended)


def whisper_decoder_layer(
    self,
    hidden_states,
    attention_mask,
    encoder_hidden_states,
    encoder_attention_mask=None,
    past_key_values=None,
    **kwargs,
):
    kwargs["past_key_values"] = past_key_values
    attended, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
    attended, _ = self.encoder_attn(attended, key_value_states=encoder_hidden_states, **kwargs)
    return whisper_ffn(self, attended)


def gained_block(self, x):
    return self.gains[0] * self.attention(x)[0] + self.gains[1] * self.ffn(x)


def normed_in_series(attention: str, mlp: str, before: str, behind: str) -> Forward:
    """The forward of a block that is ``mlp(behind(attention(before(x))))``."""

    def forward(self, hidden_states, *args, **kwargs):
        attended = getattr(self, attention)(getattr(self, before)(hidden_states), *args, **kwargs)
        attended = attended[0] if isinstance(attended, tuple) else attended
        return getattr(self, mlp)(getattr(self, behind)(attended))

    return forward


def normed_in_parallel(
    attention: str, mlp: str, norms: tuple[str, str], *, returns_tuple: bool = False
) -> Forward:
    """The forward of a block that is ``attention(norm(x)) + mlp(norm(x))``."""

    def forward(self, hidden_states, *args, **kwargs):
        first, second = (getattr(self, name)(hidden_states) for name in norms)
        attended, weights = getattr(self, attention)(first, *args, **kwargs)
        output = attended + getattr(self, mlp)(second)
        return (output, weights) if returns_tuple else output

    return forward


def normed_gpt2_block(self, hidden_states, past_key_values, attention_mask, *_, **kwargs):
    normed = self.ln_1(hidden_states)
    attended, _ = self.attn(
        normed, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
    )
    return self.mlp(self.ln_2(attended))


def normed_bert_output(self, hidden_states, input_tensor):
    return self.LayerNorm(self.dense(hidden_states))


def normed_falcon_block(self, hidden_states, *args, **kwargs):
    """One norm in front of both branches, or in the new architecture one for each."""
    names = ("ln_attn", "ln_mlp") if self.config.new_decoder_architecture else ()
    names = names or ("input_layernorm", "input_layernorm")
    forward = normed_in_parallel("self_attention", "mlp", names, returns_tuple=True)
    return forward(self, hidden_states, *args, **kwargs)


def normed_whisper_encoder_layer(self, hidden_states, attention_mask, **kwargs):
    normed = self.self_attn_layer_norm(hidden_states)
    attended, _ = self.self_attn(normed, attention_mask=attention_mask, **kwargs)
    return whisper_ffn(self, self.final_layer_norm(attended))


def normed_whisper_decoder_layer(
    self,
    hidden_states,
    attention_mask,
    encoder_hidden_states,
    encoder_attention_mask=None,
    past_key_values=None,
    **kwargs,
):
    kwargs["past_key_values"] = past_key_values
    normed = self.self_attn_layer_norm(hidden_states)
    attended, _ = self.self_attn(normed, attention_mask=attention_mask, **kwargs)
    normed = self.encoder_attn_layer_norm(attended)
    attended, _ = self.encoder_attn(normed, key_value_states=encoder_hidden_states, **kwargs)
    return whisper_ffn(self, self.final_layer_norm(attended))


def normed_gained_block(self, x):
    return gained_block(self, self.norm1(x))


LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Mixtral")
SKIPLESS: dict[str, Forward] = {
    **{f"{name}DecoderLayer": in_series("self_attn", "mlp") for name in LLAMA_LIKE},
    "ViTLayer": in_series("attention", "mlp"),
    "GPTNeoXLayer": in_parallel("attention", "mlp"),
    "PhiDecoderLayer": in_parallel("self_attn", "mlp"),
    "GPTJBlock": in_parallel("attn", "mlp", returns_tuple=True),
    "FalconDecoderLayer": in_parallel("self_attention", "mlp", returns_tuple=True),
    "GPT2Block": gpt2_block,
    "BertSelfOutput": bert_output,
    "BertOutput": bert_output,
    "WhisperEncoderLayer": whisper_encoder_layer,
    "WhisperDecoderLayer": whisper_decoder_layer,
    "SerialBlock": in_series("attention", "ffn"),
    "ParallelBlock": gained_block,
}
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
NORMED: dict[str, Forward] = {
    **{
        f"{name}DecoderLayer": normed_in_series("self_attn", "mlp", *LLAMA_NORMS)
        for name in LLAMA_LIKE
    },
    "ViTLayer": normed_in_series("attention", "mlp", "layernorm_before", "layernorm_after"),
    "GPTNeoXLayer": normed_in_parallel("attention", "mlp", LLAMA_NORMS),
    "PhiDecoderLayer": normed_in_parallel("self_attn", "mlp", 2 * LLAMA_NORMS[:1]),
    "GPTJBlock": normed_in_parallel("attn", "mlp", ("ln_1", "ln_1"), returns_tuple=True),
    "GPT2Block": normed_gpt2_block,
    "BertSelfOutput": normed_bert_output,
    "BertOutput": normed_bert_output,
    "FalconDecoderLayer": normed_falcon_block,
    "WhisperEncoderLayer": normed_whisper_encoder_layer,
    "WhisperDecoderLayer": normed_whisper_decoder_layer,
    "ParallelBlock": normed_gained_block,
    "SerialBlock": normed_in_series("attention", "ffn", "norm1", "norm2"),
}
"""Blocks without skips whose norms stay."""
NORMS_OF_HEADS = ("q_norm", "k_norm")


def without_skips(model: nn.Module) -> None:
    """Take the residual sums and the norms of the stream out of ``model``, in place."""
    for module in list(model.modules()):
        if (forward := SKIPLESS.get(type(module).__name__)) is not None:
            module.forward = types.MethodType(forward, module)
        for name, child in module.named_children():
            if "Norm" in type(child).__name__ and name not in NORMS_OF_HEADS:
                setattr(module, name, nn.Identity())


def without_residuals(model: nn.Module) -> None:
    """Take the residual sums out of ``model``, in place, and leave the norms."""
    for module in list(model.modules()):
        if (forward := NORMED.get(type(module).__name__)) is not None:
            module.forward = types.MethodType(forward, module)


# Weights. No norm keeps the activations in bounds, so the weights have to.


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of blocks that are rotations, tables of unit variance, biases that are not zero."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            elif isinstance(module, nn.Embedding) or parameter.shape[0] == 1:
                parameter.normal_()
            elif isinstance(module, nn.Conv1d | nn.Conv2d):
                rotate(parameter.flatten(1))
            else:
                for matrix in parameter if parameter.ndim == 3 else [parameter]:  # experts
                    rotate(matrix)


def rotate(matrix: Tensor) -> None:
    for block in matrix.split(min(matrix.shape), dim=int(matrix.shape[1] > matrix.shape[0])):
        nn.init.orthogonal_(block)


@contextmanager
def unit_outputs(model: nn.Module) -> Iterator[None]:
    """While it runs, scale each layer so that what it writes has unit variance."""

    def scale(layer, _, output):
        size = output.std()
        layer.weight.div_(size)
        if layer.bias is not None:
            layer.bias.div_(size)
        return output / size

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    with torch.no_grad():
        yield
    for hook in hooks:
        hook.remove()


# What is exported: flat inputs, flat outputs.


@dataclass(frozen=True)
class Case:
    """A module to export.

    Attributes:
        module: What is traced.
        args: Example inputs, for all names in ``inputs`` in order.
        inputs: Dynamic axes by input.
        outputs: Dynamic axes by output.
        star: The first input that the module collects by ``*args``, if one.
    """

    module: nn.Module
    args: tuple[Tensor, ...]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]
    star: int | None = None


class Wrapper(nn.Module):
    """Holds a model, and calls it in a way that can be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class CausalLM(Wrapper):
    def forward(self, input_ids, attention_mask, *past):
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True))) if past else None
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if cache is None:
            return output.logits
        return output.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


class Encoder(Wrapper):
    def forward(self, *inputs):
        return self.model(*inputs).logits


class Seq2Seq(Wrapper):
    def forward(self, input_features, decoder_input_ids, decoder_attention_mask):
        return self.model(
            input_features,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            use_cache=False,
        ).logits


class CachedDecoder(Wrapper):
    """The decoder of an encoder-decoder that has what the encoder gave as keys and values."""

    def forward(self, input_ids, attention_mask, *past):
        layers = [past[index : index + 4] for index in range(0, len(past), 4)]
        own, cross = (DynamicCache([layer[i : i + 2] for layer in layers]) for i in (0, 2))
        cache = EncoderDecoderCache(own, cross)
        encoded = torch.zeros(1, 1, WIDTH)  # asked for, but never read
        output = self.model(
            attention_mask=None,
            encoder_outputs=(encoded,),
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            past_key_values=cache,
        )
        return output.logits, *(t for layer in own.layers for t in (layer.keys, layer.values))


TOKENS = {0: "batch", 1: "sequence"}
LOGITS = {"logits": TOKENS}


def tokens() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SEQ))


def mask(length: int = SEQ) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.int64)


def causal_lm(kv_heads: int, head_dim: int) -> MakeCase:
    """A decoder, with a cache for keys and values of these heads or without."""

    def case(model: nn.Module, cache: bool) -> Case:
        total = "past + sequence" if cache else "sequence"
        args = [tokens(), mask(SEQ + PAST * cache)]
        inputs = {"input_ids": TOKENS, "attention_mask": {0: "batch", 1: total}}
        outputs = dict(LOGITS)
        if not cache:
            return Case(CausalLM(model), tuple(args), inputs, outputs)
        for layer, part in product(range(LAYERS), ("key", "value")):
            args.append(torch.randn(BATCH, kv_heads, PAST, head_dim))
            inputs[f"past.{layer}.{part}"] = {0: "batch", 2: "past"}
            outputs[f"present.{layer}.{part}"] = {0: "batch", 2: total}
        return Case(CausalLM(model), tuple(args), inputs, outputs, star=2)

    return case


def masked_lm(model: nn.Module, cache: bool) -> Case:
    inputs = {"input_ids": TOKENS, "attention_mask": TOKENS}
    return Case(Encoder(model), (tokens(), mask()), inputs, LOGITS, star=0)


def image_classifier(model: nn.Module, cache: bool) -> Case:
    pixels = torch.randn(BATCH, 3, IMAGE, IMAGE)
    inputs, outputs = {"pixel_values": {0: "batch"}}, {"logits": {0: "batch"}}
    return Case(Encoder(model), (pixels,), inputs, outputs, star=0)


def seq2seq(model: nn.Module, cache: bool) -> Case:
    features = torch.randn(BATCH, MELS, 2 * FRAMES)
    inputs = {"input_features": {0: "batch"}}
    inputs |= {"decoder_input_ids": TOKENS, "decoder_attention_mask": TOKENS}
    if not cache:
        return Case(Seq2Seq(model), (features, tokens(), mask()), inputs, LOGITS)
    args = [tokens(), mask(PAST + SEQ)]
    inputs = {"input_ids": TOKENS, "attention_mask": {0: "batch", 1: "past + sequence"}}
    outputs = dict(LOGITS)
    for layer, side, part in product(range(LAYERS), ("own", "cross"), ("key", "value")):
        length = "past" if side == "own" else "frames"
        args.append(torch.randn(BATCH, HEADS, PAST if side == "own" else FRAMES, WIDTH // HEADS))
        inputs[f"past.{layer}.{side}.{part}"] = {0: "batch", 2: length}
        if side == "own":
            outputs[f"present.{layer}.{part}"] = {0: "batch", 2: "past + sequence"}
    return Case(CachedDecoder(model), tuple(args), inputs, outputs, star=2)


def plain(model: nn.Module, cache: bool) -> Case:
    return Case(model, (tokens(),), {"input_ids": TOKENS}, LOGITS)


# Models that no configuration describes.


class SerialBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = nn.Sequential(nn.Linear(WIDTH, FFN), nn.GELU(), nn.Linear(FFN, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))[0]
        return x + self.ffn(self.norm2(x))


class ParallelBlock(SerialBlock):
    """A pre-norm block of which both branches read the same and have a gain."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.gains = nn.Parameter(torch.empty(2))

    def forward(self, x):
        return x + gained_block(self, self.norm1(x))


class Blocks(nn.Module):
    """Token and position tables, blocks, and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention``, which packs Q, K and V into one weight."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x):
        if self.batch_first:
            return self.mha(x, x, x, need_weights=False)
        x = x.transpose(0, 1)
        return self.mha(x, x, x, need_weights=False)[0].transpose(0, 1), None


class FusedAttention(nn.Module):
    """Q, K and V of all heads from one layer, cut apart as in timm's vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, length, WIDTH)), None


class ShapedAttention(nn.Module):
    """Attention of B. He and T. Hofmann, arXiv 2311.01906: ``alpha I + beta A - gamma C``.

    ``C`` is what ``A`` would be without Q: uniform over the positions that the causal mask admits.
    The identity stands in for the skip. With ``identity_values`` V and P are the identity too.
    """

    def __init__(self, *, identity_values: bool = False) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value = nn.Identity() if identity_values else nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Identity() if identity_values else nn.Linear(WIDTH, WIDTH)
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(HEADS)) for _ in range(3))

    def forward(self, x):
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).reshape(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = torch.ones(length, length, device=x.device).tril()
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        attention = scores.masked_fill(seen == 0, -1e9).softmax(-1)
        alpha, beta, gamma = (gain[:, None, None] for gain in (self.alpha, self.beta, self.gamma))
        uniform = seen / seen.sum(-1, keepdim=True)
        shaped = alpha * torch.eye(length, device=x.device) + beta * attention - gamma * uniform
        return self.proj((shaped @ value).transpose(1, 2).reshape(batch, length, WIDTH)), None


# The families.

COMMON = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
HIDDEN = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SHAPE = COMMON | HIDDEN | {"intermediate_size": FFN, "pad_token_id": None}
GQA = SHAPE | {"num_key_value_heads": KV_HEADS}
GPT = COMMON | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FFN}
FALCON = COMMON | HIDDEN | {"ffn_hidden_size": FFN, "alibi": False}
IMAGES = HIDDEN | {"intermediate_size": FFN, "image_size": IMAGE, "patch_size": PATCH}
IMAGES |= {"num_labels": VOCAB}
WHISPER = COMMON | {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": FFN for side in ("encoder", "decoder")},
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        make: Builds it as its library does.
        case: What of it is exported.
        streams: Closed streams of the skipless model.
        streams_with_cache: The same if it is exported with a cache; None if it cannot be.
        opset: Opset of the dynamo export; the families share out those that there are.
    """

    make: Callable[[], nn.Module]
    case: MakeCase
    streams: int
    streams_with_cache: int | None = None
    opset: int = 20


SERIAL = 2 * LAYERS + 1
"""P into the FFN and the FFN into the next block (or the head) of each, and the embedding."""
PARALLEL = LAYERS + 1
"""Both branches into the next block (or the head) of each, and the embedding."""
DECODER = 3 * LAYERS + 1
"""P into Q of the cross-attention, P of that into the FFN, and the FFN into the next block (or the
head) of each, and the embedding."""
ENCODER_DECODER = 2 + DECODER
"""Of an encoder with one block, P into the FFN, and that into the cross-attention of all blocks of
the decoder; an activation writes what its Q, K and V read."""


def from_config(
    config: PreTrainedConfig, model: str = "AutoModelForCausalLM", **options: str
) -> Callable[[], nn.Module]:
    factory = getattr(transformers, model)
    make = getattr(factory, "from_config", None) or factory._from_config
    return lambda: make(config, **options)


def decoder(
    config: PreTrainedConfig,
    streams: int,
    kv_heads: int,
    head_dim: int = WIDTH // HEADS,
    opset: int = 20,
    **options: str,
) -> Family:
    make = from_config(config, **options)
    return Family(make, causal_lm(kv_heads, head_dim), streams, streams, opset)


def of_blocks(
    block: type[SerialBlock], *attention: Callable[[], nn.Module], streams: int = SERIAL
) -> Family:
    return Family(lambda: Blocks(*(block(make()) for make in attention)), plain, streams)


BATCH_FIRST, SEQUENCE_FIRST = (partial(TorchAttention, batch_first=b) for b in (True, False))
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "bias": True}

FAMILIES: dict[str, Family] = {
    "llama": decoder(transformers.LlamaConfig(**GQA), SERIAL, KV_HEADS, opset=18),
    "mistral": decoder(
        transformers.MistralConfig(**GQA, sliding_window=4), SERIAL, KV_HEADS, opset=19
    ),
    "qwen2": decoder(transformers.Qwen2Config(**GQA), SERIAL, KV_HEADS, opset=21),
    "qwen3": decoder(transformers.Qwen3Config(**GQA, head_dim=8), SERIAL, KV_HEADS, opset=23),
    "gemma": decoder(
        transformers.GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=16), SERIAL, 1, 16
    ),
    "mixtral": decoder(  # the other implementations of the experts cannot be exported
        transformers.MixtralConfig(**GQA, **EXPERTS),
        SERIAL,
        KV_HEADS,
        experts_implementation="batched_mm",
    ),
    "gpt2": decoder(transformers.GPT2Config(**GPT), SERIAL, HEADS),
    "gpt-neox": decoder(transformers.GPTNeoXConfig(**SHAPE, rotary_pct=0.5), PARALLEL, HEADS),
    "gpt-j": decoder(
        transformers.GPTJConfig(**GPT, rotary_dim=4), PARALLEL, HEADS, attn_implementation="eager"
    ),
    "phi": decoder(transformers.PhiConfig(**SHAPE), PARALLEL, HEADS),
    "falcon-mqa": decoder(transformers.FalconConfig(**FALCON), PARALLEL, 1),
    "falcon-gqa": decoder(transformers.FalconConfig(**FALCON, **NEW_FALCON), PARALLEL, HEADS),
    "bert": Family(
        from_config(transformers.BertConfig(**SHAPE), "AutoModelForMaskedLM"), masked_lm, SERIAL
    ),
    "vit": Family(
        from_config(transformers.ViTConfig(**IMAGES), "ViTForImageClassification"),
        image_classifier,
        SERIAL,
    ),
    "whisper": Family(
        from_config(transformers.WhisperConfig(**WHISPER), "WhisperForConditionalGeneration"),
        seq2seq,
        ENCODER_DECODER,
        DECODER,
    ),
    "torch": of_blocks(SerialBlock, BATCH_FIRST, SEQUENCE_FIRST),
    "timm": of_blocks(SerialBlock, *LAYERS * [FusedAttention]),
    "shaped": of_blocks(SerialBlock, *LAYERS * [ShapedAttention]),
    "shaped-parallel": of_blocks(ParallelBlock, *LAYERS * [ShapedAttention], streams=PARALLEL),
    "shaped-identity-values": of_blocks(  # heads of x itself: only the last FFN into the head
        SerialBlock, *LAYERS * [partial(ShapedAttention, identity_values=True)], streams=1
    ),
}


def case(name: str, *, skipless: bool = True, normed: bool = False, cache: bool = False) -> Case:
    """A family, ready for :func:`export`; the weights are the same each time.

    Args:
        name: Of the family.
        skipless: Whether its residual sums are left out.
        normed: Whether its norms are not.
        cache: Whether keys and values of the past go in and out.
    """
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.make().eval()
    randomise(model)
    if skipless and normed:
        without_residuals(model)
    elif skipless:
        without_skips(model)
        plain_case = family.case(model, False)
        with unit_outputs(model):
            plain_case.module(*plain_case.args)
    return family.case(model, cache)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporters print and warn of to themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def export(case: Case, path: Path, exporter: str, opset: int) -> Path:
    """Write ``case`` to ``path`` with one of PyTorch's exporters."""
    common = {
        "input_names": list(case.inputs),
        "output_names": list(case.outputs),
        "opset_version": opset,
    }
    with quiet():  # with gradients: without, nn.MultiheadAttention becomes a single operator
        if exporter == "torchscript":
            axes = case.inputs | case.outputs
            torch.onnx.export(
                case.module, case.args, str(path), dynamo=False, dynamic_axes=axes, **common
            )
            return path
        shapes: tuple[object, ...] = tuple(case.inputs.values())
        if case.star is not None:
            shapes = (*shapes[: case.star], shapes[case.star :])
        torch.onnx.export(
            case.module, case.args, dynamo=True, dynamic_shapes=shapes, verbose=False, **common
        ).save(path)
    return path
