"""Inputs out of an ``.npz`` file, of which nothing is read before it is known to fit the model."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
from rich.filesize import decimal

from onnx_fold.algebra.device import Array
from onnx_fold.base.memory import available_memory
from onnx_fold.errors import UsageError, sentence
from onnx_fold.files.load import why_not_a_file

__all__ = ["read_npz", "refuse_unknown"]

_COPIES = 4
"""Of each input: as read, in the type of the model, widened, and in the session."""

_ERRORS = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What reading a damaged archive, or one with a password, raises."""


def read_npz(path: str | os.PathLike[str], inputs: Iterable[ir.Value]) -> dict[str, Array]:
    """Read arrays for ``inputs`` of a model.

    Raises:
        UsageError: The file cannot be read or holds no arrays, an array is of no input or does not
            fit its fixed sizes, or all of them together do not fit in memory.
    """
    where = f"cannot read inputs from {os.fspath(path)}"
    if reason := why_not_a_file(Path(path)):
        raise UsageError(f"{where}: {reason}")
    known = {str(value.name): value for value in inputs}
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            refuse_unknown(members, known)
            total = sum(_bytes(archive, each, known[name]) for name, each in members.items())
            if total * _COPIES > available_memory():
                raise UsageError(f"{where}: {decimal(total)} of arrays do not fit in memory")
            return {name: _read(archive, each) for name, each in members.items()}
    except UsageError:
        raise
    except _ERRORS as error:
        raise UsageError(f"{where}: {sentence(error)}") from error


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``UsageError`` if one of ``names`` is not among the ``known`` inputs of the model."""
    if unknown := sorted(set(names) - set(known)):
        takes = ", ".join(known) or "none"
        raise UsageError(f"unknown input '{unknown[0]}': the model takes {takes}")


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = archive.infolist()
    if other := [each.filename for each in members if not each.filename.endswith(".npy")]:
        raise ValueError(f"'{other[0]}' in it is no array")
    return {each.filename.removesuffix(".npy"): each for each in members}


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError("it holds arrays of a format that is not known")
    return shape, dtype


def _bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo, value: ir.Value) -> int:
    """Check what an array says that it is; return the bytes that it takes.

    Raises:
        UsageError: It is not of the sizes that the model fixes.
        ValueError: It holds no numbers, or fewer than it says.
    """
    with archive.open(member) as file:
        shape, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError(f"'{value.name}' holds Python objects, not numbers")
    sizes = None if value.shape is None else tuple(value.shape)
    if sizes is not None and len(sizes) != len(shape):
        raise UsageError(f"input '{value.name}' has rank {len(sizes)}, not {len(shape)}")
    pairs = zip(sizes or (), shape, strict=False)
    if any(isinstance(size, int) and 0 <= size != given for size, given in pairs):
        raise UsageError(f"input '{value.name}' is {value.shape}, not {list(shape)}")
    total = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or total > member.file_size:
        raise ValueError(f"'{value.name}' has fewer bytes than its shape {list(shape)} takes")
    return max(total, member.file_size)


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array
