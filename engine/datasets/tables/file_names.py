"""File names: suffix and stem."""

from __future__ import annotations

from pathlib import PurePath


def suffix_of(path: PurePath) -> str:
    """The suffix in lower case; empty for UIDs, which name DICOM files (MG.1.2.840.10008.5)."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdecimal() else suffix


def stem_of(path: PurePath) -> str:
    """The name without the suffix."""
    return path.name.removesuffix(path.suffix) if suffix_of(path) else path.name
