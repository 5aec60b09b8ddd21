"""Files are replaced whole or not at all, at whatever moment the process ends.

A new version is made in a folder beside its target, ``.<name>.onnx-fold.tmp``, flushed to the disk,
and moved out: first data files, under names that nothing has, then the file itself, by one rename
over the old one; last, data files may go that only the old one needed. So there is always an old
or a new pair of graph and data that can be loaded.

A journal in the folder says what comes and what goes. If a run is killed, the next one in the same
place reads it, and removes what is left: new data whose graph never arrived, or old data whose
graph is gone. A lock tells a folder that a living process works in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.filesize import decimal

from onnx_fold.errors import CannotWriteError, InvalidModelError
from onnx_fold.files.load import external_tensors, load
from onnx_fold.files.neighbours import WORKPLACE, reasons_to_stay

__all__ = ["appearing", "check_space", "clean", "data_names", "left_over", "old_data", "replacing"]

_LONGEST = 180
"""Bytes that the name of a file may have at most to be part of longer ones."""

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
        obsolete: Files, relative to the folder of ``target``, that go with the old version, once
            the new one was opened again and none of them is needed by it or by any file around it.

    Raises:
        CannotWriteError: Anything that the operating system refused, inside the block or out, or
            another process is writing ``target``.
    """
    with _workplace(target) as folder:
        yield folder
        _commit(folder, target, obsolete)


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Give an empty folder beside ``target``; it becomes ``target`` by one rename after the block.

    If the block raises there is nothing. A folder that a killed process left is removed by
    :func:`clean`.

    Args:
        target: A folder that is not there, or is empty.

    Raises:
        CannotWriteError: Anything that the operating system refused, inside the block or out, or
            another process is writing ``target``.
    """
    with _workplace(target) as workplace:
        folder = workplace / target.name
        folder.mkdir()
        yield folder
        for root, _, names in os.walk(folder):
            for path in (*(Path(root) / name for name in names), Path(root)):
                _flush(path)
        folder.rename(target)
        _flush(target.parent)


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A folder of one's own beside ``target``, which is settled whatever happens in the block.

    Raises:
        CannotWriteError: As :func:`replacing`.
    """
    try:
        clean(target.parent)
        with _own_folder(target) as folder:
            try:
                yield folder
            finally:
                _settle(folder, target)
    except OSError as error:
        raise CannotWriteError(f"cannot write {target}: {error.strerror or error}") from error


def data_names(target: Path, count: int) -> list[str]:
    """Names for ``count`` data files of ``target`` that nothing in its folder has yet."""
    for generation in itertools.count():
        stem = _stem(target.name) + (f"-{generation}" if generation else "")
        shards = [f"{stem}-{i:05d}-of-{count:05d}.data" for i in range(1, count + 1)]
        names = shards if count > 1 else [f"{stem}.data"]
        if not any(os.path.lexists(target.parent / name) for name in names):
            return names
    raise AssertionError


def old_data(target: Path, locations: Iterable[str]) -> list[str]:
    """Of the ``locations`` that an old ``target`` names, those that were written for it."""
    ours = re.compile(re.escape(_stem(target.name)) + r"(-\d+)?(-\d{5}-of-\d{5})?\.data")
    return [name for name in locations if ours.fullmatch(name)]


def left_over(target: Path, locations: Sequence[str]) -> dict[str, str]:
    """Of the ``locations`` of an old ``target``, those that are still there though it is gone.

    Returns:
        Why each is needed by others; nothing if it can be deleted.
    """
    used = _used(target)
    there = {target.parent / name: name for name in locations}
    left = [path for path in there if path.is_file() and path.resolve() not in used]
    reasons = reasons_to_stay(left, [target, *used])
    return {there[path]: reasons.get(path, "") for path in left}


def _used(target: Path) -> set[Path]:
    """The data files of the model in ``target``, all of whose tensors are there.

    Raises:
        InvalidModelError: It cannot be read, or a tensor is out of range.
    """
    return {Path(tensor.path).resolve() for tensor in external_tensors(load(target))}


def _stem(name: str) -> str:
    """``name``, if more can be added to it and it is UTF-8; else its beginning and a hash."""
    encoded = os.fsencode(name)
    text = encoded[:_LONGEST].decode(errors="ignore")
    return name if text == name else f"{text}-{hashlib.sha256(encoded).hexdigest()[:8]}"


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
    folder = target.parent / f".{_stem(target.name)}{WORKPLACE}"
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


def clean(parent: Path) -> None:
    """Settle what killed processes left in ``parent``."""
    for folder in parent.glob(f".*{WORKPLACE}"):
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # killed, or now, between two system calls
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            if _lock(handle, folder):
                with contextlib.suppress(OSError):  # of another user: not in the way
                    _settle(folder, parent / folder.name[1 : -len(WORKPLACE)])
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
    _write_journal(folder, target.name, [path.name for path in data], obsolete)
    for path in data:
        if os.path.lexists(parent / path.name):
            raise CannotWriteError(
                f"cannot write {target}: {path.name} has just appeared beside it"
            )
        path.rename(parent / path.name)
    _flush(parent)
    graph.replace(target)
    _flush(parent)


def _write_journal(folder: Path, target: str, new: Sequence[str], old: Sequence[str]) -> None:
    draft = folder / f"{_JOURNAL}.draft"
    draft.write_text(json.dumps({"target": target, "new": new, "old": old}))
    _flush(draft)
    draft.rename(folder / _JOURNAL)
    _flush(folder)


def _settle(folder: Path, target: Path) -> None:
    """Finish what was committed, or undo what was not, and remove ``folder``."""
    journal = folder / _JOURNAL
    if journal.exists():
        target, new, old = _planned(journal, target)
        if (folder / target.name).exists():
            going = [path for path in new if not (folder / path.name).exists()]
        else:
            going = _unneeded(target, new, old)
        for path in going:
            with contextlib.suppress(OSError):  # of another user: it stays
                path.unlink(missing_ok=True)
        journal.unlink()  # first: without the graph it would read as committed
        _flush(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    (folder / _LOCK).unlink()  # last: a folder without a lock is left alone
    folder.rmdir()


def _planned(journal: Path, target: Path) -> tuple[Path, list[Path], list[Path]]:
    """The target, its new data and its old data; nothing that lies outside its folder."""
    parent = target.parent
    try:
        held = json.loads(journal.read_text())
        names = [*map(str, held["new"])], [*map(str, held["old"])]
        target = parent / Path(str(held.get("target", target.name))).name
    except (ValueError, TypeError, LookupError, AttributeError):  # not one of ours
        return target, [], []
    new, old = (
        [parent / name for name in part if _is_inside(parent / name, parent)] for part in names
    )
    return target, new, old


def _is_inside(path: Path, folder: Path) -> bool:
    return path.parent.resolve().is_relative_to(folder.resolve())


def _unneeded(target: Path, new: Sequence[Path], old: Sequence[Path]) -> list[Path]:
    """Of the ``old`` data of ``target`` what can go: it is whole without, and no other needs it."""
    try:
        used = _used(target) if old else set()
    except InvalidModelError:
        return []
    old = [path for path in old if path.resolve() not in used]
    stay = reasons_to_stay(old, [target, *new])
    return [path for path in old if path not in stay]


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
