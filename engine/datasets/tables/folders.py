"""The images below a folder, file by file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from .file_names import suffix_of
from .skipped import BOOKS, CONVERTED, UNREAD, is_left_out, made_by, tell_made, tell_unread

SUFFIXES = {
    *(".dcm", ".dicom", ".dic", ".dc3", ".ima", ""),
    *(".png", ".jpg", ".jpeg", ".jls", ".pgm", ".tif", ".tiff", ".svs", ".npy", ".zarr"),
}
"""Of files that may be images; DICOM files often have none."""
_INDEX = "DICOMDIR"
"""The index of a DICOM medium, beside whose images it lies; the standard wants this name (PS3.10 8.6)."""


def image_files(folder: Path) -> list[Path]:
    """Files that may be images, and zarr folders, which are one image each; sorted. See `iter_image_files`."""
    return list(iter_image_files(folder))


def iter_image_files(folder: Path, tell: bool = True) -> Iterator[Path]:
    """The same one by one: what is held are the names of one folder, and of those above it.

    A sub-folder that cannot be listed stands for its images: whoever reads it is told why. `DataError` if it is the
    folder itself. What `gigamorph data convert` wrote is left out beside other images, of which it may be.

    Args:
        tell: what is left out.
    """
    unread, converted, others = Counter[str](), list[Path](), False
    for entry in walk(folder, set(), unread, tell, converted):
        if isinstance(entry, Path):
            others = True
            yield entry
        elif entry.folder == folder:
            raise entry.error
        else:
            yield entry.folder
    if tell:
        tell_unread(folder, unread)
    for made in converted:
        if not others:
            yield from iter_image_files(made, tell)
        elif tell:
            tell_made(made, CONVERTED)


@dataclass(frozen=True)
class Unlisted:
    """A folder that cannot be listed, and why."""

    folder: Path
    error: DataError


def walk(
    folder: Path, seen: set[str], unread: Counter[str], tell: bool = True, converted: list[Path] | None = None
) -> Iterator[Path | Unlisted]:
    """Images below a folder, without the folders whose real paths are in `seen`: links may lead in a circle.

    Args:
        unread: counts files of other formats, by their suffix.
        tell: which folders are left out.
        converted: gets the folders of `gigamorph data convert`; without it they are left out as others are.
    """
    seen.add(os.path.realpath(folder))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Unlisted(folder, DataError(f"{folder}: cannot be listed ({error.strerror or error})"))
        return
    books = BOOKS if made_by(folder) == CONVERTED else ()
    for entry in entries:
        if entry.name.startswith(".") or entry.name in books or entry.name.upper() == _INDEX:
            continue
        directory = _is_folder(entry)
        if directory and entry.suffix.lower() != ".zarr":
            if os.path.realpath(entry) in seen:
                continue
            if converted is not None and made_by(entry) == CONVERTED:
                converted.append(entry)
            elif not (is_left_out(entry) if tell else made_by(entry)):
                yield from walk(entry, seen, unread, tell, converted)
        elif directory or suffix_of(entry) in SUFFIXES:
            yield entry
        elif suffix_of(entry) in UNREAD:
            unread[suffix_of(entry)] += 1


def _is_folder(entry: Path) -> bool:
    """What may not be looked at is taken for a file, and reading it tells why."""
    try:
        return entry.is_dir()
    except OSError:
        return False
