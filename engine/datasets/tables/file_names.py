"""File names: suffix, stem, and the names of masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TypeVar


def suffix_of(path: PurePath) -> str:
    """The suffix in lower case; empty for UIDs, which name DICOM files (MG.1.2.840.10008.5)."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdecimal() else suffix


def stem_of(path: PurePath) -> str:
    """The name without the suffix."""
    return path.name.removesuffix(path.suffix) if suffix_of(path) else path.name


P = TypeVar("P", bound=PurePath)
_FOLDER = re.compile(r"masks?|.*[ _-]masks|.*roi mask images.*", re.IGNORECASE)
_NAME = re.compile(r"(.+)[_-]mask(?:_?\d+)?", re.IGNORECASE)


def masks_among(paths: Sequence[P], below: PurePath) -> list[P]:
    """The files that are masks by their names; empty if all files are.

    These are files in a folder of masks (``masks``, ``roi_masks``, TCIA's "ROI mask images") and files named after
    another image of the list (``x_mask.png``, ``x_mask_2.png`` for ``x.dcm``).

    Args:
        paths: the files.
        below: a folder; its own name and those of its parents are ignored.
    """
    stems = {stem_of(path).lower() for path in paths}
    found = [path for path in paths if in_mask_folder(path, below) or masked(path) in stems]
    return [] if len(found) == len(paths) else found


def in_mask_folder(path: PurePath, below: PurePath) -> bool:
    """Whether a folder between `below` and the file has the name of a folder of masks."""
    return any(map(names_masks, path.relative_to(below).parts[:-1]))


def names_masks(name: str) -> bool:
    """Whether this is the name of a folder of masks."""
    return _FOLDER.fullmatch(name) is not None


def masked(path: PurePath) -> str | None:
    """The lower-case stem of the image after which a mask is named; None for other names."""
    match = _NAME.fullmatch(stem_of(path))
    return None if match is None else match[1].lower()
