"""Which files of a folder are masks of others, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_FOLDER = re.compile(r"masks?|.*[ _-]masks|.*roi mask images.*", re.IGNORECASE)
_NAME = re.compile(r"(.+)[_-]mask(?:_?\d+)?", re.IGNORECASE)


def masks_among(paths: Sequence[Path], below: Path) -> list[Path]:
    """Those in a folder of masks (``masks``, ``roi_masks``, TCIA's "ROI mask images"), and those that are called after
    an image that is there too (``x_mask.png``, ``x_mask_2.png`` of ``x.dcm``); none if there is nothing else.

    Args:
        paths: of files.
        below: a folder, whose own name and those above it tell nothing.
    """
    stems = {path.stem.lower() for path in paths}
    found = [path for path in paths if _in_folder(path, below) or _of_another(path, stems)]
    return [] if len(found) == len(paths) else found


def _in_folder(path: Path, below: Path) -> bool:
    return any(_FOLDER.fullmatch(name) for name in path.relative_to(below).parts[:-1])


def _of_another(path: Path, stems: set[str]) -> bool:
    match = _NAME.fullmatch(path.stem)
    return match is not None and match[1].lower() in stems
