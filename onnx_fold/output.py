"""Files are replaced whole or not at all, at whatever moment the process ends.

A new version is made in a folder beside its target, ``.<name>.onnx-fold.tmp``, flushed to the disk,
and moved out: first data files, under names that nothing has, then the file itself, by one rename
over the old one; last, data files go that only the old one needed. So there is always an old or a
new pair of graph and data that can be loaded.

A journal in the folder says what comes and what goes. If a run is killed, the next one in the same
place reads it, and removes what is left: new data whose graph never arrived, or old data whose
graph is gone. A lock tells a folder that a living process works in.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

from rich.filesize import decimal

from onnx_fold.errors import CannotWriteError
from onnx_fold.files import PROTOBUF_LIMIT

__all__ = ["check_space", "data_names", "old_data", "replacing"]

_SUFFIX = ".onnx-fold.tmp"
_LOCK = ".lock"
_JOURNAL = ".journal"


@contextlib.contextmanager
def replacing(target: Path, obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """Give an empty folder beside ``target``; what is then in it takes its place beside it.

    The block writes ``folder / target.name``, and data files under names of :func:`data_names`. If
    it raises, everything stays as it was. A ``target`` that is a symbolic link is replaced; the
    file that it points to stays.

    Args:
        target: The file to write.
        obsolete: Files, relative to the folder of ``target``, that go with the old version, if no
            other file there mentions their names.

    Raises:
        CannotWriteError: Anything that the operating system refused, inside the block or out, or
            another process is writing ``target``.
    """
    try:
        _clean(target.parent)
        with _own_folder(target) as folder:
            try:
                yield folder
                _commit(folder, target, obsolete)
            finally:
                _settle(folder, target)
    except OSError as error:
        raise CannotWriteError(f"cannot write {target}: {error.strerror or error}") from error


def data_names(target: Path, count: int) -> list[str]:
    """Names for ``count`` data files of ``target`` that nothing in its folder has yet."""
    for generation in itertools.count():
        stem = target.name + (f"-{generation}" if generation else "")
        shards = [f"{stem}-{i:05d}-of-{count:05d}.data" for i in range(1, count + 1)]
        names = shards if count > 1 else [f"{stem}.data"]
        if not any(os.path.lexists(target.parent / name) for name in names):
            return names
    raise AssertionError


def old_data(target: Path, locations: Iterable[str]) -> list[str]:
    """Of the ``locations`` that an old ``target`` names, those that were written for it."""
    ours = re.compile(re.escape(target.name) + r"(-\d+)?(-\d{5}-of-\d{5})?\.data")
    return [name for name in locations if ours.fullmatch(name)]


def check_space(folder: Path, needed: int) -> None:
    """Check that ``needed`` bytes can be written into ``folder``.

    Raises:
        CannotWriteError: There is not as much space.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CannotWriteError(
            f"not enough space in {folder.absolute()}: {decimal(needed)} ({needed:,} bytes) needed,"
            f" {decimal(free)} ({free:,} bytes) free"
        )


@contextlib.contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """An empty folder for ``target`` that other processes leave alone while the block runs."""
    folder = target.parent / f".{target.name}{_SUFFIX}"
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # cleaned away before it was locked
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            if _lock(handle, folder):
                break
            os.close(handle)
            if folder.exists():
                raise CannotWriteError(f"cannot write {target}: another process is writing it")
    try:
        yield folder
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> bool:
    """Whether the open lock file of ``folder`` could be locked, and is still the one there."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), (folder / _LOCK).stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _clean(parent: Path) -> None:
    """Settle what killed processes left in ``parent``."""
    for folder in parent.glob(f".*{_SUFFIX}"):
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # killed, or now, between two system calls
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            if _lock(handle, folder):
                with contextlib.suppress(OSError):  # of another user: not in the way
                    _settle(folder, parent / folder.name[1 : -len(_SUFFIX)])
        finally:
            os.close(handle)


def _commit(folder: Path, target: Path, obsolete: Sequence[str]) -> None:
    """Move everything out of ``folder``, ``target`` last."""
    graph, parent = folder / target.name, target.parent
    data = [path for path in folder.iterdir() if path.name not in (graph.name, _LOCK)]
    if target.exists():
        shutil.copymode(target, graph)
    for path in (*data, graph):
        _flush(path)
    _write_journal(folder, [path.name for path in data], obsolete)
    for path in data:
        if os.path.lexists(parent / path.name):
            raise CannotWriteError(
                f"cannot write {target}: {path.name} has just appeared beside it"
            )
        path.rename(parent / path.name)
    _flush(parent)
    graph.replace(target)
    _flush(parent)


def _write_journal(folder: Path, new: Sequence[str], old: Sequence[str]) -> None:
    draft = folder / f"{_JOURNAL}.draft"
    draft.write_text(json.dumps({"new": new, "old": old}))
    _flush(draft)
    draft.rename(folder / _JOURNAL)
    _flush(folder)


def _settle(folder: Path, target: Path) -> None:
    """Finish what was committed, or undo what was not, and remove ``folder``."""
    journal = folder / _JOURNAL
    if journal.exists():
        planned = json.loads(journal.read_text())
        if (folder / target.name).exists():
            going = [name for name in planned["new"] if not (folder / name).exists()]
        else:
            own = {target.name, *planned["new"]}
            going = [name for name in planned["old"] if not _is_mentioned(name, target.parent, own)]
        for name in going:
            (target.parent / name).unlink(missing_ok=True)
        journal.unlink()  # first: without the graph it would read as committed
        _flush(folder)
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()
    (folder / _LOCK).unlink()  # last: a folder without a lock is left alone
    folder.rmdir()


def _is_mentioned(location: str, folder: Path, own: Set[str]) -> bool:
    """Whether a file in ``folder`` but ``own`` ones contains the name of a data file."""
    name = Path(location).name
    others = (path for path in folder.iterdir() if path.name not in own | {name})
    return any(_contains(path, name.encode()) for path in others if path.is_file())


def _contains(path: Path, text: bytes) -> bool:
    try:
        if not 0 < path.stat().st_size <= PROTOBUF_LIMIT:
            return False
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(text) >= 0
    except OSError:  # who knows
        return True


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
