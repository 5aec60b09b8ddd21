"""Folders that exporters make: models, their data, and what belongs to them.

``optimum`` and ``onnxruntime-genai`` write a folder with one, two or three models beside
configurations and a tokenizer. Each model is folded by itself and keeps its name and its signature,
so that the configurations stay right; all other files are copied.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from onnx_fold.base.arguments import several
from onnx_fold.base.progress import Report, ignore
from onnx_fold.engine.protect import known_names, matching, refuse_unknown
from onnx_fold.errors import CannotWriteError, UsageError
from onnx_fold.files.load import all_stored, data_files, load
from onnx_fold.files.neighbours import WORKPLACE
from onnx_fold.files.output import appearing, check_space
from onnx_fold.pipeline import fold
from onnx_fold.report.fold import CheckFailedError, FoldReport
from onnx_fold.report.folder import FolderReport

__all__ = ["FolderReport", "fold_folder"]

_NOT_HERE = ("output", "in_place", "delete_old_data", "inputs", "ranges", "calibrate")
OPTIONS = frozenset(inspect.signature(fold).parameters) - {"model", *_NOT_HERE}
"""The options of :func:`onnx_fold.fold` that can be meant for several models."""


def fold_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    protect: str | Iterable[str] = (),
    progress: Report = ignore,
    **options: Any,
) -> FolderReport:
    """Fold every ``.onnx`` file of ``folder`` and below into ``output``, and copy all else.

    Names of models and, where a model has one data file, of that stay. A model in which nothing
    folds is copied with its data, byte for byte. What symbolic links point to is copied.

    Args:
        folder: What ``optimum-cli export onnx``, the model builder of onnxruntime-genai or others
            have written.
        output: A folder that is not there, or is empty. It appears when all of it is there and has
            been checked. None writes nothing.
        protect: As in :func:`onnx_fold.fold`; each must mean something in one of the models.
        progress: Is called with the model and what is being done, bytes written, and bytes in all.
        options: Options of :func:`onnx_fold.fold` but those for inputs of one model.

    Raises:
        CannotWriteError: ``output`` is there and not empty, lies inside ``folder``, or cannot be
            written.
        CheckFailedError: With ``strict`` or ``force``: a model does not compute the same function.
        InvalidModelError: A model cannot be read.
        UsageError: ``folder`` is no folder or holds no model, or an option does not fit.
    """
    source = Path(folder)
    if unknown := sorted({*options} - OPTIONS):
        raise UsageError(f"'{unknown[0]}' is no option for a folder of models")
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder")
    files = dict(_files(source))
    models = [name for name in files if name.suffix == ".onnx"]
    if not models:
        raise UsageError(f"there is no .onnx file in {source}")
    wanted = frozenset(several(protect))
    known = {name: known_names(load(files[name])) for name in models} if wanted else {}
    refuse_unknown(wanted, set().union(*known.values()), "the models")

    def run(name: Path, **more: Any) -> FoldReport:
        try:
            return fold(
                files[name],
                protect=[each for each in wanted if matching(each, known[name])],
                progress=lambda what, done, total: progress(f"{name}: {what}", done, total),
                **{**options, **more},
            ).report
        except CheckFailedError as error:
            raise CheckFailedError(f"{name}: {error}", error.report) from error

    if output is None:
        return FolderReport({str(name): run(name) for name in models})
    target = _checked(source, Path(output))
    with appearing(target) as place:
        check_space(place, sum(path.stat().st_size for path in files.values()))
        reports = {}
        for name in models:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            reports[name] = run(name, verify=False)  # cheap: no weight is evaluated
            if reports[name].folded:
                size = options.get("shard_size")
                if size is None and data_files(files[name]):
                    size = sys.maxsize  # one data file, however small
                reports[name] = run(name, output=place / name, shard_size=size)
        written = {name for name in models if reports[name].folded}
        for name in {*models} - written:  # all folds of it were taken back
            for path in (place / name, *data_files(place / name)):
                path.unlink(missing_ok=True)
        copied = list(_to_copy(source, files, written))
        for name in (each for each in models if each in written):
            _keep_data_name(files[name], place / name, {place / each for each in copied})
        for number, name in enumerate(copied, 1):
            progress(f"copying {name}, {number} of {len(copied)}", 0, 0)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(files[name], place / name)
        for name in models:
            load(place / name)
    others = tuple(str(name) for name in copied if name not in reports)
    return FolderReport({str(name): report for name, report in reports.items()}, others)


def _checked(folder: Path, output: Path) -> Path:
    """The absolute path of ``output``, where a folder can appear.

    Raises:
        CannotWriteError: It cannot.
    """
    target = output.parent.resolve() / output.name if output.name else output.resolve()
    if target.resolve().is_relative_to(folder.resolve()):
        raise CannotWriteError(f"cannot write {output}: it lies inside {folder}")
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise CannotWriteError(f"cannot write {output}: it is there, and not a folder")
    if target.is_dir() and any(target.iterdir()):
        raise CannotWriteError(f"cannot write {output}: the folder is there, and not empty")
    if not target.parent.is_dir():
        raise CannotWriteError(f"cannot write {output}: no folder {output.parent}")
    if not os.access(target.parent, os.W_OK):
        raise CannotWriteError(f"cannot write {output}: {output.parent} is read-only")
    return target


def _files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield all files in ``folder`` and below: their path in it, and where they are.

    Raises:
        UsageError: One is no regular file, or a link leads back to a folder above it.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.endswith(WORKPLACE))
        for name in folders:
            path = Path(root) / name
            if path.is_symlink() and Path(root).resolve().is_relative_to(path.resolve()):
                raise UsageError(f"{path} leads back to a folder above it")
        for name in sorted(names):
            path = Path(root) / name
            if not path.is_file():
                raise UsageError(f"{path} is not a file that can be copied")
            yield path.relative_to(folder), path


def _to_copy(folder: Path, files: Mapping[Path, Path], written: Iterable[Path]) -> Iterator[Path]:
    """Yield what is copied: all but the models ``written`` anew, and data that only they need."""
    anew = {*written}
    data = {name: _data(folder, path) for name, path in files.items() if name.suffix == ".onnx"}
    needed = {each for name, held in data.items() if name not in anew for each in held}
    gone = {each for name in anew for each in data[name]} - needed
    yield from (name for name in files if name not in anew and name not in gone)


def _data(folder: Path, model: Path) -> set[Path]:
    """The data files of ``model`` by their paths in ``folder``."""
    return {Path(os.path.relpath(path, folder)) for path in data_files(model)}


def _keep_data_name(source: Path, target: Path, taken: Iterable[Path]) -> None:
    """Give the data file of ``target`` the name that the one of ``source`` had, if each has one."""
    old, new = data_files(source), data_files(target)
    if len(old) != 1 or len(new) != 1:
        return
    location = os.path.relpath(old.pop(), source.parent)
    place, data = target.parent / location, new.pop()
    if place == data or place in taken or os.path.lexists(place):
        return
    proto = onnx.load(target, load_external_data=False)
    for tensor in all_stored(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    place.parent.mkdir(parents=True, exist_ok=True)
    data.rename(place)
    target.write_bytes(proto.SerializeToString())
