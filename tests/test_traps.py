"""Random graphs full of traps are folded right, by default and with each strategy forced.

A fixed budget here; ``make fuzz`` and :mod:`hunt` look further.
"""

import os

import pytest
from hunt import OPTIONS, Subject, draw, fault

EXAMPLES = int(os.environ.get("ONNX_FOLD_FUZZ", "0"))
GRAPHS = 20
SEEDS = range(0, EXAMPLES or 200, GRAPHS)


@pytest.mark.parametrize("first", SEEDS)
def test_graphs(first):
    for seed in range(first, first + GRAPHS):
        model = draw(seed)
        if model is None:
            continue
        subject = Subject(model)
        for options in OPTIONS:
            text, result = fault(subject, options)
            assert not text, f"seed {seed}, {options}: {text}"
            if not any(stream.candidates for stream in result.report.streams):
                break  # nothing to fold in any way
