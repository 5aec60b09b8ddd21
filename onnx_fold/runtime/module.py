"""A PyTorch module as a function of named arrays: what an exported model is compared with."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.errors import UsageError, sentence
from onnx_fold.runtime.inputs import Arrays, given_inputs, model_inputs
from onnx_fold.runtime.sessions import RunFailedError

if TYPE_CHECKING:
    import torch

__all__ = ["ModuleFunction", "evaluating", "is_module"]


def is_module(source: object) -> bool:
    """Whether ``source`` is a ``torch.nn.Module``; torch is not imported for it."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put ``module`` and its parts in evaluation mode meanwhile."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass(frozen=True)
class ModuleFunction:
    """Runs a module on arrays that have the names of a model's inputs and outputs.

    Attributes:
        module: The module.
        leaves: What its arguments hold, in the order of ``torch.utils._pytree``: tensors stand for
            an input each, all else is handed over as it is.
        spec: How arguments are put together from that.
        names: The input that each leaf is, None if it is none.
        outputs: Names of what it returns, in order.
        dtype: The type that it computes in, if not its own.
    """

    module: torch.nn.Module
    leaves: Sequence[Any]
    spec: Any = field(repr=False)
    names: Sequence[str | None]
    outputs: Sequence[str]
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any] | None, model: ir.Model
    ) -> ModuleFunction:
        """Return ``module``, called like ``args`` and ``kwargs``, with the names of ``model``.

        Keyword arguments that are called like an input are that input; other tensors are the
        remaining inputs, in their order.

        Raises:
            UsageError: There are more or fewer tensors than inputs.
        """
        import torch
        from torch.utils import _pytree as pytree

        args = args if isinstance(args, tuple) else (args,)
        inputs = [str(value.name) for value in model_inputs(model)]
        found, spec = pytree.tree_flatten_with_path((args, dict(kwargs or {})))
        own = [path[1].key for path, _ in found if len(path) == 2 and hasattr(path[1], "key")]
        rest = iter([name for name in inputs if name not in own])
        names: list[str | None] = []
        for path, leaf in found:
            named = path[1].key if len(path) == 2 and hasattr(path[1], "key") else None
            if not isinstance(leaf, torch.Tensor):
                names.append(None)
            else:
                names.append(named if named in inputs else next(rest, ""))
        given = [name for name in names if name is not None]
        if sorted(given) != sorted(inputs):
            raise UsageError(
                f"the arguments hold {len(given)} tensors, but the model has {len(inputs)} inputs"
                f" ({', '.join(inputs)})"
            )
        outputs = [str(value.name) for value in model.graph.outputs]
        return cls(module, [leaf for _, leaf in found], spec, names, outputs)

    def arrays(self, model: ir.Model) -> Arrays:
        """Return the tensors among the arguments by their names, in the types ``model`` takes."""
        pairs = zip(self.names, self.leaves, strict=True)
        held = {name: _to_array(leaf) for name, leaf in pairs if name is not None}
        return given_inputs(model, held)

    def widened(self, dtype: ir.DataType) -> ModuleFunction:
        """Return the same in a wider type, on a copy of the module.

        Raises:
            UsageError: The module cannot be copied.
        """
        import torch

        wide: torch.dtype = getattr(torch, dtype.numpy().name)
        try:
            module = copy.deepcopy(self.module).to(wide)
        except Exception as error:
            raise UsageError(f"the module cannot be copied: {sentence(error)}") from error
        return replace(self, module=module, dtype=wide)

    def __call__(self, arrays: Arrays) -> Arrays:
        """Run the module, in evaluation mode and without gradients.

        Raises:
            RunFailedError: It raises, or returns something else than the outputs of the model.
        """
        import torch
        from torch.utils import _pytree as pytree

        leaves = [
            leaf if name is None else self._to_tensor(arrays[name], leaf)
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        try:
            with evaluating(self.module), torch.no_grad(), _default_dtype(self.dtype):
                returned = self.module(*args, **kwargs)
        except Exception as error:  # whatever the module's code raises
            raise RunFailedError(f"the module cannot run it: {sentence(error)}") from error
        results = [each for each in pytree.tree_leaves(returned) if isinstance(each, torch.Tensor)]
        if len(results) != len(self.outputs):
            raise RunFailedError(
                f"the module returns {len(results)} tensors, but the model has"
                f" {len(self.outputs)} outputs ({', '.join(self.outputs)})"
            )
        return dict(zip(self.outputs, map(_to_array, results), strict=True))

    def _to_tensor(self, array: Array, like: torch.Tensor) -> torch.Tensor:
        """Return ``array`` as a tensor of the type and on the device of ``like``, or wider."""
        import torch

        array = np.ascontiguousarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array.copy())
        wide = like.dtype.is_floating_point and self.dtype is not None
        return tensor.to(like.device, self.dtype if wide else like.dtype)


def _to_array(tensor: torch.Tensor) -> Array:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = tensor.resolve_conj().resolve_neg().numpy()
    return array


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Let what the module makes anew be of this type too."""
    import torch

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or usual)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
