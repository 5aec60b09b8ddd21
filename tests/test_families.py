"""Architectures that people have, from both exporters: exact counts, the same function, no harm."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_fold
from onnx_fold.report.fold import FoldReport

pytest.importorskip("torch")
pytest.importorskip("transformers")
from families import (
    BATCH,
    FAMILIES,
    FRAMES,
    NORMS_OF_HEADS,
    PAST,
    SEQ,
    VOCAB,
    WIDTH,
    Family,
    case,
    export,
)
from helpers import TOLERANCE, outputs, weights
from torch import nn


def has_cache(family: Family) -> bool:
    return family.streams_with_cache is not None


CACHED_BY_DYNAMO = ("llama", "qwen3", "gpt2", "falcon-gqa")  # the slower exporter of the two
CASES = [
    *((name, "dynamo", name in CACHED_BY_DYNAMO) for name in FAMILIES),
    *((name, "torchscript", has_cache(family)) for name, family in FAMILIES.items()),
    *((name, "torchscript", False) for name in (*CACHED_BY_DYNAMO, "whisper")),
]

BIASED = ("gpt2", "bert", "vit", "whisper", "torch", "timm", "shaped")
"""Families with a bias on the projection behind attention and on what reads that."""


def opset(name: str, exporter: str) -> int:
    return FAMILIES[name].opset if exporter == "dynamo" else 17


def sizes(name: str, exporter: str) -> dict[str, int]:
    """Other sizes than those of the export, where the graph can be run with them."""
    if (name, exporter) == ("torch", "torchscript"):  # it writes sizes of the example as constants
        return {"batch": BATCH, "sequence": SEQ}
    batch = 1 if opset(name, exporter) == 23 else BATCH + 1  # its RotaryEmbedding broadcasts
    found = {"batch": batch, "sequence": SEQ + 2, "past": PAST + 1}
    found["frames"] = FRAMES + 1
    return found | {"past + sequence": found["past"] + found["sequence"]}


def inputs(model: ir.Model, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    made = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[d.value] for d in value.shape]
        if value.dtype.is_floating_point():
            made[value.name] = generator.standard_normal(shape).astype(np.float32)
        elif "mask" in value.name:
            made[value.name] = np.ones(shape, np.int64)
            made[value.name][0, -1] = 0
        else:
            made[value.name] = generator.integers(0, VOCAB, shape)
    return made


def assert_same_outputs(original: ir.Model, folded: ir.Model, sizes: dict[str, int]) -> None:
    fed = inputs(original, sizes)
    expected, actual = outputs(original, **fed), outputs(folded, **fed)
    assert list(expected) == list(actual)
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape
        assert np.isfinite(reference).all()
        error = np.linalg.norm(actual[name] - reference) / np.linalg.norm(reference)
        assert error <= TOLERANCE["float32"], name


def matrix_weights(model: ir.Model) -> int:
    """Floating-point weights in tensors with two axes or more: all but biases, gains, constants."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(
        tensor.size
        for tensor in tensors
        if tensor.dtype.is_floating_point() and sum(dim > 1 for dim in tensor.shape.numpy()) > 1
    )


def norms(module: nn.Module) -> set[str]:
    """The norms of ``module`` but for those of the heads of Q and K."""
    return {
        name
        for name, child in module.named_modules()
        if "Norm" in type(child).__name__ and name.rpartition(".")[2] not in NORMS_OF_HEADS
    }


NAMES_A_NODE = re.compile(r"^'.+' is (?:read|written) by \w+ '(.+?)'")


def assert_reasons_name_nodes(report: FoldReport) -> None:
    for stream in report.left_alone:
        assert stream.reasons
        assert all(NAMES_A_NODE.search(reason) for reason in stream.reasons), stream.reasons


def biases_removed(name: str, strategy: str) -> set[int]:
    """What a fold may remove beside d² weights: biases that become part of others."""
    if strategy == "merge":  # that of P becomes part of those of its readers
        return {WIDTH if name in BIASED else 0}
    if strategy == "interpolate":  # that of the FFN may become part of the head's, or be it
        return {0, WIDTH, WIDTH - VOCAB}
    return {0}


@pytest.mark.parametrize(("name", "exporter", "cache"), CASES)
def test_each_closed_stream_loses_d_squared(tmp_path, name, exporter, cache):
    skipless = case(name, cache=cache)
    model = ir.load(export(skipless, tmp_path / "model.onnx", exporter, opset(name, exporter)))
    result = onnx_fold.fold(model, objective="size", verify=False)
    report = result.report
    family = FAMILIES[name]
    streams = family.streams_with_cache if cache else family.streams
    assert len(report.folded) == streams, [s.reasons for s in report.left_alone]
    assert_reasons_name_nodes(report)
    assert matrix_weights(model) - matrix_weights(result.model) == streams * WIDTH**2
    assert weights(model) - weights(result.model) == report.saving.weights
    for stream in report.folded:
        biases = stream.folded.weights_removed - WIDTH**2
        assert biases in biases_removed(name, stream.folded.strategy), stream.folded.text
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert_same_outputs(model, result.model, sizes(name, exporter))


UNMODIFIED = [
    *((name, "torchscript") for name in FAMILIES if "shaped" not in name),
    ("llama", "dynamo"),
]


@pytest.mark.parametrize(("name", "exporter"), UNMODIFIED)
def test_with_norms_and_skips_nothing_changes(tmp_path, name, exporter):
    unmodified = case(name, skipless=False)
    path = export(unmodified, tmp_path / "model.onnx", exporter, opset(name, exporter))
    result = onnx_fold.fold(path, objective="size", verify=False)
    assert not result.report.folded
    result.save(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == path.read_bytes()
    reasons = [reason for stream in result.report.streams for reason in stream.reasons]
    named = {match[1] for reason in reasons if (match := NAMES_A_NODE.search(reason))}
    assert norms(unmodified.module) <= named
    assert_reasons_name_nodes(result.report)


WITHOUT_LAST_NORM = ("torch", "timm", "shaped", "shaped-parallel")
"""Families whose head reads the last block itself."""
SLOW = ("whisper", "mixtral", "mistral", "qwen2", "phi", "gpt-j", "falcon-mqa", "torch")
NORMED_CASES = [
    *((name, "torchscript") for name in FAMILIES if name != "shaped-identity-values"),
    *((name, "dynamo") for name in FAMILIES if name not in (*SLOW, "shaped-identity-values")),
]


def rotated(name: str) -> int:
    """3/8 d² for each stream that a norm reads; gemma has one head of half the width for K, V."""
    streams = FAMILIES[name].streams - (name in WITHOUT_LAST_NORM)
    return streams * 3 * WIDTH**2 // 8 - WIDTH**2 // 8 * (name == "gemma")


@pytest.mark.parametrize(("name", "exporter"), NORMED_CASES)
def test_with_norms_that_stay_each_stream_loses_three_eighths(tmp_path, name, exporter):
    """RMSNorm and LayerNorm, decomposed or an operator, in front of a sum of branches or not."""
    path = export(case(name, normed=True), tmp_path / "m.onnx", exporter, opset(name, exporter))
    model = ir.load(path)
    result = onnx_fold.fold(path, strategy="rotate", force=True, provider="cpu")
    streams = FAMILIES[name].streams - (name in WITHOUT_LAST_NORM)
    assert len(result.report.folded) == streams, [s.reasons for s in result.report.left_alone]
    assert len(result.report.proof.proved) == streams
    assert not result.report.proof.failed
    assert result.report.verification.ok
    assert matrix_weights(model) - matrix_weights(result.model) == rotated(name)
    assert weights(model) - weights(result.model) == result.report.saving.weights
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert_same_outputs(model, result.model, sizes(name, exporter))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_where_attention_mixes_what_a_norm_gives_nothing_is_rotated(tmp_path, exporter):
    """He and Hofmann's block with V and P the identity: heads are cut out of the norm itself."""
    name = "shaped-identity-values"
    path = export(case(name, normed=True), tmp_path / "m.onnx", exporter, opset(name, exporter))
    report = onnx_fold.fold(path, verify=False, strategy="rotate", force=True).report
    assert not report.folded
    (reason,) = (r for s in report.left_alone for r in s.reasons if "ffn.2" in r and "norm" in r)
    assert "no change of basis passes through it here, as " in reason
