"""Architectures as their own libraries build them, with their skips and norms or without, exported.

Models come from ``transformers`` configurations (nothing is downloaded), from PyTorch's own modules,
or, for the blocks of He and Hofmann and the fused attention of vision models, from a few lines here.
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
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

WIDTH, LAYERS, HEADS, KV_HEADS, FFN, VOCAB = 32, 2, 4, 2, 96, 101
BATCH, SEQ, PAST = 2, 5, 3
FRAMES, MELS, IMAGE, PATCH = 10, 8, 8, 4

Forward = Callable[..., object]
Axes = dict[int, str]


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
}
NORMS_OF_HEADS = ("q_norm", "k_norm")


def without_skips(model: nn.Module) -> nn.Module:
    """Take the residual sums and the norms of the stream out of ``model``, in place."""
    for module in list(model.modules()):
        if (forward := SKIPLESS.get(type(module).__name__)) is not None:
            module.forward = types.MethodType(forward, module)
        for name, child in module.named_children():
            if "Norm" in type(child).__name__ and name not in NORMS_OF_HEADS:
                setattr(module, name, nn.Identity())
    return model


# Weights: no norm keeps the activations in bounds, so the weights have to.


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of blocks that are rotations, embeddings of unit variance, biases that are not 0."""
    for module in model.modules():
        is_norm, is_table = "Norm" in type(module).__name__, isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.normal_(float(is_norm), 0.1)
            elif is_table:
                parameter.normal_()
            elif parameter.ndim == 2:
                rotate(parameter)
            elif isinstance(module, nn.Conv1d | nn.Conv2d):
                rotate(parameter.flatten(1))
            elif parameter.shape[0] == 1:  # a class token, positions
                parameter.normal_()
            else:  # a weight for each expert
                for matrix in parameter:
                    rotate(matrix)


def rotate(matrix: Tensor) -> None:
    side = min(matrix.shape)
    for block in matrix.split(side, dim=int(matrix.shape[1] > side)):
        if block.shape[0] <= side and block.shape[1] <= side:
            nn.init.orthogonal_(block)


@contextmanager
def unit_outputs(model: nn.Module) -> Iterator[None]:
    """While it runs, scale each layer so that what it writes has unit variance."""

    @torch.no_grad()
    def scale(layer, _, output):
        size = output.std()
        layer.weight.div_(size)
        if layer.bias is not None:
            layer.bias.div_(size)
        return output / size

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        yield
    finally:
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
        is_variadic: Whether the inputs behind the second one are collected by ``*args``.
    """

    module: nn.Module
    args: tuple[Tensor, ...]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]
    is_variadic: bool = False


class Wrapper(nn.Module):
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


TOKENS = {0: "batch", 1: "sequence"}


def tokens() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SEQ))


def ones(length: int = SEQ) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.int64)


def causal_lm(model: nn.Module, *, cache: bool, kv_heads: int) -> Case:
    total = "past + sequence" if cache else "sequence"
    inputs = {"input_ids": TOKENS, "attention_mask": {0: "batch", 1: total}}
    outputs = {"logits": TOKENS}
    args = [tokens(), ones(SEQ + PAST * cache)]
    head_dim = getattr(model.config, "head_dim", None) or WIDTH // HEADS
    for layer in range(LAYERS if cache else 0):
        for part in ("key", "value"):
            args.append(torch.randn(BATCH, kv_heads, PAST, head_dim))
            inputs[f"past.{layer}.{part}"] = {0: "batch", 2: "past"}
            outputs[f"present.{layer}.{part}"] = {0: "batch", 2: total}
    return Case(CausalLM(model), tuple(args), inputs, outputs, is_variadic=cache)


def masked_lm(model: nn.Module) -> Case:
    inputs = {"input_ids": TOKENS, "attention_mask": TOKENS}
    return Case(Encoder(model), (tokens(), ones()), inputs, {"logits": TOKENS})


def classifier(model: nn.Module) -> Case:
    pixels = torch.randn(BATCH, 3, IMAGE, IMAGE)
    return Case(Encoder(model), (pixels,), {"pixel_values": {0: "batch"}}, {"logits": {0: "batch"}})


def seq2seq(model: nn.Module) -> Case:
    features = torch.randn(BATCH, MELS, 2 * FRAMES)
    inputs = {"input_features": {0: "batch"}, "decoder_input_ids": TOKENS}
    inputs["decoder_attention_mask"] = TOKENS
    return Case(Seq2Seq(model), (features, tokens(), ones()), inputs, {"logits": TOKENS})


def plain(model: nn.Module) -> Case:
    return Case(model, (tokens(),), {"input_ids": TOKENS}, {"logits": TOKENS})


# Blocks that no configuration describes.


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


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, FFN), nn.GELU(), nn.Linear(FFN, WIDTH))


class Block(nn.Module):
    """Attention and an FFN: in series or in parallel, with skips and norms or without."""

    def __init__(self, attention: nn.Module, *, parallel: bool = False, residual: bool = False):
        super().__init__()
        self.attention, self.ffn, self.parallel = attention, ffn(), parallel
        self.gains = nn.Parameter(torch.empty(2)) if parallel else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)) if residual else None

    def forward(self, x):
        if self.norms is not None:
            x = x + self.attention(self.norms[0](x))
            return x + self.ffn(self.norms[1](x))
        if self.gains is not None:
            return self.gains[0] * self.attention(x) + self.gains[1] * self.ffn(x)
        return self.ffn(self.attention(x))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention``, which packs Q, K and V into one weight."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x):
        if not self.batch_first:
            x = x.transpose(0, 1)
        x = self.mha(x, x, x, need_weights=False)[0]
        return x if self.batch_first else x.transpose(0, 1)


class FusedAttention(nn.Module):
    """Q, K and V of all heads from one layer, cut out as timm's vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, length, WIDTH))


class ShapedAttention(nn.Module):
    """Attention of B. He and T. Hofmann, arXiv 2311.01906: ``alpha I + beta A - gamma C``.

    ``C`` is what ``A`` is without Q: uniform over the positions that the causal mask admits. The
    identity stands in for the skip. With ``identity_values`` V and P are the identity, as there.
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
        alpha, beta, gamma = (g[:, None, None] for g in (self.alpha, self.beta, self.gamma))
        uniform = seen / seen.sum(-1, keepdim=True)
        shaped = alpha * torch.eye(length, device=x.device) + beta * attention - gamma * uniform
        return self.proj((shaped @ value).transpose(1, 2).reshape(batch, length, WIDTH))


# The families.

SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT_SHAPE = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": FFN,
    "vocab_size": VOCAB,
    "n_positions": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON_SHAPE = {key: value for key, value in SHAPE.items() if key != "intermediate_size"} | {
    "ffn_hidden_size": FFN,
    "alibi": False,
}
VISION_SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_labels": VOCAB,
}
WHISPER_SHAPE = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "vocab_size": VOCAB,
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES,
    "max_target_positions": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: Its configuration.
        model: The class in ``transformers`` that builds it.
        kv_heads: Heads in its cache; None if it is exported without one.
        case: How it is exported.
        attention: Which implementation of attention the library is to take.
    """

    config: PreTrainedConfig
    model: str = "AutoModelForCausalLM"
    kv_heads: int | None = None
    case: Callable[..., Case] = causal_lm
    attention: str = "sdpa"

    def build(self, *, skipless: bool) -> PreTrainedModel:
        torch.manual_seed(0)
        factory = getattr(transformers, self.model)
        make = getattr(factory, "from_config", None) or factory._from_config
        model = make(self.config, attn_implementation=self.attention).eval()
        if model.config.model_type == "mixtral":
            model.set_experts_implementation("batched_mm")  # the loop over experts has no graph
        randomise(model)
        if not skipless:
            return model
        without_skips(model)
        case = self.export_case(model, cache=False)
        with unit_outputs(model), torch.no_grad():
            case.module(*case.args)
        return model

    def export_case(self, model: nn.Module, *, cache: bool) -> Case:
        if self.case is causal_lm:
            return causal_lm(model, cache=cache, kv_heads=self.kv_heads or 0)
        return self.case(model)


def _families() -> dict[str, Family]:
    t = transformers
    gqa = SHAPE | {"num_key_value_heads": KV_HEADS}
    causal = {
        "llama": Family(t.LlamaConfig(**gqa), kv_heads=KV_HEADS),
        "mistral": Family(t.MistralConfig(**gqa, sliding_window=4), kv_heads=KV_HEADS),
        "qwen2": Family(t.Qwen2Config(**gqa), kv_heads=KV_HEADS),
        "qwen3": Family(t.Qwen3Config(**gqa, head_dim=WIDTH // HEADS), kv_heads=KV_HEADS),
        "gemma": Family(t.GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=16), kv_heads=1),
        "mixtral": Family(
            t.MixtralConfig(**gqa, num_local_experts=4, num_experts_per_tok=2), kv_heads=KV_HEADS
        ),
        "gpt2": Family(t.GPT2Config(**GPT_SHAPE), kv_heads=HEADS),
        "gpt2-tied": Family(t.GPT2Config(**GPT_SHAPE | {"tie_word_embeddings": True})),
        "gpt_neox": Family(t.GPTNeoXConfig(**SHAPE, rotary_pct=0.5), kv_heads=HEADS),
        "gptj": Family(t.GPTJConfig(**GPT_SHAPE, rotary_dim=4), kv_heads=HEADS, attention="eager"),
        "phi": Family(t.PhiConfig(**SHAPE), kv_heads=HEADS),
        "falcon-mqa": Family(t.FalconConfig(**FALCON_SHAPE), kv_heads=1),
        "falcon-gqa": Family(
            t.FalconConfig(
                **FALCON_SHAPE, new_decoder_architecture=True, num_kv_heads=KV_HEADS, bias=True
            ),
            kv_heads=HEADS,
        ),
    }
    return causal | {
        "bert": Family(t.BertConfig(**SHAPE), "AutoModelForMaskedLM", case=masked_lm),
        "vit": Family(t.ViTConfig(**VISION_SHAPE), "ViTForImageClassification", case=classifier),
        "whisper": Family(
            t.WhisperConfig(**WHISPER_SHAPE), "WhisperForConditionalGeneration", case=seq2seq
        ),
    }


FAMILIES = _families()


def _attention(name: str) -> nn.Module:
    return {
        "torch-mha": lambda: TorchAttention(batch_first=True),
        "torch-mha-sequence-first": lambda: TorchAttention(batch_first=False),
        "timm": FusedAttention,
        "shaped": ShapedAttention,
        "shaped-parallel": ShapedAttention,
        "shaped-identity-values": lambda: ShapedAttention(identity_values=True),
    }[name]()


BLOCKS = (
    "torch-mha",
    "torch-mha-sequence-first",
    "timm",
    "shaped",
    "shaped-parallel",
    "shaped-identity-values",
)


def blocks(name: str, *, skipless: bool) -> Case:
    """The case of one of :data:`BLOCKS`."""
    torch.manual_seed(0)
    model = Blocks(
        *(
            Block(_attention(name), parallel="parallel" in name, residual=not skipless)
            for _ in range(LAYERS)
        )
    ).eval()
    randomise(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.rpartition(".")[2] in ("alpha", "beta", "gamma", "gains"):
                parameter.uniform_(0.5, 1.5)
    if skipless:
        with unit_outputs(model), torch.no_grad():
            model(tokens())
    return plain(model)


def case(name: str, *, skipless: bool = True, cache: bool = False) -> Case:
    """A family or block by name, ready for :func:`export`."""
    if name in BLOCKS:
        return blocks(name, skipless=skipless)
    family = FAMILIES[name]
    return family.export_case(family.build(skipless=skipless), cache=cache)


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
        shapes = tuple(case.inputs.values())
        if case.is_variadic:
            shapes = (*shapes[:2], shapes[2:])
        elif isinstance(case.module, Encoder):
            shapes = (shapes,)
        torch.onnx.export(
            case.module, case.args, dynamo=True, dynamic_shapes=shapes, verbose=False, **common
        ).save(path)
    return path
