"""The version of the reports that are written as JSON, see ``docs/report-schema.md``."""

from __future__ import annotations

from typing import Final

__all__ = ["SCHEMA_VERSION"]

SCHEMA_VERSION: Final = 1
"""Grows by one when a field goes or means something else; further fields leave it as it is."""
