"""What is timed: a session run on values that lie on its device already.

:class:`Fixed` runs the same inputs again and again. :class:`Decode` is a loop: each step takes one
more token, and the keys and values that the step before it left on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fold.runtime import sessions
from onnx_fold.runtime.inputs import IMAGE, Ranges, cache_inputs, input_shapes, make_inputs
from onnx_fold.runtime.sessions import RunFailedError

__all__ = ["Decode", "Fixed", "Step", "Values", "cache_values", "step_values"]

Values: TypeAlias = Mapping[str, Any]
"""``onnxruntime.OrtValue`` by the name of an input."""

_GRAPH_IDS = itertools.count(1)


class Step(Protocol):
    """Something to time: ``run`` is timed, the others are not."""

    def reset(self) -> None:
        """Start again."""

    def prepare(self) -> None:
        """Get ready for the next run."""

    def run(self) -> None:
        """Run once, and wait for the end.

        Raises:
            RunFailedError: ONNX Runtime cannot run the model on these values.
        """


class Fixed:
    """A session that runs the same values each time, with CUDA graphs if asked for.

    Raises:
        RunFailedError: ONNX Runtime cannot run the model on these values.
    """

    def __init__(self, session: Any, values: Values, provider: str, *, cuda_graph: bool) -> None:
        self._session, self._options = session, sessions.onnxruntime().RunOptions()
        self._binding = _bound(session, values, provider)
        if cuda_graph:
            self._options.add_run_config_entry("gpu_graph_id", "-1")
        self.run()
        if cuda_graph:
            # A graph holds the addresses it was captured with: one id a step, results in place.
            outputs = session.get_outputs()
            for output, value in zip(outputs, self._binding.get_outputs(), strict=True):
                self._binding.bind_ortvalue_output(output.name, value)
            self._options = sessions.onnxruntime().RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(next(_GRAPH_IDS)))

    def reset(self) -> None:
        """Nothing: every run is the first."""

    def prepare(self) -> None:
        """Nothing: the values are bound."""

    def run(self) -> None:
        """Run once, and wait for the end."""
        _run(self._session, self._binding, self._options)


class Decode:
    """A session that decodes: the keys and values of one step are the cache of the next.

    Args:
        session: The session.
        cache: The cache that it starts from.
        steps: The other inputs of each step.
        links: Which output becomes which cache input.
        provider: Where the session runs, and where the cache stays.

    Raises:
        RunFailedError: ONNX Runtime cannot run the model on these values.
    """

    def __init__(
        self,
        session: Any,
        cache: Values,
        steps: Sequence[Values],
        links: Mapping[str, str],
        provider: str,
    ) -> None:
        self._session, self._start, self._steps, self._links = session, cache, steps, links
        self._provider = provider
        self._names = [output.name for output in session.get_outputs()]
        self.reset()
        self.prepare()
        self.run()
        self.reset()

    def reset(self) -> None:
        """Go back to the first token."""
        self._position, self._cache, self._binding = 0, dict(self._start), None

    def prepare(self) -> None:
        """Hand over what the last step left, and the token of the next one."""
        if self._binding is not None:
            outputs = dict(zip(self._names, self._binding.get_outputs(), strict=True))
            self._cache |= {past: outputs[present] for past, present in self._links.items()}
        values = {**self._cache, **self._steps[self._position]}
        self._binding = _bound(self._session, values, self._provider)
        self._position += 1

    def run(self) -> None:
        """Run one step, and wait for its end."""
        _run(self._session, self._binding, None)


def _bound(session: Any, values: Values, provider: str) -> Any:
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, provider)
    return binding


def _run(session: Any, binding: Any, options: Any) -> None:
    try:
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
    except Exception as error:
        text = sessions.one_line(error)
        raise RunFailedError(f"ONNX Runtime cannot run the model: {text}") from error


def cache_values(
    model: ir.Model, batch: int, past: int, provider: str, seed: int
) -> dict[str, Any]:
    """Return a standard normal cache on the device; tensors of one shape are one tensor.

    ``past`` keys of 32 layers are large, and what they hold makes no difference to the time.
    """
    rng = np.random.default_rng(seed)
    shapes = input_shapes(model, batch=batch, seq=1, past=past)
    names = cache_inputs(model)
    drawn: dict[tuple[object, ...], Any] = {}
    values = {}
    for value in model.graph.inputs:
        if value.name in names and value.dtype is not None:
            shape = shapes[value.name]
            if (shape, value.dtype) not in drawn:
                array = rng.standard_normal(shape, np.float32).astype(value.dtype.numpy())
                drawn[shape, value.dtype] = sessions.to_ort_value(array, provider)
            values[value.name] = drawn[shape, value.dtype]
    return values


def step_values(
    model: ir.Model,
    shape: tuple[int, int, int],
    provider: str,
    seed: int,
    image: int = IMAGE,
    ranges: Ranges | None = None,
) -> dict[str, Any]:
    """Return the inputs beside the cache on the device, for a batch, new tokens and past."""
    batch, seq, past = shape
    sizes: dict[str, Any] = {"batch": batch, "seq": seq, "past": past, "image": image}
    arrays = make_inputs(model, **sizes, seed=seed, without=cache_inputs(model), ranges=ranges)
    return {name: sessions.to_ort_value(array, provider) for name, array in arrays.items()}
