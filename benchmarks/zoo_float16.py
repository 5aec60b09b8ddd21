"""Fold the zoo in float16, as ONNX Runtime's converter writes it: what is kept, what is taken back.

``python benchmarks/zoo_float16.py`` exports the models of ``zoo.py``, converts and folds them with
the defaults, and writes ``docs/zoo-float16.json`` after every model and a table of it,
``docs/zoo-float16.md``. The statistics of the BatchNorms are those of random batches: with random
ones a deep network leaves the range of float16. Nothing is timed: a CPU computes it in float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from zoo import TIMM, Model, Shipped, measure_missing, shortened, worst_ratio

import onnx_fold

BATCHES, BATCH = 3, 4
"""Random batches of images from which statistics are."""

HEAD = """# The zoo in float16

`python benchmarks/zoo_float16.py` exports the models of [the zoo](zoo.md), converts them with ONNX
Runtime's float16 converter, and folds them with the defaults. *kept* are folds, *taken back* those
without which the rest is within the limits of float16, 3 times the model's own error
([the rule](trust.md)); the error is that of the worst output as a multiple of that, and *stored*
how far the weights are off, as a multiple of what rounding them anew does. BatchNorms have
statistics of random batches. Of {count} models {folded} fold; the others are not listed.

"""


@dataclass(frozen=True)
class HalfRow:
    """One model.

    Attributes:
        name: What it is called.
        operators: Of the model, and of the fold of it.
        weights: The same.
        kept: Folds.
        taken_back: Folds that were taken back.
        why: The reason of the first of these.
        error: Largest ratio of an output's error to the original's own.
        stored: How far the weights are off, as a multiple of what rounding them anew does.
    """

    name: str
    operators: tuple[int, int]
    weights: tuple[int, int]
    kept: int
    taken_back: int
    why: str = ""
    error: float | None = None
    stored: float | None = None


def with_measured_statistics(name: str) -> torch.nn.Module:
    """A model of timm, its BatchNorms with random gains and the statistics of random batches."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False)
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            each.momentum = None  # the mean of all batches
            if each.weight is not None:
                torch.nn.init.uniform_(each.weight, 0.5, 1.5)
                torch.nn.init.normal_(each.bias, std=0.2)
    with torch.no_grad():
        for _ in range(BATCHES):
            module.train()(torch.randn(BATCH, *module.default_cfg["input_size"]))
    return module.eval()


def measured(model: Model | Shipped) -> HalfRow:
    """Export, convert, fold and check one model."""
    if isinstance(model, Model):
        model = replace(model, merged=None)
        if model.name in TIMM:
            model = replace(model, make=lambda name=model.name: with_measured_statistics(name))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.onnx"
        model.write(source, source)
        onnx.save(convert_float_to_float16(onnx.load(source)), source)
        report = onnx_fold.fold(source, provider="cpu").report
    before, after = report.saving.before, report.saving.after
    row = HalfRow(
        model.name,
        (before.nodes, after.nodes),
        (before.weights, after.weights),
        len(report.folded),
        len(report.taken_back),
        next(iter(report.taken_back.values()), ""),
    )
    if report.verification is None:
        return row
    stored = report.verification.stored
    error = worst_ratio(report.verification)
    return replace(row, error=error, stored=None if stored is None else stored.ratio)


def table(rows: Iterable[HalfRow]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | operators | weights | kept | taken back | error | stored | why |",
        f"|{'---|' * 8}",
    ]
    for row in rows:
        cells = [
            row.name,
            "{} → {}".format(*row.operators),
            "{:,} → {:,}".format(*row.weights),
            str(row.kept),
            str(row.taken_back or ""),
            *("" if each is None else f"{each:.1f}" for each in (row.error, row.stored)),
            shortened(row.why),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not in the JSON file yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of them")
    parser.add_argument("--output", type=Path, default=Path("docs/zoo-float16.json"))
    arguments = parser.parse_args()
    rows = measure_missing(arguments.output, arguments.only, measured)
    made = [HalfRow(**row) for row in rows.values()]
    listed = [row for row in made if row.kept or row.taken_back]
    head = HEAD.format(count=len(made), folded=sum(bool(row.kept) for row in made))
    arguments.output.with_suffix(".md").write_text(head + table(listed))


if __name__ == "__main__":
    main()
