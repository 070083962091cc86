"""The images below a folder, file by file; names of masks; files and folders that are left out, with warnings."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TypeVar

from ...errors import DataError
from ...parsing import parse_json

SUFFIXES = {
    *(".dcm", ".dicom", ".dic", ".dc3", ".ima", ""),
    *(".png", ".jpg", ".jpeg", ".jls", ".jp2", ".pgm", ".tif", ".tiff", ".svs", ".npy", ".zarr"),
}
"""Suffixes of files that may be images; DICOM files often have none."""
_INDEX = "DICOMDIR"
"""The index of a DICOM medium, next to its images; the standard prescribes this name (PS3.10 8.6)."""


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


log = logging.getLogger("gigamorph")
_MADE_BY = {
    "train": (("last.ckpt",), ("best.ckpt",)),
    "eval": (("report.html", "metrics.json"),),
    "view": (("index.html", "view.js"),),
}
"""The files that identify the results of a command: all files of one of the groups."""
UNREAD = {
    *(".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jxl", ".ljpeg", ".heic"),
    *(".nii", ".nrrd", ".mha", ".mhd", ".npz", ".ndpi", ".mrxs"),
}
"""Suffixes of images in formats that are not supported."""
CONVERTED = "data convert"
_NOTED = ("predict", "explain", CONVERTED)
NOT_IMAGES = ("parts", "quarantine")
"""Sub-folders of converted data that hold records of progress, not images."""


def warn_of_unread(folder: Path, found: Counter[str]) -> None:
    """Log a warning with the number of files of each suffix in `UNREAD`."""
    if found:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in found.items())
        log.warning("%s: left out files of unsupported formats: %s; convert them to PNG or TIFF", folder, counts)


def is_left_out(folder: Path) -> bool:
    """Whether a folder of results is left out of a folder of images; logs a warning if so."""
    command = made_by(folder)
    if command:
        warn_of_results(folder, command)
    return bool(command)


def warn_of_results(folder: Path, command: str) -> None:
    """Log a warning that a folder is left out because it contains results of a command."""
    table = f"; {folder / 'table.csv'} lists its images" if command == CONVERTED else ""
    log.warning("%s: left out, because it contains results of gigamorph %s%s", folder, command, table)


def made_by(folder: Path) -> str:
    """The command that wrote the results in a folder; empty for other folders."""
    try:
        for command, groups in _MADE_BY.items():
            if any(all((folder / name).is_file() for name in group) for group in groups):
                return command
        note = parse_json((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    kind = note.get("kind", "predict") if isinstance(note, dict) and "checkpoint" in note else ""
    return kind if kind in _NOTED else ""


@dataclass
class LeftOutMasks:
    """The number of masks that were left out, and the first one."""

    count: int = 0
    first: PurePath | None = None

    def __str__(self) -> str:
        masks = "1 mask is" if self.count == 1 else f"{self.count} masks are"
        return f"{masks} left out, recognised by name, the first {self.first}; to read masks, pass their folder"


def images_without_masks(files: Callable[[bool], Iterable[Path]], below: Path, left: LeftOutMasks) -> Iterator[Path]:
    """Iterate over the files without masks, or over all files if all are masks.

    This is `masks_among` in the memory of the names of one folder: a file named after an image is its mask if the image
    is in the same folder.

    Args:
        files: returns an iterator over the files; its argument enables warnings about other files that are left out.
        below: as in `masks_among`.
        left: counts the masks that are left out.
    """

    @lru_cache(1)
    def stems(folder: Path) -> frozenset[str]:
        return frozenset(stem_of(entry).lower() for entry in folder.iterdir() if suffix_of(entry) in SUFFIXES)

    def is_mask(path: Path) -> bool:
        image = masked(path)
        return in_mask_folder(path, below) or (image is not None and image in stems(path.parent))

    if all(map(is_mask, files(False))):
        yield from files(True)
        return
    for path in files(True):
        if not is_mask(path):
            yield path
            continue
        left.count += 1
        left.first = left.first or path
