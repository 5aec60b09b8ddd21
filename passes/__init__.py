"""Fold strategies, one a file; each is an :class:`onnx_ir.passes.InPlacePass`.

A new strategy is a new file here and one entry in :data:`PASSES`.
"""

from onnx_fold.passes.absorb import AbsorbPass
from onnx_fold.passes.branches import BranchesPass
from onnx_fold.passes.concat import ConcatPass
from onnx_fold.passes.interpolate import InterpolatePass
from onnx_fold.passes.merge import MergePass
from onnx_fold.passes.rotate import RotatePass
from onnx_fold.passes.scale import ScalePass
from onnx_fold.passes.select_heads import SelectPass
from onnx_fold.passes.split import SplitPass
from onnx_fold.passes.tables import TablesPass

__all__ = [
    "PASSES",
    "AbsorbPass",
    "BranchesPass",
    "ConcatPass",
    "InterpolatePass",
    "MergePass",
    "RotatePass",
    "ScalePass",
    "SelectPass",
    "SplitPass",
    "TablesPass",
]

PASSES = (
    *(TablesPass, BranchesPass, ConcatPass, SplitPass, MergePass, ScalePass),
    *(AbsorbPass, InterpolatePass, SelectPass, RotatePass),
)
"""All strategies, in the order in which they propose."""
