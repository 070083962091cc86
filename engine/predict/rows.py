"""Lists the images to predict: files, folders, tables of any length, DICOMweb stores and fsspec file systems."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..datasets.tables import Record, folders
from ..datasets.tables.generic import TABLES, stream_table
from ..errors import DataError
from ..images.dicomweb import Instance, is_dicomweb, parse_location, search
from ..images.remote import describe_error, file_system, is_url, with_retries
from ..parsing import is_whole


@dataclass(frozen=True)
class Row:
    """A row of a table: an image and its labels."""

    record: Record
    url: str = ""
    """URL of the image; empty for local files."""

    @property
    def name(self) -> str:
        """The name of the image in tables and messages, valid UTF-8, which file names may not be."""
        return _as_utf8(self.url or str(self.record.path))

    def key(self, model: str) -> str:
        """The key of a result: a hash of the image, the way that it is read, and the model.

        Args:
            model: SHA-256 of the checkpoint.
        """
        own = self.record
        parts = (model, self.url or os.path.abspath(own.path), own.frame, own.white, own.chest_wall, own.laterality)
        return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    @property
    def place(self) -> str:
        """The URL, or the path of the file."""
        return self.url or str(self.record.path)

    @property
    def stem(self) -> str:
        """The name of output files of the image, without a suffix."""
        return folders.stem_of(self.record.path)

    @property
    def pixels(self) -> int:
        """Rows times columns in the table (written by `gigamorph data index`); 0 if unknown."""
        sides = [self.record.extra.get(name, "") for name in ("rows", "columns")]
        return int(sides[0]) * int(sides[1]) if all(map(is_whole, sides)) else 0


@dataclass(frozen=True)
class Work:
    """An image to compute."""

    key: str
    row: Row
    name: str = ""
    """Name of output files of the image, without a suffix."""


def rows_of(
    source: str | Path | Record,
    classes: Sequence[str] | None,
    unknown: Counter[str],
    left: folders.LeftOutMasks,
    skip: Path | None = None,
) -> Iterator[Row]:
    """The rows of a table, the images of a folder (also of an fsspec file system, or a DICOMweb store), or one image.

    Args:
        source: a table, folder, image, URL or record.
        classes, unknown: see `stream_table`.
        left: counts masks in a folder, which are left out.
        skip: a folder whose files are ignored.

    Raises:
        DataError: if a table is invalid, or a folder cannot be listed.
    """
    if isinstance(source, Record):
        yield Row(source)
    elif is_dicomweb(str(source)):
        yield from _store_rows(str(source))
    elif is_url(str(source)):
        yield from (_url_row(Record(Path(), -1, url, patient_known=False), url) for url in _urls(str(source), left))
    elif is_table(source):
        for cell, record in stream_table(Path(source), classes, unknown):
            yield _url_row(record, cell) if is_url(cell) else Row(record)
    elif is_folder(source):
        found = False
        below = "" if skip is None else os.path.join(os.path.abspath(skip), "")

        def files(warn: bool) -> Iterator[Path]:
            for path in folders.iter_image_files(Path(source), warn):
                if not below or not os.path.abspath(path).startswith(below):
                    yield path

        for path in folders.images_without_masks(files, Path(source), left):
            found = True
            yield Row(Record(path, -1, _as_utf8(str(path)), patient_known=False))
        if not found:
            raise DataError(f"{source}: contains no images, also not in its sub-folders; check the path")
    else:
        yield Row(Record(Path(source), -1, _as_utf8(str(source))))


def is_folder(source: str | Path | Record) -> bool:
    """Whether the source is a local folder of images."""
    return not isinstance(source, Record) and Path(source).is_dir() and Path(source).suffix.lower() != ".zarr"


def is_table(source: str | Path) -> bool:
    """Whether the source is a csv or Parquet file, by its name."""
    return str(source).lower().endswith(TABLES)


def fetch(url: str, folder: Path) -> Path:
    """Download a file or zarr folder by fsspec into a folder; returns its path.

    Raises:
        DataError: if the download fails, after three attempts if the server is unreachable.
    """
    name = url.partition("::")[0].rstrip("/").rpartition("/")[2].partition("?")[0]
    target = folder / (name if name.strip(".") else "image")

    def get() -> Path:
        system, path = file_system(url)
        names = system.find(path) if system.isdir(path) else [path]
        # One target per file, because older versions of fsspec follow ".." in listed names.
        system.get(names, [str(target / _below(path, name)) for name in names])
        return target

    return with_retries(url, get)


def _below(folder: str, name: str) -> PurePosixPath:
    """The path of a listed file, relative to its folder.

    Raises:
        ValueError: if it is outside the folder.
    """
    found = PurePosixPath(name.strip("/")).relative_to(folder.strip("/"))
    if ".." in found.parts:
        raise ValueError(f"{name!r} is outside its folder")
    return found


def _store_rows(url: str) -> Iterator[Row]:
    place = parse_location(url)
    if place.instance:  # reading it will show whether it exists, as for a table's images
        yield _url_row(Record(Path(), -1, Instance(url).url, patient_known=False), url)
        return
    for own, found in search(url):
        extra: dict[str, str] = {}
        if found.get("Rows") and found.get("Columns"):  # for slides and stacks, the pixels of all frames
            extra = {"rows": str(found.Rows * int(found.get("NumberOfFrames") or 1)), "columns": str(found.Columns)}
        study = parse_location(own).study
        yield _url_row(Record(Path(), -1, own, exam_id=study, extra=extra, patient_known=False), own)


def _url_row(record: Record, url: str) -> Row:
    patient = record.patient_id if record.patient_known else url
    return Row(replace(record, path=Path(url), patient_id=patient), url)


def _urls(url: str, left: folders.LeftOutMasks) -> Iterator[str]:
    """The images below a folder of an fsspec file system, or the URL of a single image."""
    if is_table(url.partition("::")[0]):
        raise DataError(f"{url}: tables must be local files; download it")
    own, mark, rest = url.partition("::")
    if folders.suffix_of(Path(own.partition("?")[0])) in folders.SUFFIXES - {".zarr", ""}:
        yield url  # reading it will show whether it exists, as for a table's images
        return
    try:
        system, path = file_system(url)
        if own.rstrip("/").lower().endswith(".zarr") or not system.isdir(path):
            yield url
            return
        names = sorted(system.find(path))
    except DataError:
        raise
    except Exception as error:  # each file system has its own errors
        raise DataError(f"{url}: cannot be listed ({describe_error(error)})") from error
    protocol = own.partition("://")[0]
    found = [name for name in names if folders.suffix_of(Path(name)) in folders.SUFFIXES]
    if not found:
        raise DataError(f"{url}: contains no images; check the URL")
    images = [PurePosixPath(name.strip("/")) for name in found]
    masks = set(folders.masks_among(images, PurePosixPath(path.strip("/"))))
    left.count, left.first = len(masks), min(masks, default=None)
    for name in (name for name, image in zip(found, images, strict=True) if image not in masks):
        place = name if protocol in ("file", "local") else name.lstrip("/")
        yield name + mark + rest if "://" in name else f"{protocol}://{place}{mark}{rest}"


_LONGEST = 200  # bytes: file systems allow 255, including suffixes and temporary names


def writable(name: str) -> str:
    """A name for output files: valid UTF-8, and short enough for our suffixes."""
    return _as_utf8(name).encode()[:_LONGEST].decode(errors="ignore")


def _as_utf8(name: str) -> str:
    """A name with invalid UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
