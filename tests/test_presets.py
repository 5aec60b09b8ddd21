"""Real exports of every preset, folded: exact counts, the same function, the same signature."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import onnx_fold
from onnx_fold.models.config import SkiplessConfig
from onnx_fold.models.presets import PRESETS
from onnx_fold.models.savings import closed_streams, norm_streams, panels, rotated

pytest.importorskip("torch")
from onnx_fold.models.export import export

TINY = sorted(
    name for name, shape in PRESETS.items() if name.startswith("tiny-") and shape.norm == "none"
)
NORMED = ("tiny-norms", "tiny-layer-norms")
EXPORTERS = [("dynamo", 20), ("torchscript", 17)]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Export a preset once, whatever the number of tests that ask for it."""
    folder: Path = tmp_path_factory.mktemp("exports")

    @functools.cache
    def get(preset: str, exporter: str = "dynamo", opset: int = 20, **options) -> Path:
        words = "-".join(f"{key}={value}" for key, value in options.items())
        path = folder / f"{preset}-{exporter}-{opset}-{words}.onnx"
        return export(preset, path, exporter=exporter, opset=opset, **options)

    return get


def biases_that_go(config: SkiplessConfig) -> int:
    """Biases of P that end in the FFN's: one a block where P is merged, none where absorbed."""
    merged = config.num_hidden_layers if config.bias and not config.parallel else 0
    return merged * config.hidden_size


def expected(config: SkiplessConfig) -> int:
    """d² for each closed stream, and the biases that became part of others."""
    return closed_streams(config) * config.hidden_size**2 + biases_that_go(config)


def signature(model: ir.Model) -> list[tuple[str | None, str, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.dtype), str(value.shape)) for value in values]


def check(path: Path, tmp_path: Path, weights: int, **options) -> onnx_fold.FoldResult:
    """Fold ``path``: the count, the checker, the signature, parity, and nothing left to fold."""
    result = onnx_fold.fold(path, provider="cpu", objective="size", **options)
    assert result.report.saving.weights == weights
    output = tmp_path / "folded.onnx"
    result.save(output)
    onnx.checker.check_model(output, full_check=True)
    assert signature(ir.load(output)) == signature(ir.load(path))
    assert result.report.verification.ok
    again = onnx_fold.fold(output, verify=False)
    assert not again.report.folded
    return result


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
@pytest.mark.parametrize("preset", TINY)
def test_loses_d_squared_a_closed_stream(exported, tmp_path, preset, exporter, opset):
    seed = 3 if preset == "tiny-gemma" else 0  # that of 0 has no heads that are conditioned well
    path = exported(preset, exporter, opset, kv_cache=True, seed=seed)
    result = check(path, tmp_path, expected(PRESETS[preset]))
    for output in result.report.verification.outputs:  # KV cache outputs included
        assert output.relative_error < 1e-4


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("preset", ["tiny-gqa", "tiny-parallel"])
def test_other_opsets_without_cache(exported, tmp_path, preset, opset):
    check(exported(preset, "dynamo", opset), tmp_path, expected(PRESETS[preset]))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("preset", ["tiny-gqa", "tiny-mha", "tiny-parallel-glu"])
def test_other_storage_types(exported, tmp_path, preset, dtype):
    path = exported(preset, dtype=dtype)
    result = check(path, tmp_path, expected(PRESETS[preset]))
    types = {v.const_value.dtype for v in result.model.graph.initializers.values()}
    assert types == {v.const_value.dtype for v in ir.load(path).graph.initializers.values()}


@pytest.mark.parametrize("pivot", ["q", "k", "v"])
def test_pivot_of_mha(exported, tmp_path, pivot):
    result = check(
        exported("tiny-mha", kv_cache=True), tmp_path, expected(PRESETS["tiny-mha"]), pivot=pivot
    )
    names = set(result.model.graph.initializers)
    for kind in "qkv":
        assert (f"layers.1.attn.{kind}_proj.weight" in names) == (kind != pivot)


def test_structure_of_a_serial_fold(exported):
    result = onnx_fold.fold(exported("tiny-gqa", kv_cache=True), provider="cpu", objective="size")
    names = set(result.model.graph.initializers)
    for layer in range(PRESETS["tiny-gqa"].num_hidden_layers):
        assert f"layers.{layer}.attn.q_proj.weight" not in names
        assert f"layers.{layer}.attn.p_proj.weight" not in names
        assert f"layers.{layer}.attn.k_proj.weight" in names
        assert f"layers.{layer}.ffn.gate_proj.weight" in names


def test_one_of_p_q_k_v_in_a_parallel_block(exported):
    result = onnx_fold.fold(
        exported("tiny-parallel", kv_cache=True), provider="cpu", objective="size"
    )
    for stream in result.report.folded:
        assert stream.folded.weights_removed == PRESETS["tiny-parallel"].hidden_size ** 2


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
@pytest.mark.parametrize("preset", TINY)
def test_residual_twin_comes_out_unchanged(exported, tmp_path, preset, exporter, opset):
    path = exported(preset, exporter, opset, residual=True)
    result = onnx_fold.fold(path, provider="cpu", objective="size")
    assert not result.report.folded
    assert any("norm" in reason for s in result.report.left_alone for reason in s.reasons)
    result.save(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == path.read_bytes()


def test_same_input_gives_same_bytes(exported, tmp_path):
    for name in ("a.onnx", "b.onnx"):
        onnx_fold.fold(exported("tiny-gqa", kv_cache=True), objective="size", verify=False).save(
            tmp_path / name
        )
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("preset", ["tiny-gemma", "tiny-palm"])
def test_other_widths_than_the_papers_in_16_bits(exported, tmp_path, preset):
    path, config = exported(preset, dtype="float16"), PRESETS[preset]
    heads = config.hidden_size**2 * (preset == "tiny-gemma")  # as a basis 7 times less accurate
    result = check(path, tmp_path, expected(config) - heads)
    parity = onnx_fold.verify(path, result.model, emulate=True)
    assert parity.ok, parity.reason


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
@pytest.mark.parametrize("preset", NORMED)
def test_norms_may_stay(exported, tmp_path, preset, exporter, opset):
    """Narrow as these are it does not pay by default; asked for it is exact."""
    path = exported(preset, exporter, opset, kv_cache=True)
    config = PRESETS[preset]
    assert not onnx_fold.fold(path, verify=False).report.folded
    result = onnx_fold.fold(path, provider="cpu", strategy="rotate", force=True)
    streams = norm_streams(config)
    assert len(result.report.folded) == streams
    kinds = {stream.folded.strategy for stream in result.report.folded}
    assert kinds == {"rotate"}
    vectors = config.vocab_size * (preset == "tiny-layer-norms")  # a bias of the head
    removed = streams * 3 * config.hidden_size**2 // 8 - vectors
    assert result.report.saving.weights == removed
    assert result.report.verification.ok
    assert len(result.report.proof.proved) == streams
    assert not onnx_fold.fold(result.model, verify=False).report.folded


@pytest.mark.parametrize("preset", NORMED)
def test_norms_may_stay_for_size(exported, tmp_path, preset):
    """Eight panels, but where a panel would be less than a head; what the table of presets says."""
    config = PRESETS[preset]
    result = onnx_fold.fold(exported(preset, "dynamo", 20, kv_cache=True), objective="size")
    assert len(result.report.folded) == norm_streams(config)
    vectors = config.vocab_size * (preset == "tiny-layer-norms")
    assert result.report.saving.weights == rotated(config) - vectors
    assert result.report.verification.ok


def test_what_a_stream_with_a_norm_loses():
    mistral = PRESETS["mistral-7b-norms"]
    assert panels(mistral) == 8
    assert rotated(mistral) == norm_streams(mistral) * 7 * mistral.hidden_size**2 // 16
    tiny = PRESETS["tiny-norms"]
    assert panels(tiny) == 4
    assert rotated(tiny) == (4 * 7 + 6) * tiny.hidden_size**2 // 16
