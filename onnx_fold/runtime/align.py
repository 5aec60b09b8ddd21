"""Two models that are to be compared: the same names in both, and inner values as outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_fold.algebra.precision import FRACTION_BITS
from onnx_fold.base.arguments import nearest
from onnx_fold.errors import UsageError
from onnx_fold.graph.constants import constant
from onnx_fold.graph.linear import label
from onnx_fold.graph.operators import operator

__all__ = ["decided", "picked", "renamed", "squashed", "with_outputs"]

ORIGINAL, FOLDED = "the original", "the folded model"


def renamed(original: ir.Model, folded: ir.Model, names: Mapping[str, str]) -> ir.Model:
    """Return a copy of ``folded`` whose values have the names that ``original`` gives them.

    Args:
        original: The model that the names are taken from.
        folded: The other model. Inner values of it that have such a name already get another one.
        names: Inputs, outputs and inner values of ``original``, and what ``folded`` calls them.

    Raises:
        UsageError: Nothing is called so, two names are one, or an input or output of ``folded`` has
            a name that is needed.
    """
    for known, which, wanted in (
        (_named(original), ORIGINAL, names.keys()),
        (_named(folded), FOLDED, names.values()),
    ):
        for name in wanted:
            if name not in known:
                raise UsageError(f"{which} has no value '{name}'{nearest(name, known)}")
    new = {theirs: ours for ours, theirs in names.items()}
    if len(new) < len(names):
        raise UsageError("two values cannot be mapped to one")
    copy = folded.clone()
    values = [*_values(copy)]
    ends = {value.name for value in (*copy.graph.inputs, *copy.graph.outputs)}
    taken = {value.name for value in values} | {*new.values()}
    changes: list[tuple[ir.Value, str]] = []
    for value in values:
        name = str(value.name)
        if name in new:
            changes.append((value, new[name]))
        elif name in names:
            if name in ends:
                raise UsageError(f"{FOLDED} has an own '{name}': map what it is, too")
            free = (f"{name}/{number}" for number in itertools.count(1))
            changes.append((value, next(each for each in free if each not in taken)))
            taken.add(changes[-1][1])
    for number, (value, _) in enumerate(changes):  # so that two names can change places
        value.name = f"onnx-fold/{number}"
    for value, name in changes:
        value.name = name
    return copy


def with_outputs(models: Sequence[ir.Model], names: Iterable[str]) -> list[ir.Model]:
    """Return copies of the original and the folded model with inner values as outputs.

    They come before the outputs, in the order in which the original computes them. Where the types
    of values are missing they are inferred.

    Args:
        models: The original and the folded model; they are not changed.
        names: Values of the main graphs that a node of each makes. Those that are outputs of either
            stay where they are.

    Raises:
        UsageError: One of the models has no such value.
    """
    wanted = set(names)
    for model, which in zip(models, (ORIGINAL, FOLDED), strict=True):
        inner = _made(model)
        for name in sorted(wanted - inner.keys()):
            advice = _made_by_layer(name, model) or nearest(name, inner)
            raise UsageError(f"{which} has no inner value '{name}'{advice}")
    ends = {value.name for model in models for value in model.graph.outputs}
    order = [name for name in _made(models[0]) if name in wanted - ends]
    copies = []
    for model in models:
        copy = model.clone()
        made = _made(copy)
        if any(made[name].type is None for name in order):
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(copy)
        copy.graph.outputs[:0] = [made[name] for name in order]
        copies.append(copy)
    return copies


_LAYOUTS = frozenset(
    {"Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
"""Operators that put what they read first elsewhere."""


def squashed(model: ir.Model) -> dict[str, set[str]]:
    """Return the outputs of which all comes from Sigmoids, and the values that these read."""
    found = {}
    for output in model.graph.outputs:
        sources = _squashed(output)
        if output.name and sources:
            found[output.name] = {str(value.name) for value in sources}
    return found


def _squashed(output: ir.Value) -> set[ir.Value]:
    """The values from which Sigmoids make all of ``output``; none if something else does."""
    sources, seen, todo = set[ir.Value](), set[ir.Value](), [output]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None or node.inputs[:1] in ((), (None,)):
            return set()
        kind = operator(node)
        read = [each for each in node.inputs if each is not None]
        if kind == "Sigmoid":
            sources.update(read)
        elif kind == "Concat":
            todo += read
        elif kind in _LAYOUTS:
            todo.append(read[0])
        else:
            return set()
    return {value for value in sources if value.producer() is not None}


_SIZES = frozenset({"Shape", "Size"})

_PICKS = frozenset({"Compress", "NonMaxSuppression", "NonZero", "TopK", "Unique"})
"""Operators that pick elements by their numbers, or put them in the order of these."""


def picked(model: ir.Model) -> set[str]:
    """Return the outputs whose elements are picked, or put in order, by numbers."""
    values = {output for node in model.graph if operator(node) in _PICKS for output in node.outputs}
    todo = list(values)
    while todo:
        read = {output for node, _ in todo.pop().uses() for output in node.outputs} - values
        values |= read
        todo += read
    return {str(value.name) for value in model.graph.outputs if value in values}


def decided(model: ir.Model) -> set[str]:
    """Return the floats, made by a node, that decide something.

    That is what elements are picked, and what outputs are that are no floats.
    """
    is_picking = any(operator(node) in _PICKS for node in model.graph)
    is_exact = any(value.dtype not in (None, *FRACTION_BITS) for value in model.graph.outputs)
    if not is_picking and not is_exact:
        return set()
    copy = model.clone()
    if any(value.dtype is None for value in _made(copy).values()):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(copy)
    todo = [value for value in copy.graph.outputs if value.dtype not in FRACTION_BITS]
    todo += [node.outputs[0] for node in copy.graph if operator(node) in _PICKS]
    sources, seen = set[str](), set[ir.Value]()
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or value in seen or operator(node) in _SIZES:
            continue
        seen.add(value)
        read = [each for each in node.inputs if each is not None and each.producer() is not None]
        sources.update(str(each.name) for each in read if each.dtype in FRACTION_BITS)
        todo += [each for each in read if each.dtype not in FRACTION_BITS]
    return sources


def _made(model: ir.Model) -> dict[str, ir.Value]:
    """What the nodes of the main graph make, by name, in their order."""
    made = (value for node in model.graph for value in node.outputs)
    return {value.name: value for value in made if value.name}


def _made_by_layer(name: str, model: ir.Model) -> str:
    """The end of the message, where ``name`` is that of a layer in reports."""
    for node in model.graph:
        weights = [constant(value) for value in node.inputs if value is not None]
        if name in {label(node), *(label(node, each) for each in weights if each is not None)}:
            return f"; the layer of that name makes '{node.outputs[0].name}'"
    return ""


def _named(model: ir.Model) -> set[str]:
    """Names of inputs, outputs and inner values of the main graph."""
    ends = (value.name for value in (*model.graph.inputs, *model.graph.outputs))
    return {*_made(model), *(name for name in ends if name)}


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """All values that have a name, each once, those of the bodies of control flow among them."""
    found: dict[ir.Value, None] = {}
    for graph in model.graphs():
        found |= dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    for node in model.graph.all_nodes():
        found |= dict.fromkeys(node.outputs)
    return (value for value in found if value.name)
