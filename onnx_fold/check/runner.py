"""Running two models for the parity check: as they are, in a wider type, rounded, or in NumPy.

Models run one after another, each in a session that is dropped before the next is made.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.precision import SIXTEEN_BITS, is_float
from onnx_fold.base.arguments import Provider
from onnx_fold.base.progress import Report, ignore
from onnx_fold.check import kernels
from onnx_fold.check.judge import Feed, Run
from onnx_fold.check.stored import DRAWS, StoredParity, compare_stored, with_weights_anew
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.files.load import ModelSource, weight_bytes
from onnx_fold.graph.widen import precision, widen
from onnx_fold.runtime import sessions
from onnx_fold.runtime.generate import Function, GreedyCheck
from onnx_fold.runtime.inputs import Arrays
from onnx_fold.runtime.pair import Pair
from onnx_fold.runtime.sessions import MissingKernelError, RunFailedError

__all__ = ["FoldedFailedError", "Runner", "converted", "evaluator"]

logger = logging.getLogger(__name__)

REFERENCE_LIMIT = 8 * 2**30
"""Bytes of widened weights up to which a reference is computed."""

RUN_ONCE = {"session.disable_prepacking": "1"}
"""ONNX Runtime packs a second copy of the weights, which pays off after many runs."""

STORED_LIMIT = 2**30
"""Bytes of widened weights up to which they are compared as stored."""

EVALUATOR_LIMIT = 2 * 2**30
"""The same for ``onnx.reference``, which holds every weight twice."""


class FoldedFailedError(Exception):
    """The folded model cannot run inputs that the original ran."""


@dataclass
class Runner:
    """Runs models one after another, each in a session that is dropped before the next is made.

    Attributes:
        pair: The models.
        provider: Where they run.
        emulate: Whether they run in float32 with results rounded to 16 bits; None until that turns
            out to be needed.
        notes: Gets what a reader must know.
        greedy: The text that they write, too, if that was asked.
        more: Inputs of which the first that runs is taken where the original runs no other.
        progress: Is told which model runs on which inputs.
    """

    pair: Pair
    provider: Provider
    emulate: bool | None
    notes: list[str]
    greedy: GreedyCheck | None = None
    more: Iterable[Feed] = ()
    progress: Report = ignore

    def _tell(self, which: str, feed: Feed | None = None) -> None:
        """Say which model is loaded, or runs on what."""
        self.progress(f"checking {'' if feed is None else f'{feed.label}, '}{which}", 0, 0)

    @property
    def _all(self) -> str:
        return "both models" if self.pair.module is None else "the folded model"

    def both(self, feeds: list[Feed]) -> list[Run]:
        """Run both models in the same way: as they are, emulated, or by onnx.reference."""
        pair, models = self.pair, (self.pair.before, self.pair.after)
        if self.emulate:
            return self._emulated(*models, feeds)
        try:
            return self._both(self._session, pair.original, pair.folded, feeds)
        except MissingKernelError as error:
            if self.emulate is False:
                raise
            logger.debug("no kernel: %s", error)
            self.notes.clear()
            if any(map(_has_sixteen_bits, models if pair.types else models[:1])):
                return self._emulated(*models, feeds)
            if max(map(weight_bytes, models)) > EVALUATOR_LIMIT:
                raise
            self.notes.append(f"{self._all} ran in onnx.reference: {error}")
            return self._both(evaluator, *models, feeds)

    def _emulated(self, original: ir.Model, folded: ir.Model, feeds: list[Feed]) -> list[Run]:
        self.emulate = True
        narrow = next((m for m in (original, folded) if _has_sixteen_bits(m)), None)
        if narrow is not None:
            self.notes.append(
                f"{self._all} ran in float32 with every operator's result rounded to"
                f" {precision(narrow).name}, on the {self.provider} provider"
            )
        to = ir.DataType.FLOAT
        wide = [widen(model, to, rounded=True) for model in (original, folded)]
        return self._both(self._session, wide[0], wide[1], feeds, to)

    def _session(self, model: ModelSource) -> Function:
        return _run_once(model, self.provider)

    def _both(
        self,
        engine: Callable[[Any], Function],
        original: ModelSource,
        folded: ModelSource,
        feeds: list[Feed],
        to: ir.DataType | None = None,
    ) -> list[Run]:
        """Run both models, on floats widened ``to`` the type that they expect."""
        self._tell("the original")
        function = self.pair.module or _widening(engine(original), to)
        runs = self._original(function, feeds)
        if self.greedy is not None:
            self._tell("the text that the original writes")
            self.greedy.run_original(function)
        del function  # one model at a time
        try:
            self._tell("the folded model")
            function = _converting(_widening(engine(folded), to), self.pair.types)
            for run in runs:
                self._tell("the folded model", run.feed)
                run.folded = function(run.feed.arrays)
            if self.greedy is not None:
                self._tell("the text that the folded model writes")
                self.greedy.run_folded(function)
        except (InvalidModelError, RunFailedError) as error:
            is_alike = self.pair.module is None and not self.pair.types
            if isinstance(error, MissingKernelError) and not is_alike:
                raise  # of an original that is alike it would have been raised above
            raise FoldedFailedError(str(error)) from error
        return runs

    def _original(self, function: Function, feeds: list[Feed]) -> list[Run]:
        """Run the original on ``feeds``; if it runs none of them, on the first of more it does."""
        runs: list[Run] = []
        failed: list[str] = []
        for feed in itertools.chain(feeds, self.more):
            if feed.group and feed.group in (run.feed.group for run in runs):
                continue
            if feed.group == "frozen" and runs:
                break
            self._tell("the original", feed)
            try:
                runs.append(Run(feed, function(feed.arrays)))
            except RunFailedError as error:
                if not feed.optional:
                    raise
                if not feed.group:
                    failed.append(
                        f"{feed.label} was skipped, the original does not run it: {error}"
                    )
        if not runs:
            raise UsageError(f"{failed[-1]}; pass shapes or inputs that fit the model")
        self.notes += failed
        return runs

    def reference(self, runs: list[Run]) -> None:
        """Run the original in a wider type where that can be done, else say why not."""
        to, size = _wider(self.pair.before)
        if to is None or size > REFERENCE_LIMIT:
            why = (
                "no wider type" if to is None else f"its weights would take {size / 2**30:.0f} GiB"
            )
            self.notes.append(f"no reference ({why}): the tolerance decides")
            return
        feeds = [run.feed for run in runs]
        self._tell(f"the reference in {to.name.lower()}")
        try:
            if self.pair.module is not None:
                outputs = self._run_wide(self.pair.module.widened(to), feeds, to)
            else:
                outputs = self._wide_outputs(widen(self.pair.before, to), feeds, to, size)
        except (InvalidModelError, UsageError) as error:
            logger.debug("no reference", exc_info=True)
            self.notes.append(f"no reference in {to.name} ({error}): the tolerance decides")
            return
        for run, reference in zip(runs, outputs, strict=True):
            run.reference = reference

    def rounded(self, runs: Sequence[Run]) -> None:
        """Run both with every result rounded, where a CPU has run float16 in float32."""
        is_wide = self.provider == "cpu" and self.emulate is None and self.pair.module is None
        known = [run for run in runs if run.reference is not None]
        if not (is_wide and known and _has_sixteen_bits(self.pair.before)):
            return
        again = replace(self, emulate=True, greedy=None, more=(), notes=[])
        try:
            found = {id(each.feed): each for each in again.both([run.feed for run in known])}
        except (InvalidModelError, RunFailedError, UsageError, FoldedFailedError) as error:
            logger.debug("not run with every result rounded: %s", error)
            return
        for run in known:
            run.rounded = found.get(id(run.feed))
        self.notes.append(
            "float16 runs in float32 here: errors are the larger of this and of every operator's"
            " result rounded"
        )

    def stored(self, whole: Pair, runs: Sequence[Run]) -> StoredParity | None:
        """Compare the weights as stored, where that can be done in time and in memory."""
        original, folded = whole.before, whole.after
        to, size = _wider(original)
        if to is None or precision(original) == to:
            return None
        if size > STORED_LIMIT:
            self.notes.append(
                f"weights were not compared as stored, which would take {size / 2**30:.0f} GiB"
            )
            return None

        def engine(model: ir.Model) -> Function:
            return _widening(functools.partial(sessions.run, sessions.session(model)), to)

        self._tell("the weights as stored")
        feeds = [run.feed.arrays for run in runs]
        try:
            return compare_stored(original, folded, feeds, to, precision(original), engine)
        except UsageError as error:
            self.notes.append(f"weights were not compared as stored: {error}")
        except InvalidModelError as error:
            logger.debug("weights were not compared as stored: %s", error)
        return None

    def anew(self, run: Run) -> Sequence[Arrays]:
        """The reference of ``run`` with its weights rounded anew, in some draws; none if none is.

        That takes a second copy of the weights.
        """
        to, size = _wider(self.pair.before)
        if to is None or self.pair.module is not None or size > STORED_LIMIT:
            return ()
        self._tell("the reference with its weights rounded anew", run.feed)
        for engine in self._engines(size):
            try:
                model = with_weights_anew(self.pair.before, to, engine)
                draws = (functools.partial(model, draw=draw) for draw in range(DRAWS))
                return [_widening(draw, to)(run.feed.arrays) for draw in draws]
            except (InvalidModelError, UsageError) as error:
                logger.debug("no reference with its weights rounded anew: %s", error)
        return ()

    def _wide_outputs(
        self, wide: ir.Model, feeds: list[Feed], to: ir.DataType, size: float
    ) -> list[Arrays | None]:
        *others, last = self._engines(size)
        for engine in others:
            try:
                return self._run_wide(engine(wide), feeds, to)
            except (InvalidModelError, RunFailedError) as error:
                logger.debug("no reference: %s", error)
        outputs = self._run_wide(last(wide), feeds, to)
        if last is evaluator:
            self.notes.append("the reference was computed by onnx.reference")
        return outputs

    def _engines(self, size: float) -> Iterator[Callable[[ir.Model], Function]]:
        """What may run a model whose weights take so many bytes in a wider type."""
        for provider in dict.fromkeys((self.provider, "cpu")):
            yield functools.partial(_run_once, provider=provider)
        if size <= EVALUATOR_LIMIT:
            yield evaluator

    def _run_wide(
        self, engine: Function, feeds: list[Feed], to: ir.DataType
    ) -> list[Arrays | None]:
        function = _widening(engine, to)
        outputs: list[Arrays | None] = []
        for feed in feeds:
            self._tell(f"the reference in {to.name.lower()}", feed)
            try:
                outputs.append(function(feed.arrays))
            except RunFailedError as error:
                if not feed.optional or feed is feeds[0]:
                    raise
                self.notes.append(f"no reference ({feed.label}: {error}): the tolerance decides")
                outputs.append(None)
        if self.greedy is not None:
            self.greedy.run_reference(function)
        return outputs


def _run_once(model: ModelSource, provider: Provider) -> Function:
    return functools.partial(sessions.run, sessions.session(model, provider, config=RUN_ONCE))


def _wider(model: ir.Model) -> tuple[ir.DataType | None, float]:
    """Return the type in which a reference is computed, and the bytes of the weights in it."""
    dtype = precision(model)
    to = ir.DataType.FLOAT if dtype in SIXTEEN_BITS else ir.DataType.DOUBLE
    narrow = {ir.DataType.FLOAT, *SIXTEEN_BITS}
    if dtype == to and not any(value.dtype in narrow for value in _values(model)):
        return None, 0.0
    return to, weight_bytes(model) * to.itemsize / dtype.itemsize


def _has_sixteen_bits(model: ir.Model) -> bool:
    return precision(model) in SIXTEEN_BITS or any(v.dtype in SIXTEEN_BITS for v in _values(model))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    return (v for node in model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v)


def _widening(function: Function, to: ir.DataType | None) -> Function:
    """Return ``function`` with input floats that are narrower than ``to`` converted first."""
    if to is None:
        return function
    wide, width = to.numpy(), to.itemsize
    return lambda arrays: function(
        {
            name: array.astype(wide) if is_float(array) and array.itemsize < width else array
            for name, array in arrays.items()
        }
    )


def converted(types: Mapping[str, ir.DataType], arrays: Arrays) -> Arrays:
    """``arrays`` with floats in these ``types``."""
    return {
        name: array.astype(types[name].numpy()) if name in types and is_float(array) else array
        for name, array in arrays.items()
    }


def _converting(function: Function, types: Mapping[str, ir.DataType]) -> Function:
    """Return ``function`` with floats converted to its own ``types`` first."""
    return (lambda arrays: function(converted(types, arrays))) if types else function


def evaluator(model: ir.Model) -> Function:
    """Return ``model`` as a function, computed by ``onnx.reference`` in NumPy."""
    proto = ir.to_proto(ir.external_data.load_to_model(model.clone()))
    try:
        evaluator = kernels.evaluator(proto)
    except Exception as error:
        raise InvalidModelError(f"onnx.reference cannot load it: {_short(error)}") from error

    def run(inputs: Arrays) -> Arrays:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results = kernels.run(evaluator, inputs)
            except Exception as error:  # whatever the NumPy code of an operator raises
                raise RunFailedError(f"onnx.reference cannot run it: {_short(error)}") from error
        return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))

    return run


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."
