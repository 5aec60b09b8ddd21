"""onnx-fold between onnxscript's optimizer and ONNX Runtime's, in every order.

``python examples/with_other_optimizers.py`` exports a skipless transformer unoptimised, runs the
three in each order, and prints weights and operators of what comes out: docs/pipelines.md has the
table, and says which order to take.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxruntime.transformers.optimizer import optimize_model
from onnxscript.optimizer import optimize

import onnx_fold
from onnx_fold.models.export import export


def with_onnxscript(model: ir.Model) -> ir.Model:
    """Fold constants and drop what nothing reads."""
    optimize(model)
    return model


PROVED: list[str] = []
"""Of each fold that was made, how many streams are proved in float64, of how many."""


def with_onnx_fold(model: ir.Model) -> ir.Model:
    """``OnnxFold`` as one pass among others; small models fold for size."""
    fold = onnx_fold.OnnxFold(objective="size")
    Sequential(CommonSubexpressionEliminationPass(), fold)(model)
    if fold.report is not None and fold.report.proof is not None:
        PROVED.append(f"{len(fold.report.proof.proved)} of {len(fold.report.folded)}")
    return model


def with_onnxruntime(model: ir.Model) -> ir.Model:
    """Fuse operators; ONNX Runtime's tool reads a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        fused = optimize_model(str(path), model_type="gpt2")
        fused.topological_sort()  # as its method for saving does
        return ir.from_proto(fused.model)


TOOLS: dict[str, Callable[[ir.Model], ir.Model]] = {
    "onnxscript": with_onnxscript,
    "onnx-fold": with_onnx_fold,
    "onnxruntime": with_onnxruntime,
}


def weights(model: ir.Model) -> int:
    """Elements of all floating-point initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(t.size for t in tensors if t is not None and t.dtype.is_floating_point())


def main() -> None:
    """Print a row for each order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny-fused")
    parser.add_argument("--exporter", choices=["dynamo", "torchscript"], default="torchscript")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        exported = ir.load(export(options.preset, path, exporter=options.exporter))
        print("| order | weights | operators | proved | same function |\n|---|---|---|---|---|")
        for count in (0, 1, 3):
            for order in itertools.permutations(TOOLS, count):
                model = exported.clone()
                PROVED.clear()
                for name in order:
                    model = TOOLS[name](model)
                verdict = "yes" if onnx_fold.verify(exported, model) else "no"
                what, proved = ", ".join(order) or "as exported", "".join(PROVED) or "-"
                sizes = f"{weights(model):,} | {len(model.graph):,}"
                print(f"| {what} | {sizes} | {proved} | {verdict} |")


if __name__ == "__main__":
    main()
