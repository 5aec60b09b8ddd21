"""Where the numbers of a matrix lie: in memory, in a file, or nowhere before they are asked for.

Whoever evaluates a matrix in a file reads its own bytes: what lies there is a path and an offset.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnx_fold.algebra.device import Array, Indices, Shape
from onnx_fold.base.threads import once


class Source(ABC):
    """An array, wherever it lies; it can be pickled.

    Attributes:
        shape: Its shape.
        dtype: The type of its elements.
    """

    shape: Shape
    dtype: np.dtype[Any]

    @abstractmethod
    def mapped(self) -> Array:
        """The array, mapped into memory if it lies in a file: only what is looked at is read."""

    def read(self) -> Array:
        """All of the array, in memory."""
        return self.mapped()

    def part(self, indices: Indices, axis: int) -> Array:
        """Its slices ``indices`` along ``axis``, in memory; no others are read."""
        return np.asarray(np.take(self.mapped(), indices, axis))


class InMemory(Source):
    """An array in memory."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def mapped(self) -> Array:
        return self.array


@dataclass(frozen=True, eq=False)
class OnDemand(Source):
    """An array that ``ask`` gives, each time; it is pickled by value."""

    shape: Shape
    dtype: np.dtype[Any]
    ask: Callable[[], Array]

    def mapped(self) -> Array:
        return self.ask()

    def __reduce__(self) -> tuple[Any, ...]:
        return InMemory, (self.ask(),)


@dataclass(frozen=True, eq=False)
class Later(Source):
    """An array that is not known yet: ``find`` is called once. It is pickled by value."""

    shape: Shape
    dtype: np.dtype[Any]
    find: Callable[[], Source]

    @once
    def _found(self) -> Source:
        return self.find()

    def mapped(self) -> Array:
        return self._found.mapped()

    def read(self) -> Array:
        return self._found.read()

    def __reduce__(self) -> tuple[Any, ...]:
        return InMemory, (self.read(),)


@dataclass(frozen=True, eq=False)
class OnDisk(Source):
    """An array in a file, from byte ``offset`` on, in C order."""

    shape: Shape
    dtype: np.dtype[Any]
    offset: int


@dataclass(frozen=True, eq=False)
class InFile(OnDisk):
    """An array in the file at ``path``."""

    path: Path

    def mapped(self) -> Array:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def read(self) -> Array:
        array = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset)
        return array.reshape(self.shape)


class Spool:
    """Arrays kept on disk, in a file without a name that goes with the last of them.

    Threads may share one.
    """

    def __init__(self, in_memory: int = 2**20) -> None:
        """Keep arrays of up to ``in_memory`` bytes in memory."""
        self._in_memory = in_memory
        self._turn = threading.Lock()

    @cached_property
    def _file(self) -> IO[bytes]:
        """Where the arrays lie; whoever holds the turn moves to where it reads or writes."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object is
        weakref.finalize(self, file.close)
        return file

    def add(self, array: Array) -> Source:
        """Keep ``array``, and hold it in memory no longer if it is large."""
        if array.nbytes <= self._in_memory:
            return InMemory(array)
        lines = np.ascontiguousarray(array)
        with self._turn:
            offset = self._file.seek(0, os.SEEK_END)
            lines.tofile(self._file)
        return InSpool(array.shape, array.dtype, offset, self)

    def mapped(self, array: OnDisk) -> Array:
        """An array that was added, mapped into memory."""
        with self._turn:
            return np.memmap(self._file, array.dtype, "r", array.offset, array.shape)


@dataclass(frozen=True, eq=False)
class InSpool(OnDisk):
    """An array in a :class:`Spool`; it is pickled by value."""

    spool: Spool

    def mapped(self) -> Array:
        return self.spool.mapped(self)

    def read(self) -> Array:
        return np.array(self.mapped())

    def __reduce__(self) -> tuple[Any, ...]:
        return InMemory, (self.read(),)
