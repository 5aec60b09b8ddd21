"""What the linear layers of a model were seen to read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_fold.algebra.device import Array
from onnx_fold.graph.linear import Linear


@dataclass
class Activations:
    """Rows of the values that linear layers read, ``[n, width]`` float64, by value name."""

    rows: dict[str, Array] = field(default_factory=dict)

    def of(self, layer: Linear) -> Array | None:
        """The rows that ``layer`` reads, or None if they were not recorded or are out of date."""
        return self.rows.get(layer.x.name or "")

    def forget(self, values: Iterable[ir.Value]) -> None:
        """Drop what no longer holds: the channels of ``values`` mean something else now."""
        for value in values:
            self.rows.pop(value.name or "", None)
