"""Which files need a data file: it is neither removed nor written over while one does.

A model names its data relative to its own folder, so that it lies beside them or above. One that
lies below may reach them through a symbolic link.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from onnx_fold.files.load import PROTOBUF_LIMIT, TEXT_SUFFIXES, data_files

__all__ = ["owner", "reasons_to_stay"]

MOST_FILES = 50_000
MOST_BYTES = 2**34
"""How much is looked through; where there is more, nobody knows what is needed."""

_CHUNK = 2**24

WORKPLACE = ".onnx-fold.tmp"
"""What the names of folders end with in which outputs are made."""

_MODELS = (".onnx", ".ort", ".pb", *TEXT_SUFFIXES)


def owner(file: Path) -> Path | None:
    """A model that has weights in ``file``, if one is found beside it, above or below."""
    try:
        for path in _nearby(file.parent.resolve()):
            if path.suffix in _MODELS and _has_data(path) and _is_data_of(path, file):
                return path
    except OSError:  # more cannot be said
        pass
    return None


def reasons_to_stay(data: Collection[Path], own: Iterable[Path] = ()) -> dict[Path, str]:
    """Why ``data`` files, all of one model, are needed by others, or may be.

    Args:
        data: The files.
        own: What need not be asked: the model that they belong to, and its other data.

    Returns:
        A reason for each file that must stay.
    """
    known = {_real(path) for path in (*data, *own)}
    reasons: dict[Path, str] = {}
    for folder in {path.parent.resolve() for path in data}:
        left = [path for path in data if path.parent.resolve() == folder]
        try:
            for other in _nearby(folder, known):
                reasons |= _needs(other, left, may_mention=other.is_relative_to(folder))
                left = [path for path in left if path not in reasons]
                if not left:
                    break
        except OSError as error:
            where = f"{os.path.relpath(error.filename)}: " if error.filename else ""
            reasons |= dict.fromkeys(left, f"{where}{error.strerror}")
    return reasons


def _needs(other: Path, data: Collection[Path], may_mention: bool) -> dict[Path, str]:
    """Which of the ``data`` files another one needs, and why; ``may_mention`` them by name."""
    name = os.path.relpath(other)
    reasons = {}
    named = data_files(other) if _has_data(other) else ()
    for path in data:
        if _is_same(other, path):
            reasons[path] = f"{name} is the same file"
        elif any(_is_same(each, path) for each in named) or (
            may_mention and _mentions(other, path.name)
        ):
            reasons[path] = f"{name} needs it"
    return reasons


def _is_data_of(model: Path, file: Path) -> bool:
    return any(_is_same(each, file) for each in data_files(model))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _real(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _nearby(folder: Path, known: Collection[Path] = ()) -> Iterator[Path]:
    """Files in ``folder``, above it, and below, but the ``known`` ones.

    Raises:
        OSError: There are too many, or ``folder`` or one below cannot be read.
    """
    files = size = 0
    for path in _paths(folder):
        try:
            status = path.stat()
        except OSError:  # a link to nothing
            continue
        if not stat.S_ISREG(status.st_mode) or _real(path) in known:
            continue
        files += 1
        size += status.st_size if status.st_size <= PROTOBUF_LIMIT else 0
        if files > MOST_FILES or size > MOST_BYTES:
            raise OSError(0, "there are too many files around it to look through")
        yield path


def _paths(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.iterdir())
    for above in folder.parents:
        with contextlib.suppress(OSError):
            yield from (path for path in sorted(above.iterdir()) if os.access(path, os.R_OK))

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.endswith(WORKPLACE))
        if Path(root) != folder:
            yield from (Path(root) / name for name in sorted(names))


def _has_data(path: Path) -> bool:
    """Whether ``path`` may be a model that has data in another file."""
    return path.suffix in TEXT_SUFFIXES or _find(path, b"location")


def _mentions(path: Path, name: str) -> bool:
    """Whether a file holds ``name``, and not only as the end of a longer one."""
    text = re.escape(os.fsencode(name))
    length = re.escape(bytes([len(os.fsencode(name))]))
    return _find(path, os.fsencode(name), rb"(?<![\w.-])%b|\x12%b%b" % (text, length, text))


def _find(path: Path, text: bytes, pattern: bytes | None = None) -> bool:
    """Whether ``path`` holds ``text``, with the bytes before it as in ``pattern``.

    Raises:
        PermissionError: It cannot be read.
    """
    if path.stat().st_size > PROTOBUF_LIMIT:
        return False
    before = b""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            content = before + chunk
            at = content.find(text, max(len(before) - len(text) + 1, 0))
            while at >= 0:
                if pattern is None or re.search(pattern, content[max(at - 2, 0) : at + len(text)]):
                    return True
                at = content.find(text, at + 1)
            before = content[-len(text) - 1 :]
    return False
