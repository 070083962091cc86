"""Columns of the table that was predicted from, joined to rows of images, breasts or exams."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..datasets.tables import Record
from ..datasets.tables.cells import Rows
from ..datasets.tables.generic import whole
from ..errors import DataError

KEYS = ("patient_id", "exam_id", "laterality")
"""Who and what a row is of; the table knows it best."""


def join(rows: Rows, own: Rows, table: Path) -> None:
    """Add the table's columns to the rows; what a row has is kept, but for `KEYS`.

    Images are known by their path, and by the frame where both say it. Breasts and exams take what all images of theirs
    say, texts that differ with a plus between them. Their truth is their own: the table's labels are of images.

    Args:
        own: the table's rows.

    Raises:
        DataError: a row that the table does not have, or has with two labels, splits or patients; no column to know it
            by.
    """
    header = own.header
    named = [{"exam_id": ""} | row for row in own.rows]
    keys = _keys_of(rows)
    if "image_path" in keys and "frame" in rows.header and "frame" in header:
        keys = (*keys, "frame")
    missing = [name for name in keys if name not in (*header, "exam_id")]
    if missing:
        raise DataError(f"{table}: column {', '.join(missing)} is missing; it has {', '.join(own.header)}")
    images = "image_path" in keys
    joined = [name for name in header if images or not (name == "image_path" or name.startswith("label"))]
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in named:
        groups.setdefault(_key(row, keys, table.parent), []).append(row)
    for place, row in zip(rows.places, rows.rows, strict=True):
        found = groups.get(_key(row, keys, Path()))
        if found is None:
            who = ", ".join(row[name] if name == "image_path" else f"{name} {row[name]!r}" for name in keys)
            remedy = elsewhere(row["image_path"]) if images else ""
            remedy = remedy or "give the table it was predicted from"
            raise DataError(f"{rows.path}, {place}: {who} is not in {table}; {remedy}")
        for name in joined:
            given = sorted({one[name] for one in found} - {""})
            if row.get(name) and not (images and name in KEYS and given):
                continue
            if images and len(given) > 1 and _is_one(name):
                raise DataError(
                    f"{table}: {row['image_path']} is there {len(found)} times, with {name} {' and '.join(given)}; "
                    "keep one, or, of frames, name the frame in a column of the predictions too"
                )
            row[name] = "+".join(given)
    rows.header.extend(name for name in joined if name not in rows.header)


def _is_one(name: str) -> bool:
    """Whether an image can have one value only in a column."""
    return name in (*KEYS, "split") or name.startswith("label")


class ImageRecords:
    """The records of a table, by file and frame.

    Args:
        table: their table.
    """

    def __init__(self, records: Sequence[Record], table: str | Path) -> None:
        self._table = table
        self._frames: dict[Path, dict[int | None, Record]] = {}
        for record in records:
            self._frames.setdefault(record.path.absolute(), {})[record.frame] = record

    def find(self, path: Path, row: Mapping[str, str]) -> Record | None:
        """The record of a row of predictions, whose frame counts where both name one; None if there is none.

        Raises:
            DataError: the table has several frames of the file, and the row does not say which.
        """
        found = self._frames.get(path.absolute(), {})
        cell = frame_of(row)
        frame = int(cell) if cell.isdecimal() else None
        if frame is None and len(found) > 1 and None not in found:
            raise DataError(f"{path} has several frames in {self._table}; predict again, which names the frame of each")
        return found.get(frame, next(iter(found.values()), None) if frame is None else found.get(None))


def frame_of(row: Mapping[str, str]) -> str:
    """The frame that a row names; "" if none."""
    return whole(row.get("frame", ""))


def place_of(image: str, folder: Path) -> str:
    """The path of an image that a table in a folder names."""
    return os.path.abspath(folder / image)


def elsewhere(image: str) -> str:
    """The remedy where a path of predictions names nothing here; empty where it does."""
    if os.path.isabs(image) or os.path.lexists(image):
        return ""
    return "nor is there such a file: paths are as gigamorph predict was given them, so go to the folder where it ran"


def _keys_of(rows: Rows) -> tuple[str, ...]:
    for level, keys in (("breast", KEYS), ("exam", KEYS[:2])):
        if level in rows.header and "image_path" not in rows.header:
            rows.require(*keys)
            return keys
    rows.require("image_path")
    return ("image_path",)


def _key(row: Mapping[str, str], keys: Sequence[str], folder: Path) -> tuple[str, ...]:
    cells = {**row, "frame": frame_of(row)}
    return tuple(place_of(row[name], folder) if name == "image_path" else cells[name] for name in keys)
