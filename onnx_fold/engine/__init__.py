"""Which fold is taken: what a pass is, candidates, their cost, what became of each stream.

It knows no strategy by name. Whoever writes a pass finds here all that it takes.
"""

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.expression import FoldedTensor
from onnx_fold.engine.folding import Candidate, FoldPass, Options, Proposal
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.rewriting.rebase import become_identity, rebase, with_bias
from onnx_fold.rewriting.record import Present, Recorder
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.ends import Reader, Writer
from onnx_fold.streams.stream import Stream

__all__ = [
    "Basis",
    "Candidate",
    "CannotRewriteError",
    "FoldPass",
    "FoldedTensor",
    "Linear",
    "Options",
    "Present",
    "Proposal",
    "Reader",
    "Recorder",
    "Rewrite",
    "Stream",
    "Writer",
    "become_identity",
    "compact",
    "rebase",
    "with_bias",
]
