"""Measure what might be done in another way: real rows for random ones, absorption in part.

``python benchmarks/alternatives.py calibrate`` folds with all rows of O, selected by random rows
and by rows that the model was seen to read, and compares the errors on others: an FFN of 256
channels whose hidden ones differ in size, and MiniLM on text. ``absorb`` compares, on MiniLM's
weights, the error of a basis that is filled up: of columns of Q, of K, of V, and of rows of O.
``docs/accuracy.md`` has what they print.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matrices
import numpy as np
import onnx.parser
import onnx_ir as ir
from matrices import Matrix

import onnx_fold
from onnx_fold.algebra.completion import farthest, find_gap, given_up_first, size_of
from onnx_fold.algebra.selection import select_rows

WIDTH, HIDDEN, ROWS = 256, 896, 256

GRAPH = """
    <ir_version: 10, opset_import: ["": 18]>
    ffn (float16[n, 256] x) => (float16[n, 512] y) {
        a = MatMul(x, M)
        %s
        s = MatMul(h, O)
        y = MatMul(s, R)
    }
"""
ACTIVATIONS = {"ReLU": "h = Relu(a)", "GLU": "g = MatMul(x, G) c = Sigmoid(g) h = Mul(a, c)"}

SHARES = (1.0, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)

Feed = dict[str, np.ndarray[Any, Any]]


# --- Calibration ----------------------------------------------------------------------------------


def compared(name: str, model: ir.Model | Path, seen: Feed, others: list[Feed]) -> str:
    """Errors on ``others`` of folds with random rows and with those of ``seen``, as a table row."""
    errors, own = [], 0.0
    for rows in (None, seen):
        folded = onnx_fold.fold(
            model, strategy="interpolate", force=True, verify=False, calibrate=rows
        )
        runs = [onnx_fold.verify(model, folded.model, inputs=each, emulate=True) for each in others]
        outputs = [run.outputs[0] for run in runs]
        errors.append(np.mean([output.error_folded or np.inf for output in outputs]))
        own = float(np.mean([output.error_original or 0.0 for output in outputs]))
    random, real = errors
    return f"| {name} | {own:.1e} | {random:.1e} | {real:.1e} | {1 - real / random:.0%} |"


def uneven(activation: str, spread: float, seed: int) -> tuple[ir.Model, Iterator[Feed]]:
    """An FFN whose hidden channels have log-normal sizes, and inputs from one distribution."""
    generator = np.random.default_rng(seed)

    def gaussian(rows: int, columns: int) -> Matrix:
        return generator.standard_normal((rows, columns)) / np.sqrt(rows)

    sizes = np.exp(spread * generator.standard_normal(HIDDEN))
    weights = {"M": gaussian(WIDTH, HIDDEN) * sizes, "G": gaussian(WIDTH, HIDDEN)}
    weights |= {"O": gaussian(HIDDEN, WIDTH), "R": gaussian(WIDTH, 2 * WIDTH)}
    mixed = gaussian(WIDTH, WIDTH) * np.exp(generator.standard_normal(WIDTH))
    text = GRAPH % ACTIVATIONS[activation]
    proto = onnx.parser.parse_model(text)
    for name, weight in weights.items():
        if f", {name})" in text:
            proto.graph.initializer.append(ir.to_proto(ir.tensor(weight.astype("f2"), name=name)))

    def feeds() -> Iterator[Feed]:
        while True:
            x = generator.standard_normal((ROWS, WIDTH)) @ mixed
            yield {"x": (x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))).astype(np.float16)}

    return ir.from_proto(proto), feeds()


def calibrate() -> Iterator[str]:
    """Rows of a table."""
    yield "| model, fp16 | own error | random rows | real rows | gain |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for activation in ACTIVATIONS:
        for spread in (0.0, 1.0, 2.0):
            for seed in (0, 1):
                model, feeds = uneven(activation, spread, seed)
                seen, *others = (next(feeds) for _ in range(3))
                name = f"{activation}, hidden channels spread by exp({spread:g} N), seed {seed}"
                yield compared(name, model, seen, others)
    yield from minilm_on_text()


def minilm_on_text() -> Iterator[str]:
    """MiniLM's six layers on the documentation's text, 256 tokens a run."""
    import minilm
    import torch
    from tokenizers import Tokenizer

    from onnx_fold.models.export import export_module

    tokenizer = Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    docs = Path(__file__).parents[1] / "docs"
    text = "\n".join((docs / name).read_text("utf-8") for name in ("theory.md", "trust.md"))
    ids = np.array(tokenizer.encode(text).ids, np.int64)
    seen, *others = ({"input_ids": ids[i : i + 256].reshape(8, 32)} for i in (0, 1024, 2048))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "minilm.onnx")
        export_module(minilm.build(minilm.read()).to(torch.float16), path)
        yield compared("MiniLM, text", path, seen, others)


# --- Absorption in part ---------------------------------------------------------------------------


def filled(basis: Matrix, kept: int) -> Matrix:
    """``basis`` with all but ``kept`` of its rows replaced by what completes them."""
    if kept == len(basis):
        return basis
    missing = len(basis) - kept
    gap = find_gap(basis, given_up_first(missing, len(basis)))
    back = gap.dropped[farthest(gap.outside, len(gap.dropped) - missing)]
    rows = basis[np.concatenate((gap.left, back))]
    complement = np.linalg.qr(rows.T, mode="complete")[0][:, kept:].T
    return np.vstack((rows, size_of(basis) * complement))


def growth(basis: Matrix, o: Matrix, readers: Matrix) -> float:
    """How rounding errors of ``x T`` grow: ``‖ |x T|ⱼ |T⁻¹ R|ⱼ ‖ / ‖x R‖``, for ``x = h O``."""
    sizes = np.linalg.norm(o @ basis, axis=0)
    lengths = np.linalg.norm(np.linalg.solve(basis, readers), axis=1)
    return float(np.linalg.norm(sizes * lengths) / np.linalg.norm(o @ readers))


def absorb() -> Iterator[str]:
    """Rows of a table: the growth at each share of d² that goes, of MiniLM's streams."""
    import minilm

    yield f"| stream, basis | {' | '.join(f'{share:.0%}' for share in SHARES)} |"
    yield f"| --- |{' ---: |' * len(SHARES)}"
    for number, stream in enumerate(matrices.trained_streams(minilm.read(), 32), 1):
        readers = np.hstack((stream.q, stream.k, stream.v))
        width = len(readers)
        order = select_rows(stream.o)[0][:width]
        bases = {"columns of Q": stream.q.T, "of K": stream.k.T, "of V": stream.v.T}
        bases["rows of O"] = stream.o[order]
        for name, basis in bases.items():
            whole = (filled(basis, round(share * width)) for share in SHARES)
            ways = (np.linalg.inv(each) if name == "rows of O" else each.T for each in whole)
            cells = (f"{growth(way, stream.o, readers):.1f}" for way in ways)
            yield f"| {number}, {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("calibrate", "absorb"))
    for line in {"calibrate": calibrate, "absorb": absorb}[parser.parse_args().what]():
        print(line, flush=True)


if __name__ == "__main__":
    main()
