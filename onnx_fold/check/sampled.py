"""The parity check of a model that is too large to run: some of its folded streams, cut out.

Both pieces of a stream, see :mod:`onnx_fold.engine.pieces`, are models with the same inputs and
outputs, which :func:`onnx_fold.check.parity.verify` compares on random inputs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from onnx_fold.algebra import basis
from onnx_fold.base.arguments import Provider
from onnx_fold.base.memory import available_memory
from onnx_fold.base.progress import Report, ignore
from onnx_fold.check.parity import ParityReport, verify
from onnx_fold.engine.outcome import StreamReport
from onnx_fold.engine.pieces import cut, typed
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.graph.widen import precision
from onnx_fold.runtime.environment import environment

__all__ = ["SAMPLES", "fits_in_memory", "verify_sampled"]

SAMPLES = 3
"""Streams that are checked."""


def fits_in_memory(original: ir.Model, folded: ir.Model) -> bool:
    """Whether the weights of both models, at least 4 bytes each, fit in the available memory.

    One is run after the other; but ONNX Runtime holds weights twice while it packs them, and on a
    CPU it computes 16-bit types in float32.
    """
    return sum(_runtime_bytes(model) for model in (original, folded)) <= available_memory()


def _runtime_bytes(model: ir.Model) -> int:
    tensors = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    return sum(max(t.nbytes, 4 * t.size) for t in tensors if t is not None)


def verify_sampled(
    original: ir.Model,
    folded: ir.Model,
    streams: Sequence[StreamReport],
    *,
    provider: Provider = "cpu",
    samples: int = SAMPLES,
    max_ratio: float | None = None,
    seed: int = 0,
    progress: Report = ignore,
) -> ParityReport:
    """Compare ``samples`` of the folded ``streams``, drawn at random, in ONNX Runtime.

    Args:
        original: The model before the fold.
        folded: The model after it, with all values that were not folded under their old names.
        streams: What was folded.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        samples: Number of streams to compare; those that cannot be cut out are passed over.
        max_ratio: How many times its own error a model may have, see :func:`verify`; in a stream
            alone more is seen, :data:`onnx_fold.algebra.basis.PIECE`.
        seed: Seed of the choice and of the inputs.
        progress: Is told which stream runs on which inputs.

    Returns:
        The outputs of all pieces. If no stream could be compared, ``ok`` is False.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    models = typed(original), typed(folded)
    if max_ratio is None:
        max_ratio = basis.max_ratio(precision(original))
    report = ParityReport(True, provider=provider, environment=environment(provider))
    changed = frozenset[str]().union(*(stream.changed for stream in streams))
    checked: list[StreamReport] = []
    for stream in random.Random(seed).sample(streams, len(streams)):
        if len(checked) == samples:
            break
        pieces = cut(models, stream, changed)
        what = f"stream {len(checked) + 1} of {min(samples, len(streams))}"

        def tell(text: str, done: int, total: int, what: str = what) -> None:
            progress(f"{what}: {text}", done, total)

        how = {"provider": provider, "max_ratio": basis.PIECE * max_ratio, "seed": seed}
        if pieces is not None and _compare(pieces, report, **how, progress=tell):
            checked.append(stream)
    if not checked:
        report.ok = False
        report.reason = "no folded stream could be cut out and run; verify in full, or not at all"
    report.scope = f"{len(checked)} of {len(streams)} folded streams"
    names = "; ".join(stream.folded.text for stream in checked if stream.folded)
    report.notes.append(f"what was run: {names or 'nothing'}")
    return report


def _compare(
    pieces: tuple[ir.Model, ir.Model],
    report: ParityReport,
    **how: Any,
) -> bool:
    """Add the comparison of two pieces to ``report``; return whether they could be run."""
    try:
        piece = verify(*pieces, **how)
    except (InvalidModelError, UsageError):
        return False
    report.ok &= piece.ok
    report.reason = report.reason or piece.reason
    report.provider, report.dtype = piece.provider, piece.dtype
    report.outputs += piece.outputs
    report.shapes = report.shapes or piece.shapes
    report.notes += [note for note in piece.notes if note not in report.notes]
    return True
