"""A model as people write it by hand: what a fold passes, a later check passes, at any length."""

import pytest

import onnx_fold
from onnx_fold.models.config import SkiplessConfig

pytest.importorskip("torch")
from onnx_fold.models.export import export

LENGTHS = (40, 80, 120, 200)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Learned positions, GQA, SwiGLU, Gaussian weights that amplify errors, in half precision."""
    config = SkiplessConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=704,
        positions="learned",
        max_position_embeddings=256,
        init="gaussian",
    )
    file = tmp_path_factory.mktemp("hand") / "model.onnx"
    return export(config, file, dtype="float16", exporter="torchscript")


@pytest.mark.parametrize("is_checked", [True, False])
def test_the_verdict_is_the_same_at_any_length(path, is_checked):
    """Its ill-conditioned folds, which have to be forced, are inaccurate at all of them."""
    forced = {} if is_checked else {"strategy": "absorb", "force": True}
    result = onnx_fold.fold(path, objective="size", verify=is_checked, **forced)
    assert result.report.folded
    shapes = [None, *([{"batch": 1, "seq": length}] for length in LENGTHS)]
    verdicts = [bool(onnx_fold.verify(path, result.model, shapes=each)) for each in shapes]
    assert verdicts == [is_checked] * len(shapes)
    if is_checked:
        assert result.report.verification
