"""Drawings of blocks: where each box, line and arrow stands. A template makes SVG of it.

Streams are horizontal lines. Layers that write one stand above it, those that read it hang below;
the area of a box is proportional to the weights of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeAlias

from onnx_fold.engine.outcome import StreamReport
from onnx_fold.report.alike import Repeat, nameless

__all__ = ["Arrow", "Box", "Drawing", "Line", "draw", "scale_of"]

WIDTH = 340.0
"""Units of a drawing; on a phone one is about a pixel."""

MARGIN, SLOTS = 8.0, 6
LARGEST, ASPECT, SMALLEST = 74.0, 1.35, 5.0
"""Width of the largest box, how much wider than high it is, and the least side of any."""

ABOVE, TEXT, BELOW = 26.0, 28.0, 14.0
"""Heights: of the lines to a box, of its label, of the line that leaves it."""

UNKNOWN, NORM = "…", ": a norm"

Point: TypeAlias = tuple[float, float]


@dataclass
class Box:
    """A layer, or several that are alike.

    Attributes:
        name: Name of the (first) layer.
        label: What fits below the box.
        count: How many layers it stands for.
        weights: Elements of one of them before the fold.
        weights_after: The same after it.
        output: Name of the value that it makes.
        is_source: Whether it became the identity, or part of it did.
        is_target: Whether another layer was folded into it.
        is_table: Whether it is looked up by row.
        is_shared: Whether it reads the stream above and writes the one below.
        x: Centre.
        y: Top of its row.
        row: Height of its row.
        width: Width, before and after.
        height: Height before.
        height_after: Height of what is left.
    """

    name: str
    label: str
    count: int
    weights: int
    weights_after: int
    output: str = ""
    is_source: bool = False
    is_target: bool = False
    is_table: bool = False
    is_shared: bool = False
    x: float = 0.0
    y: float = 0.0
    row: float = 0.0
    width: float = 0.0
    height: float = 0.0
    height_after: float = 0.0

    @property
    def foot(self) -> float:
        """Where a line leaves it, below its label."""
        return self.y + self.row + TEXT - 2

    def top(self, height: float) -> float:
        """Where a box of ``height`` begins: boxes stand on the ground of their row."""
        return self.y + self.row - height


@dataclass(frozen=True)
class Line:
    """A stream across the drawing, or a connection of a box with one."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = "flow"


@dataclass(frozen=True)
class Arrow:
    """A curve from what was folded to what it was folded into, as the data of an SVG path."""

    path: str


@dataclass(frozen=True)
class Word:
    """A word in the drawing: of a stream, or of what stands between two."""

    x: float
    y: float
    text: str
    kind: str


@dataclass
class Drawing:
    """One block, before and after.

    Attributes:
        count: How many times it comes in a row.
        height: Units from top to bottom.
        is_folded: Whether anything in it was folded.
        has_open: Whether something looks at the channels of one of its streams.
        title: What was folded into what.
        boxes: The layers.
        lines: What joins them.
        words: What is written between them.
        arrows: From what was folded to what it was folded into.
    """

    count: int = 1
    height: float = 0.0
    is_folded: bool = False
    has_open: bool = False
    title: str = ""
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)


def scale_of(streams: Iterable[StreamReport]) -> float:
    """Square units of one weight, the same in all drawings of a page."""
    sizes = [max(each.weights, each.weights_after) for s in streams for each in s.layers]
    return LARGEST * LARGEST / ASPECT / max([1, *sizes])


def draw(block: Repeat, scale: float, endings: Mapping[str, str]) -> Drawing:
    """Lay out one block from top to bottom.

    Args:
        block: Its streams.
        scale: See :func:`scale_of`.
        endings: Where streams end, see :attr:`StreamReport.ending`, by the values that layers make.
    """
    texts = [stream.folded.text for stream in block.streams if stream.folded is not None]
    drawing = Drawing(block.count, is_folded=bool(texts), title="; ".join(texts) or "left alone")
    drawing.has_open = not all(stream.is_closed for stream in block.streams)
    _Artist(scale, endings, drawing).draw(block.streams)
    return drawing


@dataclass
class _Artist:
    """Draws downward."""

    scale: float
    endings: Mapping[str, str]
    drawing: Drawing
    y: float = MARGIN

    def draw(self, streams: Sequence[StreamReport]) -> None:
        """Draw ``streams`` one below the other."""
        hanging: list[Box] = []
        above: StreamReport | None = None
        for stream, below in zip_longest(streams, streams[1:]):
            shared = [box for box in hanging if box.is_shared]
            own = _boxes(stream, ("table", "writer"))
            own = [box for box in own if box.output not in {each.output for each in shared}]
            if above is not None and not shared:
                self._between(above, hanging, stream)
            bus = self._writers(own, shared)
            self._stream(stream, bus)
            hanging = _boxes(stream, ("reader",))
            if below is not None:
                _share(hanging, _boxes(below, ("table", "writer")))
            self._readers(stream, hanging, bus)
            self._arrows([*shared, *own, *hanging], stream)
            above = stream
        if above is not None and above.leads_to and self._met(above) != UNKNOWN:
            self._between(above, hanging, None)
        self.drawing.height = self.y + MARGIN

    def _writers(self, own: Sequence[Box], shared: Sequence[Box]) -> float:
        if own:
            self._row(own)
        bus = self.y + (BELOW if own or shared else 0)
        for box in (*own, *shared):
            self._line(box.x, box.foot, box.x, bus)
        return bus

    def _stream(self, stream: StreamReport, bus: float) -> None:
        kind = "stream" if stream.is_closed else "stream open"
        self._line(MARGIN, bus, WIDTH - MARGIN, bus, kind)
        if not stream.is_closed and stream.readers:
            self._word(MARGIN, bus - 5, f"open{_where(stream)}", "open-name")
        self._word(WIDTH - MARGIN, bus + 13, f"{stream.width:,} wide", "stream-name")

    def _readers(self, stream: StreamReport, hanging: Sequence[Box], bus: float) -> None:
        self.y = bus + ABOVE
        if hanging:
            self._row(hanging)
            for box in hanging:
                least = min(box.height, box.height_after or box.height)
                self._line(box.x, bus, box.x, box.top(least))
        elif stream.folded is None:
            self._line(WIDTH / 2, bus, WIDTH / 2, bus + 12)
            self._word(WIDTH / 2, bus + 26, f"open{_where(stream)}", "between")
            self.y = bus + 32

    def _between(
        self, above: StreamReport, hanging: Sequence[Box], below: StreamReport | None
    ) -> None:
        """What the lines of ``hanging`` lead to, and one leaves, if the layers below are next."""
        is_next = below is not None and set(above.leads_to) & {*below.writers}
        if not hanging or (below is not None and not is_next):
            self.y += BELOW
            return
        top = self.y + 8
        for box in hanging:
            self._line(box.x, box.foot, box.x, top)
        if len(hanging) > 1:
            self._line(min(box.x for box in hanging), top, max(box.x for box in hanging), top)
        self._line(WIDTH / 2, top, WIDTH / 2, top + (32 if is_next else 12))
        self._word(WIDTH / 2, top + 20, self._met(above), "between")
        self.y = top + (36 if is_next else 24)

    def _met(self, stream: StreamReport) -> str:
        """What stands behind the readers of ``stream``."""
        readers = (each.output for each in stream.layers if each.role == "reader")
        met = {self.endings.get(output) for output in readers}
        if "attention cores" in met:
            is_parallel = "activations" in met and len(stream.leads_to) > 1
            return "attention, activation" if is_parallel else "attention"
        return "activation" if "activations" in met else UNKNOWN

    def _line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "flow") -> None:
        self.drawing.lines.append(Line(x1, y1, x2, y2, kind))

    def _word(self, x: float, y: float, text: str, kind: str) -> None:
        self.drawing.words.append(Word(x, y, text, kind))

    def _row(self, boxes: Sequence[Box]) -> None:
        """Place ``boxes`` side by side, and their labels below."""
        slot = (WIDTH - 2 * MARGIN) / len(boxes)
        for box in boxes:
            self._size(box, slot - 8)
        row = max(max(box.height, box.height_after) for box in boxes)
        for number, box in enumerate(boxes):
            box.x, box.y, box.row = MARGIN + slot * (number + 0.5), self.y, row
            box.label = _short(box.name, int(slot / 7))
        self.drawing.boxes += boxes
        self.y += row + TEXT

    def _size(self, box: Box, most: float) -> None:
        area = self.scale * max(box.weights, box.weights_after)
        box.width = max(SMALLEST, min(math.sqrt(area * ASPECT), most))
        box.height = max(SMALLEST, self.scale * box.weights / box.width)
        after = self.scale * box.weights_after / box.width
        box.height_after = max(SMALLEST, after) if box.weights_after else 0.0

    def _arrows(self, boxes: Sequence[Box], stream: StreamReport) -> None:
        gone = _sources(stream)
        targets = [box for box in boxes if box.output not in gone]
        for source in [box for box in boxes if box.output in gone][:3]:
            self.drawing.arrows += [Arrow(_curve(source, target)) for target in targets]


def _curve(source: Box, target: Box) -> str:
    """Over the top to a box beside; to one above or below from side to side."""
    x1, x2 = source.x, target.x
    height = target.height_after or target.height  # it may have been folded further
    if source.y == target.y:
        y1, y2 = source.top(source.height) - 1, target.top(height) - 2
        over = min(y1, y2) - 16
        return _path((x1, y1), (x1, over), (x2, over), (x2, y2))
    side = 1 if x2 >= x1 else -1
    if source.y > target.y:
        y1 = source.top(source.height) - 1
        x2, y2 = x2 - side * (target.width / 2 + 2), target.top(height / 2)
        around = 6 * len(target.label) if abs(target.x - x1) < target.width / 2 else 0
        leaving = (x1 - side * around, (y1 + y2) / 2)
        return _path((x1, y1), leaving, (x2 - side * 40, y2), (x2, y2))
    x1, y1 = x1 + side * source.width / 2, source.top(source.height / 2)
    x2, y2 = x2 + side * min(9.0, target.width / 2), target.top(height) - 2
    reach = max(7.0 * len(source.label), abs(x2 - x1) / 2)  # around its own label
    return _path((x1, y1), (x1 + side * reach, y1), (x2, (y1 + y2) / 2), (x2, y2))


def _path(start: Point, leaving: Point, arriving: Point, end: Point) -> str:
    places = [f"{x:.1f} {y:.1f}" for x, y in (start, leaving, arriving, end)]
    return f"M{places[0]}C{' '.join(places[1:])}"


def _boxes(stream: StreamReport, roles: Sequence[str]) -> list[Box]:
    """The layers of some roles, those that are alike in one; the last ones together if too many."""
    layers = [each for each in stream.layers if each.role in roles]
    is_folded = stream.folded is not None
    sources = _sources(stream)
    found: dict[tuple[object, ...], Box] = {}
    for each in layers:
        is_source = each.output in sources
        key = nameless(each.name), each.role, each.weights, each.weights_after, is_source
        if key in found:
            found[key].count += 1
        else:
            found[key] = Box(
                each.name,
                each.name,
                1,
                each.weights,
                each.weights_after,
                each.output,
                is_source,
                is_folded and not is_source,
                each.role == "table",
            )
    boxes = [*found.values()]
    if len(boxes) > SLOTS:
        rest = boxes[SLOTS - 1 :]
        count = sum(box.count for box in rest)
        is_target, is_source = any(b.is_target for b in rest), any(b.is_source for b in rest)
        weights = sum(box.weights * box.count for box in rest)
        after = sum(box.weights_after * box.count for box in rest)
        more = Box(f"{count} more", f"{count} more", 1, weights, after, "", is_source, is_target)
        boxes = [*boxes[: SLOTS - 1], more]
    return boxes


def _sources(stream: StreamReport) -> set[str]:
    """Outputs of the layers that became the identity, or of those of which a part did."""
    if stream.folded is None:
        return set()
    gone = {each.output for each in stream.layers if each.weights_after == 0}
    return gone or {each.output for each in stream.layers if each.weights_after < each.weights}


def _share(hanging: Sequence[Box], writers: Sequence[Box]) -> None:
    """Layers that read one stream and write the next are drawn once, as both folds left them."""
    below = {box.output: box for box in writers}
    for box in hanging:
        if (writer := below.get(box.output)) is None:
            continue
        box.is_shared = True
        if writer.weights_after == box.weights:  # the fold below came first
            box.weights = writer.weights
        else:
            box.weights_after = writer.weights_after
        box.is_source |= writer.is_source
        box.is_target |= writer.is_target


def _where(stream: StreamReport) -> str:
    """What holds the basis of an open stream, in a word."""
    return " at a norm" if any(NORM in reason for reason in stream.reasons) else ""


def _short(name: str, length: int) -> str:
    """The last two parts of ``name``, or the last, or what fits of it."""
    parts = [part for part in name.split(".") if not part.isdigit()] or [name]
    for text in (".".join(parts[-2:]), parts[-1]):
        if len(text) <= length:
            return text
    return f"{parts[-1][: max(1, length - 1)]}…"
