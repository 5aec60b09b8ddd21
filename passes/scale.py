"""Scale: gains along a residual chain go into the layers beside it, and biases become one.

``x' = (x + h W) G + b`` is the same chain in another diagonal basis: with ``T = G`` the layers that
write ``x`` become ``W G`` and those that read it ``G⁻¹ R``, and ``x' = x + h W + b``. So a chain of
such blocks (NoNorm, Z. Sun et al., "MobileBERT", arXiv 2004.02984) becomes one stream, which is
closed to a change of basis no more. Each weight is multiplied and rounded once, whatever the
factors are, but for zeros. What is left of ``b`` is added to the bias of a layer in the same sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from onnx_fold.algebra.basis import DiagonalBasis
from onnx_fold.algebra.expression import Expression, Sum, evaluate, implied_gain, reshape, scale
from onnx_fold.engine import (
    Candidate,
    CannotRewriteError,
    ConstantWriter,
    FoldedTensor,
    FoldPass,
    Proposal,
    Reader,
    Rewrite,
    Stream,
    become_identity,
    compact,
    propose,
    rebase,
)
from onnx_fold.rewriting.bias import second_biases


class ScalePass(FoldPass):
    """Let a gain that reads a closed stream, or the second of two biases in it, go."""

    name = "scale"
    is_basis_change = False

    def candidates(self, stream: Stream) -> Iterator[Proposal]:
        """Yield one proposal for each gain, and one for all biases that have another beside."""
        for reader in stream.readers:
            if (gain := implied_gain(reader.weight.tensor)) is not None:
                yield _without(stream, reader, gain)
        pairs = dict(second_biases(stream))
        if pairs:
            text = f"{compact([each.label for each in pairs])} into the biases beside"
            yield _one_of_each(stream, pairs, text)


def _without(stream: Stream, reader: Reader, gain: Expression) -> Proposal:
    """Writers become ``W G`` and readers ``G⁻¹ R``."""
    others = [name for name in stream.labels if name != reader.label]
    text = f"{reader.label} into {compact(others)}"

    def plan() -> Candidate:
        if not np.all(evaluate(gain)):
            raise CannotRewriteError(f"{reader.label} multiplies a channel by zero")
        rewrite = rebase(stream, DiagonalBasis.of(gain), pivot=reader)
        become_identity(rewrite, reader)
        return Candidate(ScalePass.name, text, rewrite)

    return propose(ScalePass.name, text, plan)


def _one_of_each(
    stream: Stream, pairs: Mapping[ConstantWriter, ConstantWriter], text: str
) -> Candidate:
    """``x + (b + c)`` in the place of ``(x + b) + c``."""
    rewrite, terms = Rewrite(), dict[ConstantWriter, list[Expression]]()
    for each, other in pairs.items():
        while other in pairs:
            other = pairs[other]
        linear = stream.search.linears.get(other.node)
        vector = reshape(each.matrix, other.weight.shape)
        terms.setdefault(other, [other.weight.wide()])
        terms[other].append(scale(vector, 1.0 / (linear.beta if linear is not None else 1.0)))
        operand = each.node.inputs[1 - each.index]
        assert operand is not None
        rewrite.replaced[each.node.outputs[0]] = operand
    for other, summands in terms.items():
        rewrite.stored[other.edge] = FoldedTensor(Sum(*summands), other.weight.dtype)
    return Candidate(ScalePass.name, text, rewrite)
