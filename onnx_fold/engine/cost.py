"""What a model weighs, and what folding saves of it.

At batch 1 a decoder reads every weight once for each token, so the ratio of the weight bytes before
and after is the limit of the speed-up of decoding (Graef, arXiv 2404.12362, "Examples").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnx_fold.graph.constants import FLOATS, constant
from onnx_fold.graph.operators import operator
from onnx_fold.rewriting.rewrite import Work, read_size


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        weights: Elements of all floating-point initializers and Constant nodes.
        bytes: Their size as stored.
        read: Those of them that one token reads: one row of a table, else all.
        nodes: Operators, those in the bodies of control flow included; a function call is one, a
            Constant none.
    """

    weights: int
    bytes: int
    nodes: int = 0
    read: int = 0


@dataclass(frozen=True)
class Saving:
    """Cost before and after a fold."""

    before: Cost
    after: Cost

    @property
    def weights(self) -> int:
        """Weights removed."""
        return self.before.weights - self.after.weights

    @property
    def share(self) -> float:
        """Weights removed, as a share of those before."""
        return self.weights / self.before.weights if self.before.weights else 0.0

    @property
    def speedup(self) -> float:
        """Bytes ratio: the limit of the speed-up of decoding at batch 1."""
        return self.before.bytes / self.after.bytes if self.after.bytes else 1.0

    @property
    def read_ratio(self) -> float:
        """Ratio of the bytes that one token reads, where that is not all that is stored."""
        return self.before.read / self.after.read if self.after.read else 1.0


def cost(model: ir.Model) -> Cost:
    """Weigh ``model``; no weight is read."""
    stored = [(value, tensor) for value, tensor in _stored(model) if tensor.dtype in FLOATS]
    return Cost(
        weights=sum(tensor.size for _, tensor in stored),
        bytes=sum(tensor.nbytes for _, tensor in stored),
        nodes=sum(operator(node) != "Constant" for node in model.graph.all_nodes()),
        read=sum(read_size(value, tensor, tensor.nbytes) for value, tensor in stored),
    )


def bytes_read(model: ir.Model) -> int:
    """Bytes of constants that decoding one token reads: one row of a table, else all."""
    return sum(read_size(value, tensor, tensor.nbytes) for value, tensor in _stored(model))


def _stored(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """What initializers and Constant nodes hold."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    for node in (node for body in bodies for node in body.all_nodes()):
        if operator(node) == "Constant" and (held := constant(node.outputs[0])) is not None:
            yield node.outputs[0], held.tensor


@dataclass(frozen=True)
class Target:
    """What the operators that a fold adds take on one provider, counted in work it saves.

    Measured by ``benchmarks/operators.py``.

    Attributes:
        bytes_per_node: Weight bytes that are read in the time that one more operator takes.
        macs_per_copied: Multiplications done in the time in which one value is copied.
        macs_per_gathered: The same for a value that is picked from the last axis by an index.
    """

    bytes_per_node: int
    macs_per_copied: int
    macs_per_gathered: int

    def loses(self, work: Work, weights: int, itemsize: float) -> str:
        """Say where a fold that saves so many weights, and adds ``work``, takes longer.

        Decode at batch 1 reads the weights; prefill multiplies by each of them for every token.

        Returns:
            ``"decode"`` or ``"prefill"``, the first of them that gets slower, or an empty string.
        """
        if work.nodes > 0 and weights * itemsize < work.nodes * self.bytes_per_node:
            return "decode"
        return "prefill" if weights < self._moved(work) else ""

    def saved(self, work: Work, weights: int, itemsize: float) -> float:
        """Weight bytes that decode reads in the time that it saves; below 0 if prefill loses."""
        if weights < self._moved(work):
            return -1.0
        return weights * itemsize - work.nodes * self.bytes_per_node

    def _moved(self, work: Work) -> int:
        """Multiplications done in the time in which values are copied and gathered."""
        return work.copied * self.macs_per_copied + work.gathered * self.macs_per_gathered


TARGETS = {
    "cpu": Target(bytes_per_node=2**16, macs_per_copied=8, macs_per_gathered=400),
    "cuda": Target(bytes_per_node=2**23, macs_per_copied=234, macs_per_gathered=921),
}
"""By provider, measured: see docs/operators-cpu.md, operators-cuda.md and operators-cuda-graph.md.
CUDA: an operator as in a captured graph, 7.5e6 bytes; launched one by one it takes twice as long.
Of what is copied and gathered, the slower of both."""
