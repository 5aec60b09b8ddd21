"""Quantised graphs: ONNX Runtime's own quantisers make them, and nothing quantised is touched."""

import logging

import onnx
import onnx_ir as ir
import pytest
from helpers import assert_same_function, feeds, fold, graph, normal
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer as nbits_quantizer
from rich.console import Console

D, F = 32, 48
pytestmark = pytest.mark.filterwarnings("ignore")  # the quantisers' own


def chain() -> ir.Model:
    """P into M, an activation, and W: P and M would fold."""
    model = graph(
        f"""(float[n, {D}] x) => (float[n, {D}] y)
        {{ p = MatMul(x, P) h = MatMul(p, M) r = Relu(h) y = MatMul(r, W) }}""",
        21, P=normal(D, D, seed=1), M=normal(D, F, seed=2), W=normal(F, D, seed=3),
    )  # fmt: skip
    for node, name in zip(model.graph, "PMRW", strict=True):
        node.name = name
    return model


class Inputs(quantization.CalibrationDataReader):
    """A few random rows."""

    def __init__(self):
        self._left = [feeds(chain())] * 2

    def get_next(self):
        return self._left.pop() if self._left else None


def static(kind, source, target, **options):
    quantization.quantize_static(source, target, Inputs(), quant_format=kind, **options)


def nbits(kind, source, target, **options):
    config = nbits_quantizer.DefaultWeightOnlyQuantConfig(
        block_size=16, is_symmetric=True, quant_format=kind
    )
    quantizer = nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(source), algo_config=config, **options
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


QDQ, QOPERATOR = quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator
QUANTISERS = {  # how a quantised layer then multiplies
    "dynamic": (quantization.quantize_dynamic, "MatMulInteger"),
    "static QDQ": (lambda *files, **options: static(QDQ, *files, **options), "MatMul"),
    "static": (lambda *files, **options: static(QOPERATOR, *files, **options), "QLinearMatMul"),
    "4 bits QDQ": (lambda *files, **options: nbits(QDQ, *files, **options), "MatMul"),
    "4 bits": (lambda *files, **options: nbits(QOPERATOR, *files, **options), "MatMulNBits"),
}


@pytest.fixture
def quantised(tmp_path):
    """Quantise the chain, less some layers, into a file."""

    def make(how: str, excluded: str):
        ir.save(chain(), tmp_path / "chain.onnx")
        target = tmp_path / "quantised.onnx"
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # that the model was not pre-processed
        try:
            QUANTISERS[how][0](tmp_path / "chain.onnx", target, nodes_to_exclude=list(excluded))
        finally:
            logging.disable(disabled)
        return target

    return make


@pytest.mark.parametrize("how", QUANTISERS)
def test_quantised_layers_are_left_alone(quantised, how, tmp_path):
    path = quantised(how, excluded="")
    result = fold(path)
    result.save(tmp_path / "folded.onnx")
    assert (tmp_path / "folded.onnx").read_bytes() == path.read_bytes()
    layers = result.report.quantised
    assert [layer[: layer.index("'") + 2] for layer in layers] == [
        f"{QUANTISERS[how][1]} '{name}" for name in "PMW"
    ]
    console = Console(width=400)
    with console.capture() as capture:
        console.print(result.report)
    shown = f"their weights are quantised: 3 layers ({layers[0]}, {layers[1]}, 1 more)."
    assert shown in capture.get()
    assert result.report.to_dict()["quantised"] == layers


@pytest.mark.parametrize("how", QUANTISERS)
def test_float_layers_between_quantised_ones_fold(quantised, how):
    result = fold(quantised(how, excluded="PM"))
    assert result.report.saving.weights == D * D
    assert_same_function(result.original, result.model)
    assert len(result.report.quantised) == 1


@pytest.mark.parametrize("how", QUANTISERS)
def test_a_stream_that_a_quantised_layer_reads_is_open(quantised, how):
    result = fold(quantised(how, excluded="P"))
    assert not result.report.folded
    (reason,) = [
        reason
        for stream in result.report.streams
        for reason in stream.reasons
        if reason.startswith("'p'")
    ]
    is_weight_only = "4 bits" in how
    assert ("whose weight is quantised" if is_weight_only else "QuantizeLinear") in reason
