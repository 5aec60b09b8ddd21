"""Models out: weights are streamed to disk, each by a job of its own.

All places in the data files are planned first. Then every tensor is written by an independent job
into its own range of bytes, in any order and in any thread or process: a weight that lies in a file
already is copied from range to range, one that is folded is evaluated, rounded, written, dropped.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from onnx_fold.algebra.device import Array
from onnx_fold.algebra.exact import checked
from onnx_fold.algebra.expression import FoldedTensor
from onnx_fold.base import progress
from onnx_fold.base.threads import two_at_a_time
from onnx_fold.errors import CannotWriteError, InvalidModelError
from onnx_fold.files.load import (
    PROTOBUF_LIMIT,
    external_tensors,
    load,
    stored_tensors,
    weight_bytes,
)
from onnx_fold.files.order import copied
from onnx_fold.files.output import check_space, data_names, old_data, replacing

__all__ = [
    "INLINE_LIMIT",
    "MEMORY_LIMIT",
    "Job",
    "Source",
    "data_of",
    "evaluate",
    "obsolete_data",
    "read_in",
    "run_jobs",
    "saving",
    "write",
]

INLINE_LIMIT = 256
"""Bytes below which a tensor stays in the graph's own file, where shape inference can read it."""

MEMORY_LIMIT = 2**28
"""Bytes of folded weights up to which a result that is not written is kept in memory."""

_BYTES_AT_MOST = 32
"""Memory for evaluations, for each element of the largest weight: four times it in float64."""

_PAGE = 4096
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Source:
    """Bytes of a tensor that lies in a file: ``offset`` and the rest of its length."""

    path: str
    offset: int


@dataclass(frozen=True)
class Job:
    """Writes one tensor into its range of a file that is there; any process can run it.

    Attributes:
        name: Name of the tensor.
        data: Where its bytes are, or a tensor that is evaluated.
        nbytes: Their number.
        path: The file to write into, absolute.
        offset: The first byte of the range.
    """

    name: str
    data: Source | ir.TensorProtocol
    nbytes: int
    path: str
    offset: int

    def run(self, turn: contextlib.AbstractContextManager[object] | None = None) -> None:
        """Write the tensor; while it is evaluated, ``turn`` is held.

        Raises:
            WeightError: It was folded, and is not finite in the type in which it is stored, or
                not what was proved.
            OSError: What the operating system refused.
        """
        if isinstance(self.data, Source):
            _copy(self.data, self.path, self.offset, self.nbytes)
            return
        with turn or contextlib.nullcontext():
            data = _bytes(self.data)
        if len(data) != self.nbytes:
            raise AssertionError(f"'{self.name}' has {len(data)} bytes, not {self.nbytes}")
        _write(self.path, self.offset, data)


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    """The values as ONNX stores them: little-endian, in C order."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(_values(tensor)).reshape(-1).view(np.uint8).data


def _values(tensor: ir.TensorProtocol) -> Array:
    """The values; a folded weight is compared with what was proved."""
    return checked(tensor) if isinstance(tensor, FoldedTensor) else tensor.numpy()


def _write(path: str, offset: int, data: memoryview) -> None:
    first, count = offset, len(data)
    with _opened(path, os.O_WRONLY) as file:
        while data:
            written = os.pwrite(file, data[:_CHUNK], offset)
            data, offset = data[written:], offset + written
        if hasattr(os, "posix_fadvise"):  # so that the disk begins to write now
            os.posix_fadvise(file, first, count, os.POSIX_FADV_DONTNEED)


def _copy(source: Source, path: str, offset: int, nbytes: int) -> None:
    """Copy within the kernel; through memory where that cannot be done."""
    with _opened(source.path, os.O_RDONLY) as old, _opened(path, os.O_WRONLY) as new:
        done = 0
        with contextlib.suppress(OSError):
            while done < nbytes:
                places = (source.offset + done, offset + done)
                count = os.copy_file_range(old, new, nbytes - done, *places)
                if count == 0:
                    break
                done += count
        while done < nbytes:
            data = os.pread(old, min(_CHUNK, nbytes - done), source.offset + done)
            if not data:
                raise OSError(f"{source.path} has become shorter")
            done += os.pwrite(new, data, offset + done)


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


# --- Running jobs --------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    executor: Executor | None = None,
    report: progress.Report = progress.ignore,
) -> None:
    """Make files and fill them, in ``executor`` or in threads: copies beside evaluations.

    If one fails, or the run is interrupted, those that have not begun are cancelled, and those that
    have are waited for.

    Raises:
        CannotWriteError: A process of the executor died.
        OSError: What the operating system refused.
    """
    total, done = sum(job.nbytes for job in jobs), 0
    for path, size in _sizes(jobs).items():
        with Path(path).open("wb") as file:
            file.truncate(size)
    largest = max((job.data.size for job in jobs if not isinstance(job.data, Source)), default=0)
    with _submitter(executor, largest) as submit:
        futures: dict[Future[None], Job] = {}
        try:
            report("writing", 0, total)
            futures.update((submit(job), job) for job in jobs)
            for future in as_completed(futures):
                future.result()
                done += futures[future].nbytes
                report(f"writing {futures[future].name}", done, total)
        except BrokenExecutor as error:
            raise CannotWriteError(f"a worker process died: {error}") from error
        finally:
            wait([future for future in futures if not future.cancel()])


@contextlib.contextmanager
def _submitter(executor: Executor | None, largest: int) -> Iterator[Callable[[Job], Future[None]]]:
    """How to start a job. Without an executor two weights are evaluated at a time, if they fit.

    While one is read, rounded or written, the other has the processor.
    """
    if executor is not None:
        yield lambda job: executor.submit(job.run)
        return
    room = _Room(_BYTES_AT_MOST * largest)
    with ThreadPoolExecutor(1) as copies, two_at_a_time() as evaluations:

        def submit(job: Job) -> Future[None]:
            if isinstance(job.data, Source):
                return copies.submit(job.run)
            return evaluations.submit(job.run, room.taken(_needed(job.data)))

        yield submit


class _Room:
    """Memory that evaluations share: one that is larger than what is free waits, or has it all."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: size <= self._free)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _needed(tensor: ir.TensorProtocol) -> int:
    """Bytes that its evaluation takes: what is read, widened, computed and rounded."""
    return tensor.size * (14 if tensor.dtype.bitwidth <= 16 else 24)


# --- Planning ------------------------------------------------------------------------------------


@contextlib.contextmanager
def saving(
    model: ir.Model,
    target: Path,
    *,
    in_place: bool = False,
    delete_old_data: bool = False,
    shard_size: int | None = None,
    executor: Executor | None = None,
    report: progress.Report = progress.ignore,
) -> Iterator[Path]:
    """Write ``model`` beside ``target``, give the file there, to be checked, and move it there.

    If the block raises, everything stays as it was.

    Args:
        model: The model.
        target: The file to write.
        in_place: See :func:`obsolete_data`.
        delete_old_data: See :func:`obsolete_data`.
        shard_size: See :func:`write`.
        executor: See :func:`write`.
        report: See :func:`write`.

    Raises:
        CannotWriteError: The folder is missing or read-only, the disk is full, another process is
            writing ``target``, a process of the executor died, or what was written is not whole.
    """
    needed = set() if in_place else {_real(tensor) for tensor in external_tensors(model)}
    obsolete = obsolete_data(target, in_place, delete_old_data)
    obsolete = [name for name in obsolete if (target.parent / name).resolve() not in needed]
    with replacing(target, obsolete) as folder:
        path = folder / target.name
        write(model, path, beside=target, shard_size=shard_size, executor=executor, report=report)
        try:
            load(path)  # where no file is but its own
        except InvalidModelError as error:
            raise CannotWriteError(f"what was written cannot be read again: {error}") from error
        yield path


def _real(tensor: ir.ExternalTensor) -> Path:
    return Path(tensor.path).resolve()


def data_of(target: Path) -> list[str]:
    """The data files of the model in ``target``, if there is one."""
    try:
        return sorted({str(tensor.location) for tensor in external_tensors(load(target))})
    except InvalidModelError:
        return []


def obsolete_data(target: Path, in_place: bool, delete_old_data: bool) -> list[str]:
    """The data files that go with the model in ``target``, if no other needs them.

    Args:
        target: The file that is replaced.
        in_place: It is so by what was made from it: data that was written for it goes.
        delete_old_data: All of its data goes.
    """
    if delete_old_data:
        return data_of(target)
    return old_data(target, data_of(target)) if in_place else []


def write(
    model: ir.Model,
    path: Path,
    *,
    beside: Path | None = None,
    shard_size: int | None = None,
    executor: Executor | None = None,
    report: progress.Report = progress.ignore,
) -> None:
    """Write ``model`` to ``path`` and its weights next to it. ``model`` is not changed.

    Weights go to data files, one at a time, if some of them lie in one already or if they do not
    fit one protobuf message.

    Args:
        model: The model.
        path: The file to write.
        beside: The file that ``path`` will become; data files get names that are free there.
        shard_size: Bytes at which a further data file is begun; weights then go to data files in
            any case.
        executor: Where the jobs run; its workers must see the same files.
        report: Is told about progress.

    Raises:
        CannotWriteError: There is not enough space, or the graph by itself exceeds 2 GiB.
        OSError: What the operating system refused.
    """
    copy = copied(model)
    is_large = weight_bytes(model) > PROTOBUF_LIMIT // 2 or any(external_tensors(model))
    jobs: list[Job] = []
    placed: set[ir.ExternalTensor] = set()
    if is_large or shard_size is not None:
        jobs, placed = _externalise(copy, path.absolute(), beside or path, shard_size)
    evaluate(copy, executor, report)
    read_in(copy, lambda tensor: tensor not in placed)
    proto = ir.to_proto(copy)
    # To tell its size a message is written once, which takes seconds where it holds the weights.
    message = proto.ByteSize() if jobs else weight_bytes(copy)
    check_space(path.parent, message + sum(_sizes(jobs).values()))
    run_jobs(jobs, executor, report)
    try:
        onnx.save(proto, path)
    except (EncodeError, ValueError) as error:
        raise CannotWriteError(f"the graph without its weights is too large: {error}") from error


def evaluate(
    model: ir.Model, executor: Executor | None = None, report: progress.Report = progress.ignore
) -> None:
    """Evaluate the folded weights of ``model`` in place, each once.

    If they are large they are kept in a temporary file that has no name and goes with them.

    Raises:
        CannotWriteError: There is not enough space for temporary files (see ``TMPDIR``).
        OSError: What the operating system refused.
    """
    values = _holding(model, lambda tensor: isinstance(tensor, FoldedTensor))
    tensors = dict(values.values())
    report("evaluating the folded weights", 0, 0)
    if sum(tensor.nbytes for tensor in tensors.values()) <= MEMORY_LIMIT:
        arrays = {name: _values(tensor) for name, tensor in tensors.items()}
    else:
        arrays = _spooled(tensors, executor, report)
    for value, (name, tensor) in values.items():
        value.const_value = ir.Tensor(arrays[name], tensor.dtype, name=value.name)


def _spooled(
    tensors: Mapping[str, ir.TensorProtocol], executor: Executor | None, report: progress.Report
) -> dict[str, Array]:
    with tempfile.TemporaryDirectory(prefix="onnx-fold-") as folder:
        file = str(Path(folder) / "weights")
        places = _layout([tensor.nbytes for tensor in tensors.values()], None)
        jobs = [
            Job(name, tensor, tensor.nbytes, file, offset)
            for (name, tensor), (_, offset) in zip(tensors.items(), places, strict=True)
        ]
        check_space(Path(folder), sum(_sizes(jobs).values()))
        run_jobs(jobs, executor, report)
        content = np.asarray(np.memmap(file, mode="r"))
    return {
        job.name: content[job.offset :][: job.nbytes]
        .view(tensor.dtype.numpy())
        .reshape(tensor.shape.numpy())
        for tensor, job in zip(tensors.values(), jobs, strict=True)
    }


def _externalise(
    model: ir.Model, path: Path, target: Path, shard_size: int | None
) -> tuple[list[Job], set[ir.ExternalTensor]]:
    """Give the large initializers of ``model`` a place in data files.

    Returns:
        What fills these files, and the tensors that lie in them now.
    """
    values = _holding(model, _is_large)
    tensors = dict(values.values())
    places = _layout([tensor.nbytes for tensor in tensors.values()], shard_size)
    files = data_names(target, max((shard for shard, _ in places), default=0) + 1)
    located = {
        name: (files[shard], offset) for name, (shard, offset) in zip(tensors, places, strict=True)
    }
    placed = set()
    for value, (name, tensor) in values.items():
        value.const_value = moved = ir.ExternalTensor(
            *located[name],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        placed.add(moved)
    return [
        Job(name, _data(tensor), tensor.nbytes, str(path.with_name(file)), offset)
        for (name, tensor), (file, offset) in zip(tensors.items(), located.values(), strict=True)
    ], placed


def _holding(
    model: ir.Model, wanted: Callable[[ir.TensorProtocol], bool]
) -> dict[ir.Value, tuple[str, ir.TensorProtocol]]:
    """The initializers, of all graphs, with a wanted tensor: its name, one for all, and it."""
    found = {}
    names: dict[Hashable, str] = {}
    for number, graph in enumerate(model.graphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and wanted(tensor):
                own = f"{value.name} of body {number}" if number else str(value.name)
                found[value] = names.setdefault(_identity(tensor), own), tensor
    return found


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= INLINE_LIMIT


def _identity(tensor: ir.TensorProtocol) -> Hashable:
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset, tensor.nbytes
    return id(tensor)


def _data(tensor: ir.TensorProtocol) -> Source | ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor):
        return Source(str(Path(tensor.path).absolute()), tensor.offset or 0)
    return tensor


def _layout(sizes: Sequence[int], shard_size: int | None) -> list[tuple[int, int]]:
    """The data file and the offset, at a page where that costs little, of tensors of ``sizes``."""
    places = []
    shard = end = 0
    for size in sizes:
        step = _PAGE if size >= 16 * _PAGE else 64
        offset = -(-end // step) * step
        if shard_size is not None and offset and offset + size > shard_size:
            shard, offset = shard + 1, 0
        places.append((shard, offset))
        end = offset + size
    return places


def _sizes(jobs: Iterable[Job]) -> dict[str, int]:
    """Bytes of each file that ``jobs`` write."""
    sizes: dict[str, int] = {}
    for job in jobs:
        sizes[job.path] = max(sizes.get(job.path, 0), job.offset + job.nbytes)
    return sizes


def read_in(
    model: ir.Model, wanted: Callable[[ir.ExternalTensor], bool] = lambda tensor: True
) -> None:
    """Read the wanted tensors that lie in files into memory, wherever in ``model`` they are."""
    for tensor, put in stored_tensors(model):
        if isinstance(tensor, ir.ExternalTensor) and wanted(tensor):
            held = ir.Tensor(
                tensor.numpy(),
                tensor.dtype,
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
            put(held)
