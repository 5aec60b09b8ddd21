"""The paper's table, and how a model is weighed."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from helpers import graph, normal
from rich.console import Console

from onnx_fold.engine.cost import Cost, Saving, Target, cost
from onnx_fold.models.presets import config
from onnx_fold.models.savings import closed_streams, predicted, presets_table
from onnx_fold.rewriting.rewrite import Work


def test_mistral_as_in_the_paper():
    saving = predicted(config("mistral-7b"), streams_per_block=2)
    assert round(saving.before.weights / 1e9, 1) == 7.2
    assert round(saving.after.weights / 1e9, 1) == 6.2
    assert saving.weights == 32 * 2 * 4096**2
    assert f"{saving.share:.0%} {saving.speedup:.2f}x" == "15% 1.17x"


def test_pythia_by_the_papers_count_and_exactly():
    shape = config("pythia-6.9b")
    paper, exact = predicted(shape, streams_per_block=2), predicted(shape)
    assert f"{paper.share:.0%} {paper.speedup:.2f}x" == "16% 1.19x"
    assert paper.weights == 32 * 2 * 4096**2
    assert exact.weights == (32 + 1) * 4096**2  # half of that, and one in front of the head


@pytest.mark.parametrize(("preset", "streams"), [("mistral-7b", 65), ("pythia-6.9b", 33)])
def test_closed_streams(preset, streams):
    shape = config(preset)
    assert closed_streams(shape) == streams
    assert predicted(shape).weights == streams * shape.hidden_size**2
    assert closed_streams(dataclasses.replace(shape, residual=True)) == 0


def test_the_table_is_for_people():
    console = Console(width=200)
    with console.capture() as capture:
        console.print(presets_table())
    line = next(row for row in capture.get().splitlines() if "mistral-7b" in row)
    assert "7.2 B" in line
    assert "6.2 B" in line
    assert "15%" in line
    assert "1.17x" in line


def test_cost_counts_floats_wherever_they_are():
    model = graph(
        """(float[n, 4] x, bool t) => (float[n, 4] y) {
            c = Constant<value = float[4] {1, 2, 3, 4}>()
            h = MatMul(x, W)
            y = If(t) <then_branch = a () => (float[n, 4] q) { q = Add(h, c) },
                       else_branch = b () => (float[n, 4] r) { r = Identity(h) }>
        }""",
        W=normal(4, 4),
        half=normal(6, dtype=np.float16),
        ids=np.arange(9),
    )
    size = 4 * 4 + 16 * 4 + 6 * 2
    assert cost(model) == Cost(weights=4 + 16 + 6, bytes=size, nodes=4, read=size)


def test_nothing_weighs_nothing():
    saving = Saving(Cost(0, 0), cost(ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
    )))  # fmt: skip
    assert (saving.share, saving.speedup) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("work", "phase"),
    [
        (Work(-1, copied=0), ""),
        (Work(2), ""),
        (Work(3), "decode"),
        (Work(0, copied=125), ""),
        (Work(0, copied=126), "prefill"),
        (Work(0, gathered=20), ""),
        (Work(0, copied=5, gathered=20), "prefill"),
    ],
)
def test_operators_must_be_worth_the_weights(work, phase):
    target = Target(bytes_per_node=1000, macs_per_copied=4, macs_per_gathered=25)
    assert target.loses(work, weights=500, itemsize=4) == phase
