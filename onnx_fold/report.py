"""What was folded, what was not, and why: dataclasses, for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onnx_fold.parity import ParityReport
    from onnx_fold.stream import Stream


@dataclass(frozen=True)
class CandidateReport:
    """One way to fold a stream, weighed.

    Attributes:
        strategy: Name of the pass.
        text: What would be folded into what.
        weights_removed: Elements of initializers saved.
        nodes_added: Operators added, less those removed.
        condition: Condition number of the matrix that is inverted; None if none is.
        error: Predicted relative error; None if it was refused before that was known.
        refused: Why it was not taken; None if it could be.
    """

    strategy: str
    text: str
    weights_removed: int
    nodes_added: int
    condition: float | None = None
    error: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class StreamReport:
    """One stream: who writes and reads it, and what became of it.

    Attributes:
        width: Channels of the stream.
        dtype: Its narrowest storage type.
        writers: Labels of the layers and tables that write it.
        readers: Labels of the layers that read it.
        is_closed: Whether its basis was free.
        reasons: Why it was left alone; empty if it was folded.
        candidates: All ways that were weighed.
        folded: The one that was taken.
    """

    width: int
    dtype: str
    writers: list[str]
    readers: list[str]
    is_closed: bool
    reasons: list[str] = field(default_factory=list)
    candidates: list[CandidateReport] = field(default_factory=list)
    folded: CandidateReport | None = None

    @classmethod
    def of(cls, stream: Stream) -> StreamReport:
        """Describe ``stream`` before anything is done to it."""
        writers = [*stream.tables, *stream.writers]
        return cls(
            width=stream.width,
            dtype=stream.dtype.name.lower(),
            writers=[writer.label for writer in writers],
            readers=[reader.label for reader in stream.readers],
            is_closed=stream.is_closed,
            reasons=[str(opening) for opening in stream.openings],
        )
