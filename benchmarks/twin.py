"""A/A: a model beside a copy of itself shows what a machine makes of no difference at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from onnx_fold.files.load import data_files


def twin(model: Path) -> Path:
    """Copy ``model`` and its data files, byte for byte, into the folder ``twin`` beside it.

    Returns:
        The copy: a second file, which is loaded by itself and comes to lie elsewhere in memory.
    """
    folder = model.parent / "twin"
    for path in (model, *data_files(model)):
        target = folder / os.path.relpath(path, model.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return folder / model.name


def remove(model: Path) -> None:
    """Delete what :func:`twin` made of ``model``."""
    shutil.rmtree(model.parent / "twin", ignore_errors=True)
