"""The images below a folder, file by file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from .left_out import UNREAD, is_left_out, made_by, tell_unread

SUFFIXES = {".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".pgm", ".tif", ".tiff", ".svs", ".npy", ".zarr", ""}
"""Of files that may be images; DICOM files often have none."""


def image_files(folder: Path) -> list[Path]:
    """Files that may be images, and zarr folders, which are one image each; sorted. See `iter_image_files`."""
    return list(iter_image_files(folder))


def iter_image_files(folder: Path, tell: bool = True) -> Iterator[Path]:
    """The same one by one: what is held are the names of one folder, and of those above it.

    A sub-folder that cannot be listed stands for its images: whoever reads it is told why. `DataError` if it is the
    folder itself.

    Args:
        tell: what is left out.
    """
    unread = Counter[str]()
    for entry in walk(folder, set(), unread, tell):
        if isinstance(entry, Path):
            yield entry
        elif entry.folder == folder:
            raise entry.error
        else:
            yield entry.folder
    if tell:
        tell_unread(folder, unread)


@dataclass(frozen=True)
class Unlisted:
    """A folder that cannot be listed, and why."""

    folder: Path
    error: DataError


def walk(folder: Path, seen: set[str], unread: Counter[str], tell: bool = True) -> Iterator[Path | Unlisted]:
    """Images below a folder, without the folders whose real paths are in `seen`: links may lead in a circle.

    Args:
        unread: counts files of other formats, by their suffix.
        tell: which folders are left out.
    """
    seen.add(os.path.realpath(folder))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Unlisted(folder, DataError(f"{folder}: cannot be listed ({error.strerror or error})"))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        directory = _is_folder(entry)
        if directory and entry.suffix.lower() != ".zarr":
            if os.path.realpath(entry) not in seen and not (is_left_out(entry) if tell else made_by(entry)):
                yield from walk(entry, seen, unread, tell)
        elif directory or entry.suffix.lower() in SUFFIXES:
            yield entry
        elif entry.suffix.lower() in UNREAD:
            unread[entry.suffix.lower()] += 1


def _is_folder(entry: Path) -> bool:
    """What may not be looked at is taken for a file, and reading it tells why."""
    try:
        return entry.is_dir()
    except OSError:
        return False
