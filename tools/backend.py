"""setuptools, but for what it leaves in a checkout: ``pip install .`` writes nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)
from setuptools.build_meta import build_wheel as _build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]


def get_requires_for_build_wheel(settings: Any = None) -> list[str]:
    """Nothing more than ``pyproject.toml`` says; setuptools would write an egg-info to find out."""
    return []


def build_wheel(directory: str, settings: Any = None, metadata: str | None = None) -> str:
    """Build with the folders ``build`` and ``*.egg-info`` somewhere else (PEP 517)."""
    with TemporaryDirectory() as folder:
        places = Path(folder) / "places.cfg"
        places.write_text(f"[build]\nbuild_base={folder}\n[egg_info]\negg_base={folder}\n")
        os.environ["DIST_EXTRA_CONFIG"] = str(places)
        return _build_wheel(directory, settings, metadata)
