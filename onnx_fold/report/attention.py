"""The attention layers of a model, for people: their projections, their heads, their kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from onnx_fold.graph.linear import compact
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.fused import Part, fused
from onnx_fold.streams.heads import HeadLayout, attention_kind, head_layout, role
from onnx_fold.streams.stream import Stream


@dataclass
class Attention:
    """The projections of one attention layer and how its heads lie.

    Attributes:
        projections: Labels of the layers that make Q, K and V.
        num_heads: Query heads; None if the graph does not tell.
        num_kv_heads: Key and value heads.
        head_dim: Channels of a head.
    """

    projections: str
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None

    @property
    def kind(self) -> str:
        """MHA, GQA or MQA; a question mark if the graph does not tell."""
        if self.num_heads is None or self.num_kv_heads is None:
            return "?"
        return attention_kind(self.num_heads, self.num_kv_heads)

    def to_dict(self) -> dict[str, object]:
        """As JSON-ready data."""
        return {"kind": self.kind, **asdict(self)}


def find_attention(streams: Iterable[Stream]) -> list[Attention]:
    """The attention layers whose Q, K and V read one of ``streams``, in their order."""
    found = []
    for stream in streams:
        group: dict[str, tuple[str, HeadLayout | None]] = {}
        for name, kind, layout in _projections(stream):
            if kind in group:  # the next layer that reads the same stream
                found.append(_attention(group))
                group = {}
            group[kind] = (name, layout)
        if "q" in group or "k" in group:
            found.append(_attention(group))
    return found


def _projections(stream: Stream) -> Iterator[tuple[str, str, HeadLayout | None]]:
    for reader in stream.readers:
        parts = fused(reader, stream.shapes)
        if parts is None and (kind := role(reader.y)) is not None:
            yield reader.label, kind, head_layout(reader.y, reader.out_features, stream.shapes)
        elif parts is not None:
            for part in parts.parts:
                if part.role is not None:
                    yield f"{reader.label}{part.name}", part.role, _heads_of(part, stream.shapes)


def _heads_of(part: Part, shapes: Shapes) -> HeadLayout | None:
    sizes = part.layout.columns.squeeze().shape
    if len(sizes) == 2:  # cut into heads before it was cut out
        return HeadLayout(*sizes)
    return head_layout(part.value, len(part.columns), shapes)


def _attention(group: dict[str, tuple[str, HeadLayout | None]]) -> Attention:
    q = group.get("q", ("", None))[1]
    kv = group.get("k", group.get("v", ("", None)))[1]
    known = q or kv
    return Attention(
        compact([name for name, _ in group.values()]),
        q.heads if q else None,
        kv.heads if kv else None,
        known.head_dim if known else None,
    )


def kinds(layers: Iterable[Attention]) -> list[tuple[Attention, int]]:
    """The first layer of each kind, and how many there are of it."""
    found: dict[tuple[object, ...], list[Attention]] = {}
    for each in layers:
        key = each.kind, each.num_heads, each.num_kv_heads, each.head_dim
        found.setdefault(key, []).append(each)
    return [(same[0], len(same)) for same in found.values()]
