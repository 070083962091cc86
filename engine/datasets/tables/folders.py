"""The images below a folder, file by file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from .file_names import suffix_of
from .skipped import CONVERTED, NOT_IMAGES, UNREAD, is_left_out, made_by, warn_of_results, warn_of_unread

SUFFIXES = {
    *(".dcm", ".dicom", ".dic", ".dc3", ".ima", ""),
    *(".png", ".jpg", ".jpeg", ".jls", ".pgm", ".tif", ".tiff", ".svs", ".npy", ".zarr"),
}
"""Suffixes of files that may be images; DICOM files often have none."""
_INDEX = "DICOMDIR"
"""The index of a DICOM medium, next to its images; the standard prescribes this name (PS3.10 8.6)."""


def image_files(folder: Path) -> list[Path]:
    """Files that may be images, and zarr folders (an image each), sorted. See `iter_image_files`."""
    return list(iter_image_files(folder))


def iter_image_files(folder: Path, warn: bool = True) -> Iterator[Path]:
    """Iterate over the same files; memory holds the names of one folder and of its parents.

    A sub-folder that cannot be listed is yielded in place of its images, and reading it reports the reason. Results of
    `gigamorph data convert` are left out if there are other images, because they may be copies of these.

    Args:
        folder: the folder.
        warn: whether to log warnings about files and folders that are left out.

    Raises:
        DataError: if the folder itself cannot be listed.
    """
    unread, converted, others = Counter[str](), list[Path](), False
    for entry in walk(folder, set(), unread, warn, converted):
        if isinstance(entry, Path):
            others = True
            yield entry
        elif entry.folder == folder:
            raise entry.error
        else:
            yield entry.folder
    if warn:
        warn_of_unread(folder, unread)
    for made in converted:
        if not others:
            yield from iter_image_files(made, warn)
        elif warn:
            warn_of_results(made, CONVERTED)


@dataclass(frozen=True)
class Unlisted:
    """A folder that cannot be listed, with the error."""

    folder: Path
    error: DataError


def walk(
    folder: Path, seen: set[str], unread: Counter[str], warn: bool = True, converted: list[Path] | None = None
) -> Iterator[Path | Unlisted]:
    """Iterate over the images below a folder, without folders whose real paths are in `seen`, because links may cycle.

    Args:
        folder: the folder.
        seen: the real paths of visited folders; it grows.
        unread: counts files of other formats by their suffix.
        warn: whether to log warnings about folders that are left out.
        converted: collects result folders of `gigamorph data convert`; None leaves them out like other results.
    """
    seen.add(os.path.realpath(folder))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Unlisted(folder, DataError(f"{folder}: cannot be listed ({error.strerror or error})"))
        return
    not_images = NOT_IMAGES if made_by(folder) == CONVERTED else ()
    for entry in entries:
        if entry.name.startswith(".") or entry.name in not_images or entry.name.upper() == _INDEX:
            continue
        directory = _is_folder(entry)
        if directory and entry.suffix.lower() != ".zarr":
            if os.path.realpath(entry) in seen:
                continue
            if converted is not None and made_by(entry) == CONVERTED:
                converted.append(entry)
            elif not (is_left_out(entry) if warn else made_by(entry)):
                yield from walk(entry, seen, unread, warn, converted)
        elif directory or suffix_of(entry) in SUFFIXES:
            yield entry
        elif suffix_of(entry) in UNREAD:
            unread[suffix_of(entry)] += 1


def _is_folder(entry: Path) -> bool:
    """Whether it is a folder; False without permission, because reading it as a file then reports the reason."""
    try:
        return entry.is_dir()
    except OSError:
        return False
