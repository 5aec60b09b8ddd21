"""What became of one stream: the ways that were weighed, the one taken, the reasons against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import onnx_ir as ir

from onnx_fold.graph.channels import Group
from onnx_fold.graph.linear import compact
from onnx_fold.rewriting.rewrite import Rewrite, stored_size
from onnx_fold.streams.branches import Branches
from onnx_fold.streams.ends import End
from onnx_fold.streams.fixed import RowLayer
from onnx_fold.streams.heads import roles
from onnx_fold.streams.joined import Divided, Joined
from onnx_fold.streams.stream import Opening, Stream


@dataclass(frozen=True)
class NormsKept:
    """What can be done with a stream that norms read while these stay.

    Attributes:
        group: The changes of basis that pass through all of it.
        text: What rotation would save and why it was not done, or what stands in the way.
    """

    group: Group
    text: str


_NOTHING: Mapping[ir.Value, NormsKept] = MappingProxyType({})


@dataclass(frozen=True)
class CandidateReport:
    """One way to fold a stream, weighed.

    Attributes:
        strategy: Name of the pass.
        text: What would be folded into what.
        weights_removed: Elements of initializers saved.
        nodes_added: Operators added, less those removed.
        reads_removed: Elements that one token reads no more: of a table it reads one row.
        condition: Condition number of the matrix that is inverted; None if none is.
        error: Predicted relative error; None if it was refused before that was known.
        error_original: What rounding alone does to the same rows in the original.
        slower_on: Where it costs more time than it saves: the provider, and ``"decode"`` or
            ``"prefill"``.
        refused: Why it was not taken; None if it could be.
    """

    strategy: str
    text: str
    weights_removed: int
    nodes_added: int
    condition: float | None = None
    error: float | None = None
    error_original: float | None = None
    slower_on: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None
    reads_removed: int = 0

    @property
    def name(self) -> str:
        """What tells it from all others of a model."""
        return f"{self.strategy} {self.text}"


Role: TypeAlias = Literal["table", "writer", "reader"]
"""What a layer is to a stream."""


@dataclass(frozen=True)
class LayerReport:
    """One layer or table of a stream: what it weighs, and what it does after the fold.

    Attributes:
        name: Its label.
        role: What it is to the stream.
        weights: Elements of its weight.
        weights_after: The same after the fold of this stream: 0 if it became the identity.
        output: Name of the value that it makes; names of layers may be equal, these are not.
    """

    name: str
    role: Role
    weights: int
    weights_after: int
    output: str


@dataclass(frozen=True)
class StreamReport:
    """One stream: who writes and reads it, and what became of it.

    Attributes:
        width: Channels of the stream.
        dtype: Its narrowest storage type.
        writers: Labels of the layers and tables that write it.
        readers: Labels of the layers that read it.
        is_closed: Whether its basis was free.
        is_foldable: Whether a fold could be asked of it: it runs from one projection to another, or
            to a norm that could be removed.
        ending: Where it ends if it does not; None for what such a place writes.
        reasons: Why it was left alone; empty if it was folded.
        candidates: All ways that were weighed.
        folded: The one that was taken.
        layers: What its tables, writers and readers weigh.
        leads_to: Labels of the layers that come next behind its readers.
        changed: Names of the values that this gave another basis, or another order of channels.
        group: The changes of basis that pass through all of it: ``"general"``, ``"orthogonal"``
            where norms read it, or ``"none"``.
        has_norms: Whether norms read or write it.
    """

    width: int
    dtype: str
    writers: list[str]
    readers: list[str]
    is_closed: bool
    is_foldable: bool = True
    ending: str | None = None
    reasons: list[str] = field(default_factory=list)
    candidates: list[CandidateReport] = field(default_factory=list)
    folded: CandidateReport | None = None
    layers: list[LayerReport] = field(default_factory=list)
    leads_to: list[str] = field(default_factory=list)
    changed: frozenset[str] = frozenset()
    group: str = "none"
    has_norms: bool = False

    @classmethod
    def of(
        cls,
        stream: Stream | Branches | Joined | Divided | RowLayer,
        kept: Mapping[ir.Value, NormsKept] = _NOTHING,
    ) -> StreamReport:
        """Describe ``stream`` before anything is done to it.

        ``kept`` says, by value that a norm reads, what can be done while the norm stays.
        """
        if isinstance(stream, Branches):
            ends = [stream.source.name or "?"], stream.labels
        elif isinstance(stream, Joined):
            ends = stream.labels, [stream.reader.label]
        elif isinstance(stream, Divided):
            ends = stream.stream.written_by, stream.behind.read_by
        elif isinstance(stream, RowLayer):
            ends = [stream.rows.source.label], stream.labels
        if not isinstance(stream, Stream):
            dtype, layers = stream.dtype.name.lower(), [*layers_of(stream)]
            group = stream.group.name.lower()
            return cls(stream.width, dtype, *ends, is_closed=True, layers=layers, group=group)
        has_norm = any(opening.is_norm for opening in stream.openings)
        is_foldable = bool(stream.written_by and (stream.readers or has_norm))
        return cls(
            width=stream.width,
            dtype=stream.dtype.name.lower(),
            writers=stream.written_by,
            readers=stream.read_by,
            is_closed=stream.is_closed,
            is_foldable=is_foldable,
            ending=_ending(stream) if stream.written_by and not is_foldable else None,
            reasons=[_reason(each, stream, kept) for each in stream.openings],
            layers=[*layers_of(stream)],
            leads_to=stream.leads_to if is_foldable else [],
            group=_group(stream, kept).name.lower(),
            has_norms=has_norm or stream.group is Group.ORTHOGONAL,
        )

    @property
    def name(self) -> str:
        """The name of its fold, empty if there is none."""
        return "" if self.folded is None else self.folded.name

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {name: value for name, value in asdict(self).items() if name != "changed"}


def layers_of(
    stream: Stream | Branches | Joined | Divided | RowLayer, rewrite: Rewrite | None = None
) -> Iterator[LayerReport]:
    """Its tables, writers and readers, in this order, and what ``rewrite`` makes of them."""
    roles: list[tuple[Role, Sequence[End]]]
    if isinstance(stream, Branches):
        yield from _layers_of_branches(stream, rewrite)
        return
    if isinstance(stream, RowLayer):
        yield from _layers_of_rows(stream, rewrite)
        return
    if isinstance(stream, Joined):
        writers = [writer for each in stream.streams for writer in each.writers]
        roles = [("writer", writers), ("reader", [stream.reader])]
    elif isinstance(stream, Divided):
        roles = [("writer", stream.stream.writers), ("reader", stream.behind.readers)]
    else:
        roles = [
            ("table", stream.tables),
            ("writer", stream.writers),
            ("reader", stream.readers),
        ]
    for role, members in roles:
        for member in members:
            before = stored_size(member.weight.tensor)
            after = before if rewrite is None else rewrite.weights_after(member)
            output = member.node.outputs[0].name or ""
            yield LayerReport(member.label, role, before, after, output)


def _layers_of_branches(branches: Branches, rewrite: Rewrite | None) -> Iterator[LayerReport]:
    """Of layers that become one, the largest holds it."""
    largest = max(branches.layers, key=lambda each: each.weight.size, default=None)
    for each in branches.layers:
        before = after = each.weight.size
        if rewrite is not None:
            after = 0 if each is not largest else rewrite.weights_in_place_of(branches.result)
        yield LayerReport(each.label, "reader", before, after, each.node.outputs[0].name or "")


def _layers_of_rows(each: RowLayer, rewrite: Rewrite | None) -> Iterator[LayerReport]:
    """Of the layers that go the last one is a table from then on."""
    for layer in each.rows.layers:
        before = after = stored_size(layer.weight.tensor)
        if rewrite is not None:
            after = rewrite.weights_in_place_of(each.rows.value) if layer is each.layer else 0
        yield LayerReport(layer.label, "reader", before, after, layer.y.name or "")


def _group(stream: Stream, kept: Mapping[ir.Value, NormsKept]) -> Group:
    if stream.is_closed:
        return stream.group
    found = [kept.get(opening.value) for opening in stream.openings]
    return min(Group.NONE if each is None else each.group for each in found)


def _ending(stream: Stream) -> str:
    if any(roles(writer.y) for writer in stream.writers):
        return "attention cores"
    if any(value.is_graph_output() for value in stream.values):
        return "graph outputs"
    return "activations"


def _reason(opening: Opening, stream: Stream, kept: Mapping[ir.Value, NormsKept]) -> str:
    if not opening.is_norm:
        return str(opening)
    before, behind = (compact(list(dict.fromkeys(names))) for names in stream.around(opening))
    place = f" between {before} and {behind}" if before and behind else ""
    found = kept.get(opening.value)
    why = "no change of basis passes through it here" if found is None else found.text
    return f"{opening}: a norm{place}; {why}"


def norms_kept(stream: Stream, report: StreamReport) -> NormsKept:
    """What ``report`` says of ``stream``, which norms read, for what is said of their inputs."""
    if not stream.is_closed:
        text = f"no change of basis passes through it here, as {stream.openings[0]}"
        return NormsKept(Group.NONE, text)
    ways = [f"{each.text} ({each.refused})" for each in report.candidates]
    return NormsKept(stream.group, f"norms kept: {'; '.join(ways or report.reasons)}")
