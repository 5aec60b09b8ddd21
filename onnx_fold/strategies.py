"""Which passes run: the built-in ones by name, and a caller's own."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from copy import copy
from typing import TypeAlias

from onnx_fold.engine.candidate import Options
from onnx_fold.engine.folding import FoldPass
from onnx_fold.errors import UsageError, sentence
from onnx_fold.passes import PASSES

__all__ = ["OwnPass", "passes_of"]

OwnPass: TypeAlias = type[FoldPass] | FoldPass | str
"""A pass of the caller: a class, an instance, or ``"module:Class"``."""


def passes_of(
    options: Options,
    strategy: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    own: Iterable[OwnPass] = (),
) -> list[FoldPass]:
    """The passes that run, each with ``options``.

    Args:
        options: What the caller asked of every pass.
        strategy: The one pass to keep of those that change a basis.
        only: Names of the passes to run; empty for all.
        skip: Names of passes not to run.
        own: Passes beside the built-in ones. They propose after these, and are called by their
            names in ``strategy``, ``only`` and ``skip``.

    Raises:
        UsageError: A pass is not known, or two have one name.
    """
    known: list[FoldPass] = [each(options) for each in PASSES]
    known += [_with_options(_found(each), options) for each in own]
    names = [each.name for each in known]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two passes are called '{twice[0]}'")
    for name in (*only, *skip, strategy):
        if name is not None and name not in names:
            raise UsageError(f"unknown pass '{name}'; there are {', '.join(names)}")
    return [
        each
        for each in known
        if (not only or each.name in only)
        and each.name not in skip
        and (strategy in (None, each.name) or not each.is_basis_change)
    ]


def _with_options(own: type[FoldPass] | FoldPass, options: Options) -> FoldPass:
    if isinstance(own, type):
        return own(options)
    made = copy(own)
    made.options = options
    return made


def _found(own: OwnPass) -> type[FoldPass] | FoldPass:
    """A pass of the caller, checked.

    Raises:
        UsageError: It is not a pass, or cannot be imported.
    """
    found: object = own
    if isinstance(own, str):
        module, _, name = own.partition(":")
        if not module or not name:
            raise UsageError(f"'{own}' is not like module:Class")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"cannot import the pass '{own}': {sentence(error)}") from error
    kind = found if isinstance(found, type) else type(found)
    if not issubclass(kind, FoldPass) or not isinstance(getattr(kind, "name", None), str):
        raise UsageError(f"{own!r} is not a FoldPass with a name")
    return found  # type: ignore[return-value]
