"""What a caller may call the parts of a model that are to stay as they are.

That is the name of an initializer, a node, a value or a layer, the latter as reports call it
(``layers.0.attn.q_proj``), or a pattern of such names, as a shell has them: ``*`` is any text, so
that ``layers.0.*`` is all of the module ``layers.0``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import onnx_ir as ir

from onnx_fold.base.arguments import nearest
from onnx_fold.errors import UsageError
from onnx_fold.graph.constants import constant
from onnx_fold.graph.inline import inline
from onnx_fold.graph.linear import label

__all__ = ["known_names", "matching", "protected_names", "refuse_unknown"]


def known_names(model: ir.Model) -> set[str]:
    """What can be protected, also in functions that hide a stream."""
    return _names(model.graph) | _names(inline(model).graph)


def _names(graph: ir.Graph) -> set[str]:
    found: set[str | None] = {*graph.initializers}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        weights = (constant(value) for value in inputs)
        found |= {value.name for value in (*inputs, *node.outputs)} | {node.name, label(node)}
        found |= {label(node, weight) for weight in weights if weight is not None}
    return {name for name in found if name}


def matching(pattern: str, known: Collection[str]) -> set[str]:
    """The names that ``pattern`` means: the one that is spelled so, else those that it matches."""
    if pattern in known:
        return {pattern}
    return {name for name in known if fnmatchcase(name, pattern)}


def protected_names(patterns: Iterable[str], model: ir.Model) -> frozenset[str]:
    """All names in ``model`` that ``patterns`` mean.

    Raises:
        UsageError: One means nothing; the message names what is spelled most like it.
    """
    wanted = tuple(patterns)
    known = known_names(model) if wanted else set()
    refuse_unknown(wanted, known, "the model")
    return frozenset[str]().union(*(matching(each, known) for each in wanted))


def refuse_unknown(patterns: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse the first of ``patterns`` that means none of the ``known`` names.

    Raises:
        UsageError: There is one.
    """
    for pattern in sorted(patterns):
        if matching(pattern, known):
            continue
        if any(name.startswith(f"{pattern}.") for name in known):
            raise UsageError(
                f"nothing in {where} is called '{pattern}'; all of that module is '{pattern}.*'"
            )
        near = _nearest_module(pattern, known) or nearest(pattern, known)
        raise UsageError(f"nothing in {where} is called '{pattern}'{near}")


def _nearest_module(pattern: str, known: Collection[str]) -> str:
    """The end of the message, where all of a module was meant: the one that is spelled most so."""
    if not pattern.endswith(".*"):
        return ""
    parts = [name.split(".") for name in known]
    depth = pattern.removesuffix(".*").count(".") + 1
    modules = {".".join(part[:depth]) for part in parts if len(part) > depth}
    return nearest(pattern, {f"{module}.*" for module in modules})
