"""The proof of a fold: in float64, before anything is rounded, the function is the same.

The original is widened to float64; the folded model takes its folded weights as they are before
they are rounded. Both run on small random inputs, and every element of every output must agree to
1e-8 of the largest, whatever the storage type: so a wrong graph or a wrong formula cannot hide in
rounding errors. That a stored weight is the proved one, rounded to nearest, is checked on samples.

A small model runs whole, in ONNX Runtime's double kernels, or in ``onnx.reference`` where it lacks
one. Of a large one, or where that does not settle it, every folded stream is cut out of both models
(:mod:`onnx_fold.engine.pieces`) and run by
:class:`onnx_fold.check.interpreter.Interpreter`, which names the stream that is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.text import Text

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.exact import LIMIT, exact, values
from onnx_fold.algebra.expression import FoldedTensor
from onnx_fold.algebra.precision import is_float
from onnx_fold.base.progress import Report, ignore
from onnx_fold.base.tables import counted
from onnx_fold.check.feeds import frozen_feeds
from onnx_fold.check.interpreter import Interpreter
from onnx_fold.check.runner import evaluator
from onnx_fold.engine.outcome import StreamReport
from onnx_fold.engine.pieces import cut, typed
from onnx_fold.errors import InvalidModelError, OnnxFoldError, UsageError
from onnx_fold.graph.widen import widen
from onnx_fold.runtime import sessions
from onnx_fold.runtime.generate import Function
from onnx_fold.runtime.inputs import Arrays, make_inputs
from onnx_fold.runtime.sessions import MissingKernelError, RunFailedError

__all__ = ["Proof", "prove"]

logger = logging.getLogger(__name__)

WHOLE = 2**26
"""Elements of weights up to which a model is run whole."""

_SIZES = ((2, 3, 4), (1, 1, 2), (1, 8, 0), (2, 16, 0))
"""Batch, new tokens and past of the inputs that are tried, until two of them ran."""


@dataclass(frozen=True)
class Proof:
    """Which folds were proved.

    Attributes:
        proved: The folds that were proved, by their names (:attr:`CandidateReport.name`).
        failed: Folds that compute another function, and how far off they are.
        unproved: Folds that could not be run in float64, and why.
        error: The largest difference of the proved ones, as a part of the largest element.
        scope: ``"whole model"``, or ``"each stream"``.
        differs: How the whole model differs, if it does and no fold could be blamed.
    """

    proved: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unproved: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    scope: str = "whole model"
    differs: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**asdict(self), "limit": LIMIT}

    def __rich__(self) -> Text:
        """One line, and one for each fold that is not proved."""
        count = counted(len(self.proved) + len(self.unproved), "fold")
        text = Text(f"Proved in float64: {len(self.proved)} of {count}")
        if self.proved:
            text.append(f", {self.scope}, equal to {self.error:.0e} (limit {LIMIT:.0e})")
        for fold, reason in self.unproved.items():
            text.append(f"\n- not proved: {fold}: {reason}", "dim")
        return text


def prove(
    original: ir.Model,
    folded: ir.Model,
    streams: Sequence[StreamReport],
    progress: Report = ignore,
) -> Proof:
    """Prove the folds of ``streams``.

    Args:
        original: The model before the fold, functions inlined as in ``folded``.
        folded: The model after it, with folded weights not evaluated yet.
        streams: What was folded.
        progress: Is told what is being proved.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    if _size(original) > WHOLE:
        return _prove_streams(original, folded, streams, progress)
    progress("proving: the whole model", 0, 0)
    try:
        error = _compare_whole(original, folded)
    except (_CannotRunError, MemoryError) as reason:
        logger.debug("not proved whole: %s", reason)
        return _prove_streams(original, folded, streams, progress)
    except _DiffersError as reason:
        logger.debug("differs as a whole: %s", reason)
        proof = _prove_streams(original, folded, streams, progress)
        is_settled = proof.failed or not proof.unproved
        return proof if is_settled else replace(proof, differs=str(reason))
    return Proof([stream.name for stream in streams], error=error)


def _size(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None)


class _CannotRunError(Exception):
    """The original does not run in float64."""


class _DiffersError(Exception):
    """The folded model computes something else."""


def _compare_whole(original: ir.Model, folded: ir.Model) -> float:
    """The largest difference of two models; the same engine runs both."""
    try:
        wide = widen(original, ir.DataType.DOUBLE)
        try:
            pairs = _ran(_in_onnxruntime(wide), wide)
            engine = _in_onnxruntime
        except MissingKernelError:
            pairs = _ran(evaluator(wide), wide)
            engine = evaluator
    except (InvalidModelError, UsageError) as error:
        raise _CannotRunError(str(error)) from error
    try:
        after = engine(_unrounded(folded))
        return max(_difference(before, after(feed)) for feed, before in pairs)
    except (InvalidModelError, RunFailedError) as error:
        raise _DiffersError(f"it does not run: {error}") from error


def _in_onnxruntime(model: ir.Model) -> Function:
    return functools.partial(sessions.run, sessions.session(model, "cpu", optimize=False))


def _ran(function: Function, model: ir.Model, enough: int = 2) -> list[tuple[Arrays, Arrays]]:
    """Inputs that ``model`` runs, and its outputs; of sizes that it holds, if it runs no others."""
    pairs: list[tuple[Arrays, Arrays]] = []
    failure: OnnxFoldError | None = None
    for seed, (batch, seq, past) in enumerate(_SIZES):
        try:
            feed = make_inputs(model, batch=batch, seq=seq, past=past, seed=seed)
            pairs.append((feed, function(feed)))
        except UsageError as error:
            failure = error
        if len(pairs) == enough:
            break
    for each in () if pairs else frozen_feeds(model, seed=0):
        with contextlib.suppress(UsageError):
            return [(each.arrays, function(each.arrays))]
    if not pairs and failure is not None:
        raise failure
    return pairs


def _unrounded(model: ir.Model) -> ir.Model:
    """A copy in float64 with folded weights as they are before they are rounded."""
    copy = model.clone()
    evaluated: dict[int, ir.TensorProtocol] = {}
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, FoldedTensor):
                if id(tensor) not in evaluated:
                    wide = values(exact(tensor.expression))
                    evaluated[id(tensor)] = ir.tensor(np.ascontiguousarray(wide))
                value.const_value = evaluated[id(tensor)]
    return widen(copy, ir.DataType.DOUBLE)


def _difference(before: Arrays, after: Arrays) -> float:
    """The largest difference of all outputs.

    Raises:
        _DiffersError: It is over the limit, or they differ in something else than numbers.
        _CannotRunError: There is nothing to compare with.
    """
    largest = 0.0
    for name, a in before.items():
        b = after.get(name)
        if b is None or a.shape != b.shape:
            shape = "missing" if b is None else f"of shape {list(b.shape)}"
            raise _DiffersError(f"output '{name}' of shape {list(a.shape)} is {shape}")
        if not is_float(a):
            if not np.array_equal(a, b):
                raise _DiffersError(f"output '{name}' has other values")
            continue
        finite = np.isfinite(a)
        if a.size and not finite.any():
            raise _CannotRunError(f"output '{name}' is not finite")
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            raise _DiffersError(f"output '{name}' is NaN or infinite at other places")
        error = _relative(a[finite], b[finite])
        if not error <= LIMIT:
            raise _DiffersError(f"output '{name}' is {error:.1e} off (limit {LIMIT:.0e})")
        largest = max(largest, error)
    return largest


def _relative(a: Array, b: Array) -> float:
    scale = float(np.abs(a).max(initial=0.0))
    with np.errstate(invalid="ignore"):
        error = float(np.abs(a - b).max(initial=0.0))
    return error / scale if scale else error


# --- Stream by stream ----------------------------------------------------------------------------


def _prove_streams(
    original: ir.Model, folded: ir.Model, streams: Sequence[StreamReport], progress: Report
) -> Proof:
    models = typed(original), typed(folded)
    changed = frozenset[str]().union(*(stream.changed for stream in streams))
    proof = Proof(scope="each stream")
    largest = 0.0
    interpreter = Interpreter()
    for number, stream in enumerate(streams, 1):
        progress(f"proving: stream {number} of {len(streams)}", 0, 0)
        try:
            error = _compare_pieces(interpreter, models, stream, changed)
            largest = max(largest, error)
            proof.proved.append(stream.name)
        except _CannotRunError as reason:
            proof.unproved[stream.name] = str(reason)
        except _DiffersError as reason:
            proof.failed[stream.name] = str(reason)
        except MemoryError:
            proof.unproved[stream.name] = "it does not fit in memory"
    return replace(proof, error=largest)


def _compare_pieces(
    interpreter: Interpreter,
    models: tuple[ir.Model, ir.Model],
    stream: StreamReport,
    changed: frozenset[str],
) -> float:
    pieces = cut(models, stream, changed)
    if pieces is None:
        raise _CannotRunError("it cannot be cut out of the model")
    before, after = pieces
    try:
        pairs = _ran(functools.partial(interpreter.run, before), before, enough=1)
    except UsageError as error:
        raise _CannotRunError(str(error)) from error
    try:
        return max(_difference(known, interpreter.run(after, feed)) for feed, known in pairs)
    except RunFailedError as error:
        raise _DiffersError(f"it does not run: {error}") from error
