"""Where an output may go: never over an input, nor over what a model has its weights in.

What would be refused after the work is refused before it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from onnx_fold.errors import CannotWriteError, InvalidModelError
from onnx_fold.files.load import data_files, load
from onnx_fold.files.neighbours import owner
from onnx_fold.files.output import old_data

__all__ = ["check_format", "check_place", "check_target", "collide", "inputs_of"]

_INCOMPLETE = (".onnxtxt", ".onnxtext")
"""Suffixes of the text syntax of ONNX, which has no 16-bit weights."""


def check_place(target: Path) -> bool:
    """Check that there can be a file at ``target``; returns whether there is one.

    Raises:
        CannotWriteError: Its folder is missing or read-only, or it is no regular file.
    """
    folder = target.parent
    if not folder.is_dir():
        raise CannotWriteError(f"cannot write {target}: no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise CannotWriteError(f"cannot write {target}: {folder} is read-only")
    try:
        status = target.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CannotWriteError(f"cannot write {target}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CannotWriteError(f"cannot write {target}: it is not a regular file")
    return True


def check_format(target: Path) -> None:
    """Check that a model would be whole in the format that the suffix of ``target`` says.

    Raises:
        CannotWriteError: It would not.
    """
    if target.suffix in _INCOMPLETE:
        raise CannotWriteError(
            f"cannot write {target}: ONNX's text syntax does not hold every weight;"
            " use .onnx, .json or .textproto"
        )


def check_target(target: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that ``target`` can be written, and that nothing is lost by it.

    Args:
        target: The file to write.
        inputs: Files that are read, see :func:`inputs_of`.

    Raises:
        CannotWriteError: As :func:`check_place`, or it is an input (perhaps by another name), or a
            model has weights in it.
    """
    if not check_place(target):
        return
    for number, path in enumerate(inputs):
        if path.exists() and target.samefile(path):
            what = f"an input, {path}" if number else "the input"
            raise CannotWriteError(f"{target} is {what}; write to another file")
    if _may_be_data(target) and (model := owner(target)) is not None:
        raise CannotWriteError(
            f"{target} holds weights of {os.path.relpath(model)}; write to another file"
        )


def inputs_of(*paths: str | os.PathLike[str] | None) -> Iterator[Path]:
    """What is read: files, and the data files of those that are models."""
    for path in paths:
        if path is not None:
            yield Path(path)
            yield from data_files(Path(path))


def collide(one: Path, model: Path) -> bool:
    """Whether ``one`` is ``model``, or has a name that data files of it are given."""
    one, model = (path.parent.resolve() / path.name for path in (one, model))
    return one == model or (one.parent == model.parent and bool(old_data(model, [one.name])))


def _may_be_data(target: Path) -> bool:
    """Whether it is neither text nor a model, which need not be looked for in others."""
    with target.open("rb") as file:
        start = file.read(4096)
    try:
        start.decode()
        is_text = b"\0" not in start
    except UnicodeDecodeError as error:
        is_text = error.start > len(start) - 4 and b"\0" not in start  # cut in a character
    if is_text:
        return False
    try:
        load(target)
    except InvalidModelError:
        return True
    return False
