"""Two models that are to be compared: read, with the same names, and inner values as outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from onnx_fold.algebra.precision import FRACTION_BITS
from onnx_fold.errors import UsageError
from onnx_fold.files.load import ModelSource, load
from onnx_fold.graph.widen import precision
from onnx_fold.runtime.align import decided, picked, renamed, squashed, with_outputs
from onnx_fold.runtime.module import ModuleFunction, is_module
from onnx_fold.runtime.sessions import fits_message

__all__ = ["Pair", "signature_difference"]


@dataclass(frozen=True)
class Pair:
    """Two models that are to be compared.

    Attributes:
        original: What the original runs from: a file, a model, or a module.
        folded: The same of the other one.
        before: The original; the folded model, where the original is a module.
        after: The folded model, with the original's names.
        module: The module that stands for the original, as a function.
        types: The float types of the folded model's inputs, where they are not the original's.
        inner: Inner values that are compared, and so outputs of ``before`` and ``after``.
        squashed: Outputs of which all comes from Sigmoids.
        picked: Outputs whose elements are picked, or put in order, by numbers.
    """

    original: Any
    folded: ModelSource
    before: ir.Model
    after: ir.Model
    module: ModuleFunction | None = None
    types: Mapping[str, ir.DataType] = field(default_factory=dict)
    inner: frozenset[str] = frozenset()
    squashed: frozenset[str] = frozenset()
    picked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, original: Any, folded: ModelSource, args: Any, kwargs: Any) -> Pair:
        """Read both.

        Raises:
            UsageError: There are arguments without a module, or a module without arguments.
        """
        if not is_module(original):
            if args is not None or kwargs is not None:
                raise UsageError("args and kwargs are for a torch.nn.Module; pass inputs")
            return cls(original, folded, load(original), load(folded))
        if args is None and kwargs is None:
            raise UsageError("a module needs args or kwargs: what it is called with")
        model = load(folded)
        module = ModuleFunction.of(original, () if args is None else args, kwargs, model)
        return cls(original, folded, model, model, module)

    def renamed(self, names: Mapping[str, str]) -> Pair:
        """With the original's names of these values in both."""
        if not names:
            return self
        after = renamed(self.before, self.after, names)
        return replace(self, folded=after, after=after)

    def comparing(self, names: Iterable[str]) -> Pair:
        """With inner values as outputs, too."""
        inner = frozenset(names) - {str(value.name) for value in self.before.graph.outputs}
        if not inner:
            return self
        a, b = with_outputs((self.before, self.after), inner)
        return replace(self, original=a, folded=b, before=a, after=b, inner=inner)

    def opened(self) -> Pair:
        """With what is behind outputs that hide it as outputs, too.

        A Sigmoid is rounded as 1 is, however small its result; and where it is close to 0 or 1
        nothing tells two models apart but what it reads. An integer or a boolean tells nothing of
        the floats by which it was decided, nor do elements that are picked by their numbers; of
        large models, which would have to be written anew for it, these floats are not looked at.
        """
        found, is_small = squashed(self.before), fits_message(self.before)
        theirs = {value.name for node in self.after.graph for value in node.outputs}
        deciding, picks = (find(self.before) if is_small else set() for find in (decided, picked))
        read = deciding.union(*found.values()) & theirs
        opened = self.comparing({*self.inner, *read})
        return replace(opened, squashed=frozenset(found), picked=frozenset(picks))

    def difference(self, *, any_float: bool = False) -> str:
        """The first difference of the two signatures in words, or an empty string."""
        return signature_difference(self.before, self.after, any_float=any_float)

    def of_any_float(self) -> Pair:
        """With the float types of the folded model's inputs, where they are not the original's."""
        return replace(self, types=_other_floats(self.before, self.after))


def _other_floats(before: ir.Model, after: ir.Model) -> dict[str, ir.DataType]:
    """The float types of the inputs of ``after`` by name; empty if all types are as in ``before``.

    Those of the weights, too: a model may have been converted but for its inputs and outputs.
    """
    ends = [[*model.graph.inputs, *model.graph.outputs] for model in (before, after)]
    same = all(None in (a.dtype, b.dtype) or a.dtype == b.dtype for a, b in zip(*ends, strict=True))
    if same and precision(before) == precision(after):
        return {}
    return {str(value.name): value.dtype or precision(after) for value in after.graph.inputs}


def signature_difference(before: ir.Model, after: ir.Model, *, any_float: bool = False) -> str:
    """Return the first difference of the two signatures in words, or an empty string.

    With ``any_float`` all float types are one.
    """
    ends = (
        ("inputs", before.graph.inputs, after.graph.inputs),
        ("outputs", before.graph.outputs, after.graph.outputs),
    )
    for kind, old, new in ends:
        names = [value.name for value in old], [value.name for value in new]
        if names[0] != names[1]:
            return f"the {kind} differ: {_listed(names[0])} became {_listed(names[1])}"
        for x, y in zip(old, new, strict=True):
            if any_float and {x.dtype, y.dtype} <= FRACTION_BITS.keys():
                pass
            elif _described(x) != _described(y) and None not in (_described(x), _described(y)):
                return f"{kind[:-1]} '{x.name}' was {_described(x)} and became {_described(y)}"
            if x.shape is not None and y.shape is not None and not _shapes_agree(x.shape, y.shape):
                return f"{kind[:-1]} '{x.name}' was {x.shape} and became {y.shape}"
    return ""


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(str(name) for name in names) or "none"


def _described(value: ir.Value) -> str | None:
    return None if value.type is None else str(value.type)


def _shapes_agree(x: ir.Shape, y: ir.Shape) -> bool:
    """Whether the ranks are equal, and all sizes that both shapes fix."""
    return len(x) == len(y) and all(
        a == b for a, b in zip(x, y, strict=True) if isinstance(a, int) and isinstance(b, int)
    )
