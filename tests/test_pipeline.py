"""The public functions: what they take, what they leave alone, and passes in others' hands."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_same_function, chain, fold, normal, operators, proto, refused

import onnx_fold
from onnx_fold import pipeline
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.models.export import export
from onnx_fold.passes import PASSES, AbsorbPass, MergePass


@pytest.fixture
def model():
    return chain("m = Identity(p)", width=4, bias=True)


def test_every_kind_of_source(model, tmp_path):
    ir.save(model, tmp_path / "m.onnx")
    sources = [model, ir.to_proto(model), tmp_path / "m.onnx", str(tmp_path / "m.onnx")]
    before = proto(model)
    results = [onnx_fold.fold(source) for source in sources]
    assert len({proto(result.ir) for result in results}) == 1
    assert proto(model) == before
    types = [ir.Model, onnx.ModelProto, ir.Model, ir.Model]
    assert [type(result.model) for result in results] == types
    assert results[1].model is results[1].model  # so that what a caller changes in it stays
    assert results[1].model == results[1].proto


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_an_exported_program():
    torch = pytest.importorskip("torch")
    layers = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 5)).eval()
    example = torch.zeros(2, 3, 6)
    program = torch.onnx.export(layers, (example,), dynamo=True, verbose=False)
    result = onnx_fold.fold(program)
    assert result.report.saving.weights == 6 * 6 + 6
    assert_same_function(program.model, result.model)


def test_an_empty_proto():
    with pytest.raises(InvalidModelError, match="holds no graph"):
        onnx_fold.fold(onnx.ModelProto())


def test_not_a_model():
    with pytest.raises(UsageError, match="expected a path"):
        onnx_fold.fold(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["mrege"]}, "unknown pass 'mrege'; there are tables, branches"),
        ({"strategy": "best"}, "unknown pass 'best'"),
        ({"pivot": "o"}, "unknown pivot 'o'"),
        ({"protect": ["lm_haed"]}, "nothing in the model is called 'lm_haed'"),
    ],
)
def test_unknown_words(model, options, message):
    with pytest.raises(UsageError, match=message):
        onnx_fold.fold(model, **options)


def test_passes_run_in_anyones_sequence(model):
    result = ir.passes.Sequential(MergePass(), AbsorbPass())(model.clone())
    assert result.modified
    assert operators(result.model).count("MatMul") == 1
    assert_same_function(model, result.model)
    assert not MergePass()(result.model).modified


def test_passes_have_names_of_their_own():
    assert len({each.name for each in PASSES}) == len(PASSES)


def test_an_activation_between_is_named():
    reason = refused(chain("m = Relu(p)"))
    assert "'p' is read by Relu" in reason


def test_a_norm_between_is_named():
    held = {"scale": normal(4), "shift": normal(4, seed=1)}
    reason = refused(chain("m = LayerNormalization(p, scale, shift)", **held), target="cpu")
    assert "'p' is read by LayerNormalization" in reason
    assert "norms kept: 0.375 d² by rotation (does not pay in time on cpu)" in reason


def test_a_width_that_is_measured_is_named():
    source = chain("s = Shape(p) m = Reshape(p, s)", P=normal(4, 9), M=normal(9, 5))
    reason = "\n".join(
        candidate.refused or ""
        for stream in fold(source).report.streams
        for candidate in stream.candidates
    )
    assert "width" in reason or "shape" in reason


def test_strategy_forces_one(model):
    wide = chain("m = Identity(p)", width=4)
    assert fold(wide, strategy="absorb").report.folded[0].folded.strategy == "merge"


def test_weights_of_the_source_are_never_overwritten(model, tmp_path):
    ir.save(model, tmp_path / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=0)
    (tmp_path / "m.onnx").rename(tmp_path / "orig.onnx")
    data = (tmp_path / "m.onnx.data").read_bytes()
    result = onnx_fold.fold(tmp_path / "orig.onnx", verify=False)
    for value in result.model.graph.initializers.values():  # nothing of the source is left in it
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    result.save(tmp_path / "m.onnx", shard_size=2**20)
    assert (tmp_path / "m.onnx.data").read_bytes() == data
    assert onnx_fold.verify(tmp_path / "orig.onnx", tmp_path / "m.onnx").ok


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_attention_operator_of_opset_23():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.o, self.p = torch.nn.Linear(40, 16, bias=False), torch.nn.Linear(16, 16)
            self.q, self.k, self.v = (torch.nn.Linear(16, n, bias=False) for n in (16, 8, 8))
            self.m = torch.nn.Linear(16, 40)

        def forward(self, x):
            x = self.o(x)
            q, k, v = (
                f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            a = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return functional.relu(self.m(self.p(a.transpose(1, 2).flatten(2))))

    torch.manual_seed(0)
    program = torch.onnx.export(
        Attention().eval(), (torch.randn(2, 5, 40),), dynamo=True, opset_version=23, verbose=False
    )
    result = onnx_fold.fold(program)
    assert "Attention" in operators(result.model)
    assert result.report.saving.weights == 2 * 16**2 + 16  # O · Q, P · M, and the bias of P
    (layer,) = onnx_fold.inspect(program).attention
    assert (layer.kind, layer.num_heads, layer.num_kv_heads, layer.head_dim) == ("GQA", 4, 2, 4)


def test_maps_are_refused_in_words(tmp_path):
    text = """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
    m (float[n, 4] x) => (seq(map(int64, float)) y) {
      y = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2, 3]>(x)
    }"""
    with pytest.raises(InvalidModelError, match="map type, which onnx_ir cannot read; leave Zip"):
        onnx_fold.fold(onnx.parser.parse_model(text))


def test_the_result_as_one_message(tmp_path):
    path = export("tiny-gqa", tmp_path / "m.onnx")
    result = onnx_fold.fold(path, objective="size")
    onnx.checker.check_model(result.proto, full_check=True)
    assert onnx_fold.verify(path, result.proto)
    held = sum(len(each.raw_data) for each in result.proto.graph.initializer)
    assert held >= 4 * result.report.saving.after.weights


def test_a_limit_that_another_objective_raises_is_said_so(monkeypatch):
    def ratio(dtype: ir.DataType, *, for_size: bool = True) -> float:
        return 3.0 if for_size else 0.3

    monkeypatch.setattr(pipeline, "max_ratio", ratio)
    weights = {name: normal(32, 32, seed=seed, dtype=np.float16) for seed, name in enumerate("PM")}
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["": 20]> m (float16[n, 32] x) => (float16[n, 32] y)'
        " { p = MatMul(x, P) y = MatMul(p, M) }",
        initializers=[ir.tensor(array, name=name) for name, array in weights.items()],
    )
    with pytest.raises(onnx_fold.CheckFailedError, match=r"\(--objective size takes up to 3 times"):
        onnx_fold.fold(model, strict=True)
    assert onnx_fold.fold(model, strict=True, objective="size").report.folded
