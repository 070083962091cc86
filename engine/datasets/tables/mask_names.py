"""Which files of a folder are masks of others, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TypeVar

from .file_names import stem_of

P = TypeVar("P", bound=PurePath)
_FOLDER = re.compile(r"masks?|.*[ _-]masks|.*roi mask images.*", re.IGNORECASE)
_NAME = re.compile(r"(.+)[_-]mask(?:_?\d+)?", re.IGNORECASE)


def masks_among(paths: Sequence[P], below: PurePath) -> list[P]:
    """Those in a folder of masks (``masks``, ``roi_masks``, TCIA's "ROI mask images"), and those that are called after
    an image that is there too (``x_mask.png``, ``x_mask_2.png`` of ``x.dcm``); none if there is nothing else.

    Args:
        paths: of files.
        below: a folder, whose own name and those above it tell nothing.
    """
    stems = {stem_of(path).lower() for path in paths}
    found = [path for path in paths if in_mask_folder(path, below) or masked(path) in stems]
    return [] if len(found) == len(paths) else found


def in_mask_folder(path: PurePath, below: PurePath) -> bool:
    """Whether a folder between `below` and the file is one of masks."""
    return any(map(names_masks, path.relative_to(below).parts[:-1]))


def names_masks(name: str) -> bool:
    """Whether a folder of this name is one of masks."""
    return _FOLDER.fullmatch(name) is not None


def masked(path: PurePath) -> str | None:
    """The lower-case name, without suffix, of the image after which a mask is called; None of other names."""
    match = _NAME.fullmatch(stem_of(path))
    return None if match is None else match[1].lower()
