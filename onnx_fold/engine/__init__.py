"""Which fold is taken: what a pass is, candidates, their cost, what became of each stream.

It knows no strategy by name. Whoever writes a pass finds here all that it takes.
"""

from onnx_fold.algebra.basis import Basis
from onnx_fold.algebra.expression import FoldedTensor
from onnx_fold.engine.candidate import Candidate, Options, Proposal, propose
from onnx_fold.engine.folding import FoldPass
from onnx_fold.engine.outcome import CandidateReport
from onnx_fold.graph.channels import Group
from onnx_fold.graph.linear import Linear, compact
from onnx_fold.rewriting.bias import carry_biases
from onnx_fold.rewriting.rebase import become_identity, in_place, rebase, with_bias
from onnx_fold.rewriting.record import Made, Operand, Present, Recorder
from onnx_fold.rewriting.resize import resize_stream
from onnx_fold.rewriting.rewrite import CannotRewriteError, Rewrite
from onnx_fold.streams.branches import Branches
from onnx_fold.streams.ends import ConstantWriter, Reader, Writer
from onnx_fold.streams.fixed import RowLayer
from onnx_fold.streams.heads import role
from onnx_fold.streams.joined import Divided, Joined
from onnx_fold.streams.stream import Stream

__all__ = [
    "Basis",
    "Branches",
    "Candidate",
    "CandidateReport",
    "CannotRewriteError",
    "ConstantWriter",
    "Divided",
    "FoldPass",
    "FoldedTensor",
    "Group",
    "Joined",
    "Linear",
    "Made",
    "Operand",
    "Options",
    "Present",
    "Proposal",
    "Reader",
    "Recorder",
    "Rewrite",
    "RowLayer",
    "Stream",
    "Writer",
    "become_identity",
    "carry_biases",
    "compact",
    "in_place",
    "propose",
    "rebase",
    "resize_stream",
    "role",
    "with_bias",
]
