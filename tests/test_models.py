"""The skipless models: shapes, both exporters against torch, and the trained model that ships."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_fold
from onnx_fold import errors, models
from onnx_fold.models.config import SkiplessConfig, num_parameters
from onnx_fold.models.presets import PRESETS, config

TINY = [name for name in PRESETS if name.startswith("tiny-")]
SHIPPED = sorted(Path(models.__file__).parent.glob("*.onnx"))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring at these sizes."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


def session(path: Path):
    ort = pytest.importorskip("onnxruntime")
    onnx.checker.check_model(str(path), full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def tokens(batch: int = 3, length: int = 12, vocab_size: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length))


def cache_feed(ids: np.ndarray, past: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of a model with a KV cache; ``past`` is key, value, key, value and so on."""
    total = past[0].shape[2] + ids.shape[1]
    feed = {"input_ids": ids, "attention_mask": np.ones((len(ids), total), np.int64)}
    for i, array in enumerate(past):
        feed[f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}"] = array
    return feed


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("mistral-7b", 7.2e9, 7.3e9), ("pythia-6.9b", 6.8e9, 6.9e9)]
)
def test_large_shapes_have_the_published_number_of_parameters(preset, low, high):
    assert low < num_parameters(config(preset)) < high


def test_the_shapes_need_no_torch():
    imports = "import sys, onnx_fold.models.presets, onnx_fold.models.export"
    code = f"{imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_replace_those_of_the_preset():
    assert config("mistral-7b", layers=2) == dataclasses.replace(
        PRESETS["mistral-7b"], num_hidden_layers=2
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("preset", TINY)
def test_num_parameters_counts_those_of_the_module(preset, residual):
    pytest.importorskip("torch")
    from onnx_fold.models.skipless import SkiplessTransformer

    shape = dataclasses.replace(config(preset), residual=residual)
    module = SkiplessTransformer(shape)
    assert sum(p.numel() for p in module.parameters()) == num_parameters(shape)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("preset", TINY)
def test_exported_graph_computes_what_the_module_does(preset, exporter, tmp_path):
    """Prefill, one decode step and the full sequence, from one graph with a KV cache."""
    torch = pytest.importorskip("torch")
    from onnx_fold.models.export import export
    from onnx_fold.models.skipless import SkiplessTransformer

    path = export(preset, tmp_path / "m.onnx", exporter=exporter, kv_cache=True, layers=1, seed=3)
    run = session(path)
    shape = config(preset, layers=1)
    ids = tokens()
    with torch.no_grad():
        logits, present = SkiplessTransformer(shape, seed=3).step(torch.from_numpy(ids))
    expected = logits.numpy()
    empty = np.zeros((3, shape.num_key_value_heads, 0, shape.head_dim), np.float32)
    full = run.run(None, cache_feed(ids, [empty] * 2))
    prefill = run.run(None, cache_feed(ids[:, :-1], [empty] * 2))
    decode = run.run(None, cache_feed(ids[:, -1:], prefill[1:]))
    assert_close(full[0], expected)
    assert_close(prefill[0], expected[:, :-1])
    assert_close(decode[0], expected[:, -1:])
    assert_close(decode[1], present[0][0].numpy())
    assert [o.name for o in run.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize(
    ("exporter", "opset"), [("dynamo", 18), ("dynamo", 23), ("torchscript", 17)]
)
def test_opsets_and_dynamic_axes_without_a_cache(exporter, opset, tmp_path):
    torch = pytest.importorskip("torch")
    from onnx_fold.models.export import export
    from onnx_fold.models.skipless import SkiplessTransformer

    path = export("tiny-gqa", tmp_path / "m.onnx", exporter=exporter, opset=opset, layers=1)
    run = session(path)
    ids = tokens(batch=1, length=30)
    with torch.no_grad():
        expected = SkiplessTransformer(config("tiny-gqa", layers=1))(torch.from_numpy(ids)).numpy()
    assert_close(run.run(None, {"input_ids": ids})[0], expected)
    assert run.get_inputs()[0].shape == ["batch", "sequence_length"]
    proto = onnx.load(path)
    assert proto.opset_import[0].version == opset
    names = {initializer.name for initializer in proto.graph.initializer}
    assert {"layers.0.attn.q_proj.weight", "layers.0.ffn.o_proj.weight"} <= names


def test_padding_is_masked(tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    file = tmp_path / "m.onnx"
    run = session(export("tiny-mqa", file, kv_cache=True, layers=1, exporter="torchscript"))
    ids = tokens(batch=1)
    feed = cache_feed(ids, [np.zeros((1, 1, 0, 16), np.float32)] * 2)
    plain = run.run(None, feed)[0]
    padded = np.concatenate([np.full((1, 4), 7), ids], axis=1)
    feed |= {"input_ids": padded, "attention_mask": np.array([[0] * 4 + [1] * 12])}
    assert_close(run.run(None, feed)[0][:, 4:], plain)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(dtype, exporter, tmp_path):
    torch = pytest.importorskip("torch")
    from onnx_fold.models.export import export
    from onnx_fold.models.skipless import SkiplessTransformer

    path = export("tiny-gqa", tmp_path / "m.onnx", dtype=dtype, exporter=exporter, layers=1)
    if dtype == "bfloat16":  # ONNX Runtime's CPU provider has few bfloat16 kernels
        onnx.checker.check_model(str(path), full_check=True)
        return
    actual = session(path).run(None, {"input_ids": tokens()})[0]
    with torch.no_grad():  # the same weights in float32
        full = SkiplessTransformer(config("tiny-gqa", layers=1))(torch.from_numpy(tokens()))
    assert actual.dtype == dtype
    assert_close(actual, full.numpy(), 1e-2 if dtype == "float16" else 1e-4)


@pytest.mark.parametrize(
    ("preset", "residual"), [("tiny-gqa", False), ("tiny-parallel", False), ("tiny-fused", True)]
)
def test_a_drawn_model_has_the_same_graph(preset, residual, tmp_path, monkeypatch):
    """What is too large for memory is traced without weights: nothing else may differ."""
    pytest.importorskip("torch")
    from onnx_fold.models import export as module

    options = {"kv_cache": True, "layers": 1, "residual": residual}
    real = onnx.load(module.export(preset, tmp_path / "real.onnx", **options))
    monkeypatch.setattr(module, "DRAWN_LIMIT", 0)
    path = module.export(preset, tmp_path / "drawn.onnx", **options)
    session(path)
    drawn = onnx.load(path)
    assert [node.op_type for node in drawn.graph.node] == [node.op_type for node in real.graph.node]
    shapes = [{i.name: list(i.dims) for i in m.graph.initializer} for m in (real, drawn)]
    assert shapes[0] == shapes[1]
    assert list(drawn.graph.input) == list(real.graph.input)
    assert list(drawn.graph.output) == list(real.graph.output)


def test_a_drawn_model_keeps_its_variance_and_folds(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from onnx_fold.models import export as module

    monkeypatch.setattr(module, "DRAWN_LIMIT", 0)
    monkeypatch.setattr("onnx_fold.models.large._NARROW", 16)
    path = module.export("tiny-gemma", tmp_path / "m.onnx", dtype="float16", layers=4)
    logits = session(path).run(None, {"input_ids": tokens(8, 32)})[0].astype(np.float64)
    assert 0.1 < np.square(logits).mean() < 10
    result = onnx_fold.fold(path, objective="size", output=tmp_path / "f.onnx", tolerance=0.1)
    assert len(result.report.folded) >= 4
    assert result.report.verification.ok
    again = module.export("tiny-gemma", tmp_path / "again.onnx", dtype="float16", layers=4)
    assert again.read_bytes() == path.read_bytes()


def test_draws_do_not_depend_on_how_they_are_chunked(monkeypatch):
    large = pytest.importorskip("onnx_fold.models.large")
    draw = ("w", (5, 7), ir.DataType.BFLOAT16, 0, 1.0, 0.5)
    whole = large._draw(*draw).numpy()
    monkeypatch.setattr(large, "_CHUNK", 8)
    np.testing.assert_array_equal(large._draw(*draw).numpy(), whole)
    for other in (("v", *draw[1:]), (*draw[:3], 1, *draw[4:])):  # another name, another seed
        assert (large._draw(*other).numpy() != whole).any()


@pytest.mark.parametrize(
    ("preset", "exporter"), [("tiny-gqa", "dynamo"), ("tiny-parallel", "torchscript")]
)
def test_residual_twin(preset, exporter, tmp_path):
    torch = pytest.importorskip("torch")
    from onnx_fold.models.export import export
    from onnx_fold.models.skipless import SkiplessTransformer

    shape = dataclasses.replace(config(preset, layers=1), residual=True)
    path = export(preset, tmp_path / "m.onnx", layers=1, residual=True, exporter=exporter)
    run = session(path)
    with torch.no_grad():
        expected = SkiplessTransformer(shape)(torch.from_numpy(tokens())).numpy()
    assert_close(run.run(None, {"input_ids": tokens()})[0], expected)


def test_last_token_only_and_tied_embeddings(tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    shape = dataclasses.replace(config("tiny-gqa", layers=1), tie_embeddings=True)
    last = dataclasses.replace(shape, last_token_only=True)
    full, only = (
        session(export(c, tmp_path / f"{i}.onnx", exporter="torchscript")).run(
            None, {"input_ids": tokens()}
        )[0]
        for i, c in enumerate((shape, last))
    )
    assert_close(only, full[:, -1:])


def test_export_is_quiet_reproducible_and_tells_no_paths(tmp_path, capfd):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    first, second = (
        export("tiny-fused", tmp_path / f"{i}.onnx", layers=1).read_bytes() for i in range(2)
    )
    assert capfd.readouterr() == ("", "")
    assert first == second
    assert b".py" not in first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.onnx", "1.onnx"]


def test_the_seed_decides_the_weights():
    torch = pytest.importorskip("torch")
    from onnx_fold.models.skipless import SkiplessTransformer

    first, second, other = (
        torch.nn.utils.parameters_to_vector(
            SkiplessTransformer(config("tiny-mha"), seed=seed).parameters()
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_fresh_model_keeps_unit_variance():
    torch = pytest.importorskip("torch")
    from onnx_fold.models.skipless import SkiplessTransformer

    logits = SkiplessTransformer(config("tiny-mqa", layers=8))(torch.from_numpy(tokens(8, 32)))
    assert 0.25 < logits.square().mean() < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "unknown preset"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"exporter": "tensorflow"}, "unknown exporter"),
        ({"layers": 0}, "at least one layer"),
        ({"opset": 3}, "dynamo writes opset 18 to 24, not 3"),
        ({"exporter": "torchscript", "opset": 23}, "torchscript writes opset 13 to 20"),
    ],
)
def test_requests_that_make_no_sense(arguments, message, tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    with pytest.raises(errors.UsageError, match=message):
        export(**({"preset": "tiny-gqa", "output": tmp_path / "m.onnx"} | arguments))
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_told_before_the_work(tmp_path):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    with pytest.raises(errors.CannotWriteError, match="there is no folder"):
        export("mistral-7b", tmp_path / "missing" / "m.onnx")


def test_shapes_that_make_no_sense():
    with pytest.raises(errors.UsageError, match="multiple"):
        SkiplessConfig(num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(errors.UsageError, match="even head_dim"):
        SkiplessConfig(head_dim=15)


def test_without_torch_the_extra_is_named(monkeypatch, tmp_path):
    from onnx_fold.models.export import export

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(errors.MissingExtraError, match=r"onnx-fold\[torch\]"):
        export("tiny-gqa", tmp_path / "m.onnx")


LOSSES = {"char-gqa": 1.4, "char-gqa-norms": 1.5}
"""What each shipped model has to predict better than, in nats a character."""


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_shipped_model(shipped):
    """Its vocabulary and loss are in its metadata, and it predicts Python better than chance."""
    assert shipped.stat().st_size < 6e6
    run = session(shipped)
    metadata = run.get_modelmeta().custom_metadata_map
    vocabulary = json.loads(metadata["onnx_fold.vocab"])
    assert float(metadata["onnx_fold.val_loss"]) < LOSSES[shipped.stem]
    text = (
        "import sys\n\n\ndef main():\n    for argument in sys.argv[1:]:\n        print(argument)\n"
    )
    ids = np.array([[vocabulary.index(c) for c in text]])
    past = [i for i in run.get_inputs() if i.name.startswith("past_key_values")]
    empty = np.zeros((1, past[0].shape[1], 0, past[0].shape[3]), np.float32)
    logits = run.run(["logits"], cache_feed(ids, [empty] * len(past)))[0][0, :-1].astype(float)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert -logits[np.arange(len(text) - 1), ids[0, 1:]].mean() < 2
