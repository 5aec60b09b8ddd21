"""Where weights are evaluated: numpy and scipy, or any device of torch.

The same expressions run on all of them, with the same policy: products in the type of their
operands, LU with partial pivoting in float64. Results agree within rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_fold.base.threads import processors
from onnx_fold.errors import UsageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Shape = tuple[int, ...]


class Device(Protocol):
    """What numpy and other array libraries call differently.

    Arrays of a device know ``@``, ``+``, ``*``, ``.T``, ``reshape``, ``sum`` and assignment to
    indices. A device can be pickled.
    """

    def load(self, array: Array) -> Any:
        """Bring an array of the host to the device."""

    def fetch(self, array: Any) -> Array:
        """Bring an array of the device to the host."""

    def cast(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Round or widen."""

    def transpose(self, array: Any, permutation: Sequence[int]) -> Any:
        """Reorder the axes."""

    def broadcast(self, array: Any, shape: Shape) -> Any:
        """Repeat along axes of size one."""

    def take(self, array: Any, indices: Any, axis: int) -> Any:
        """Some of the slices along ``axis``."""

    def concatenate(self, arrays: Sequence[Any], axis: int) -> Any:
        """Join along ``axis``."""

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> Any:
        """An array of zeros."""

    def lu_factor(self, matrix: Any) -> Any:
        """LU factors with partial pivoting of a float64 matrix ``[d, d]``."""

    def lu_solve(self, factors: Any, rhs: Any, transposed: bool) -> Any:
        """``A⁻¹ rhs``, or ``A⁻ᵀ rhs``, for the factors of ``A``; ``rhs`` is ``[d, n]``."""

    def eliminate(self, matrix: Array) -> tuple[Indices, Array]:
        """Gaussian elimination with partial pivoting of a tall matrix of the host, ``[f, d]``.

        The last step is done in float64: its rounding is multiplied by what elimination made grow,
        5e-4 of the matrix in float32 at d = 2048, and 4e-5 so.

        Returns:
            The order of the rows, pivots first, and ``L₂ L₁⁻¹``, ``[f - d, d]``.
        """


class Host:
    """The processor, by numpy and scipy."""

    def load(self, array: Array) -> Array:
        """Nothing to do."""
        return array

    def fetch(self, array: Array) -> Array:
        """Nothing to do."""
        return array

    def cast(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """Round or widen."""
        return array if array.dtype == dtype else converted(array, dtype)

    def transpose(self, array: Array, permutation: Sequence[int]) -> Array:
        """Reorder the axes."""
        return array.transpose(permutation)

    def broadcast(self, array: Array, shape: Shape) -> Array:
        """Repeat along axes of size one."""
        return np.broadcast_to(array, shape)

    def take(self, array: Array, indices: Indices, axis: int) -> Array:
        """Some of the slices along ``axis``."""
        taken: Array = np.take(array, indices, axis)
        return taken

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        """Join along ``axis``."""
        return np.concatenate(arrays, axis)

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array of zeros."""
        return np.zeros(shape, dtype)

    def lu_factor(self, matrix: Array) -> tuple[Array, npt.NDArray[np.int32]]:
        """LU factors of the transpose, which is in the order that LAPACK reads."""
        lu, pivots, _ = _getrf(matrix.dtype)(matrix.T)
        return lu, pivots

    def lu_solve(self, factors: Any, rhs: Array, transposed: bool) -> Array:
        """``A⁻¹ rhs``, or ``A⁻ᵀ rhs``, for the factors of ``A``."""
        solved: Array = scipy.linalg.lu_solve(
            factors,
            rhs.astype(factors[0].dtype, copy=False),
            trans=0 if transposed else 1,
            check_finite=False,
        )
        return solved.astype(rhs.dtype, copy=False)

    def eliminate(self, matrix: Array) -> tuple[Indices, Array]:
        """By LAPACK's ``getrf`` and a triangular solve."""
        ordered = converted(matrix, matrix.dtype, "F")
        lu, pivots, _ = _getrf(matrix.dtype)(ordered, overwrite_a=True)
        rows, width = matrix.shape
        triangle = converted(lu[:width], np.dtype(np.float64))
        rest = np.empty((rows - width, width), matrix.dtype)
        for start in range(0, len(rest), _ROWS):
            block = converted(lu[width + start : width + start + _ROWS], triangle.dtype)
            divide(block, triangle, is_unit=True)
            rest[start : start + _ROWS] = block
        return _order(rows, pivots), rest


def divide(x: Array, lower: Array, *, is_unit: bool = False) -> None:
    """``x L⁻¹`` in place of ``x``, ``[n, d]``, for the lower triangle of ``lower``, ``[d, d]``.

    In panels: products let other threads run, and scipy's solves of triangles do not.

    Args:
        x: Rows, float64.
        lower: The triangle, float64.
        is_unit: Whether ones stand on its diagonal, whatever does.
    """
    for start in reversed(range(0, len(lower), _PANEL)):
        panel, behind = slice(start, start + _PANEL), slice(start + _PANEL, None)
        own = x[:, panel] - x[:, behind] @ lower[behind, panel]
        x[:, panel] = scipy.linalg.blas.dtrsm(
            1.0, lower[panel, panel], own, side=1, lower=1, diag=int(is_unit)
        )


def _getrf(dtype: np.dtype[Any]) -> Any:
    return scipy.linalg.lapack.get_lapack_funcs("getrf", dtype=dtype)


_BLOCK = 2**20

_ROWS = 2048
"""Rows that are widened at a time."""

_PANEL = 256
"""Columns that are divided at a time."""


def converted(array: Array, dtype: np.dtype[Any], order: Literal["C", "F"] = "C") -> Array:
    """A copy of ``array`` in another type or order of the axes; all cores make a large one."""
    if array.size <= _BLOCK or array.ndim < 2:
        return array.astype(dtype, order=order)
    copy: Array = np.empty(array.shape, dtype, order)
    rows = max(1, _BLOCK * len(array) // array.size)

    def fill(start: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            copy[start : start + rows] = array[start : start + rows]

    with ThreadPoolExecutor(processors()) as threads:
        list(threads.map(fill, range(0, len(array), rows)))
    return copy


def _order(rows: int, pivots: Array) -> Indices:
    """The order of rows after each has been exchanged with its pivot."""
    order = np.arange(rows)
    for position, pivot in enumerate(pivots):
        order[[position, pivot]] = order[[pivot, position]]
    return order


def subtract(a: Array, left: Array, right: Array, block: int = 512) -> None:
    """``a -= left @ right`` in place, some rows at a time."""
    for start in range(0, len(a), block):
        a[start : start + block] -= left[start : start + block] @ right


HOST = Host()


@dataclass(frozen=True)
class TorchDevice:
    """A device of torch.

    Products of float32 matrices are as exact as ``torch.set_float32_matmul_precision`` says, by
    default not in TensorFloat-32.

    Attributes:
        name: What torch calls it: ``"cuda"``, ``"cuda:1"``, ``"cpu"``.
    """

    name: str

    def load(self, array: Array) -> torch.Tensor:
        """A copy, through pinned memory to a GPU; axes stay in the order that they have."""
        import torch

        if array.flags.f_contiguous and not array.flags.c_contiguous:
            return self.load(array.T).permute(*reversed(range(array.ndim)))
        is_bfloat16 = array.dtype == ml_dtypes.bfloat16
        given = array.view(np.int16) if is_bfloat16 else array
        staged = torch.empty(
            given.shape, dtype=_torch_dtype(given.dtype), pin_memory=self.name.startswith("cuda")
        )
        np.copyto(staged.numpy(), given)
        tensor = staged.to(self.name, non_blocking=True)
        return tensor.view(torch.bfloat16) if is_bfloat16 else tensor

    def fetch(self, array: torch.Tensor) -> Array:
        """Copied if it is another device's."""
        import torch

        array = array.cpu()
        if array.dtype == torch.bfloat16:
            values: Array = array.contiguous().view(torch.int16).numpy()
            return values.view(ml_dtypes.bfloat16)
        fetched: Array = array.numpy()
        return fetched

    def cast(self, array: torch.Tensor, dtype: np.dtype[Any]) -> torch.Tensor:
        """Round or widen."""
        return array.to(_torch_dtype(dtype))

    def transpose(self, array: torch.Tensor, permutation: Sequence[int]) -> torch.Tensor:
        """Reorder the axes."""
        return array.permute(*permutation)

    def broadcast(self, array: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Repeat along axes of size one."""
        return array.broadcast_to(shape)

    def take(self, array: torch.Tensor, indices: torch.Tensor, axis: int) -> torch.Tensor:
        """Some of the slices along ``axis``."""
        return array.index_select(axis, indices)

    def concatenate(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """Join along ``axis``."""
        import torch

        return torch.cat(list(arrays), axis)

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> torch.Tensor:
        """An array of zeros."""
        import torch

        return torch.zeros(shape, dtype=_torch_dtype(dtype), device=self.name)

    def lu_factor(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """LU factors, ``A[order] = L U``; those of a singular matrix are not finite when used."""
        import torch

        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        order = _order(len(matrix), self.fetch(pivots) - 1)
        return lu, torch.from_numpy(order).to(self.name)

    def lu_solve(self, factors: Any, rhs: torch.Tensor, transposed: bool) -> torch.Tensor:
        """``A⁻¹ rhs``, or ``A⁻ᵀ rhs``, for the factors of ``A``, by two triangular solves.

        For a single large matrix ``torch.linalg.lu_solve`` may take routines of MAGMA that are made
        for many small ones, and that write a warning to the standard output.
        """
        import torch

        lu, order = factors
        right, solve = rhs.to(lu.dtype), torch.linalg.solve_triangular
        solved: torch.Tensor
        if transposed:
            below = solve(lu.T, right, upper=False)
            solved = torch.empty_like(below)
            solved[order] = solve(lu.T, below, upper=True, unitriangular=True)
        else:
            below = solve(lu, right[order], upper=False, unitriangular=True)
            solved = solve(lu, below, upper=True)
        return solved.to(rhs.dtype)

    def eliminate(self, matrix: Array) -> tuple[Indices, Array]:
        """On the device, and back."""
        import torch

        rows, width = matrix.shape
        lu, pivots, _ = torch.linalg.lu_factor_ex(self.load(matrix))
        rest = torch.linalg.solve_triangular(
            lu[:width].double(), lu[width:].double(), upper=False, left=False, unitriangular=True
        ).to(lu.dtype)
        return _order(rows, self.fetch(pivots) - 1), np.array(self.fetch(rest), order="C")


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, np.dtype(dtype).name)
    return found


def find_device(name: str) -> Device:
    """The device called ``name``: ``"cpu"``, or what torch calls it.

    Where torch is not installed, or does not see the device, it is the processor, and a warning is
    logged.

    Raises:
        UsageError: Torch has no name like this.
    """
    if name == "cpu":
        return HOST
    try:
        import torch
    except ImportError:
        return _fall_back(name, "torch is not installed: pip install 'onnx-fold[torch]'")
    try:
        torch.ones(1, dtype=torch.float64, device=name).item()  # a kernel runs
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        if "Expected one of" in reason or "Invalid device string" in reason:
            raise UsageError(f"unknown device '{name}'; there are cpu, cuda, cuda:1 ...") from error
        return _fall_back(name, reason)
    return TorchDevice(name)


def _fall_back(name: str, reason: str) -> Device:
    logger.warning("weights are folded on the processor, not on %s: %s", name, reason)
    return HOST
