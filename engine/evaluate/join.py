"""Joins columns of the predicted table to rows of images, breasts or exams."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..datasets.tables import Record
from ..datasets.tables.cells import Rows
from ..datasets.tables.generic import whole
from ..errors import DataError

KEYS = ("patient_id", "exam_id", "laterality")
"""Columns that identify a row; values of the table replace those of the predictions."""


def join(rows: Rows, own: Rows, table: Path) -> None:
    """Add the table's columns to the rows; existing values of a row remain, except for `KEYS`.

    Images are matched by path, and by frame if both have one. Breasts and exams get the values of all their images,
    with different texts joined by a plus sign, but not their labels, which are those of images.

    Args:
        rows: of the predictions.
        own: rows of the table.
        table: path of the table.

    Raises:
        DataError: if the table lacks a row or a key column, or has a row with different labels, splits or patients.
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
            remedy = missing_file_hint(row["image_path"]) if images else ""
            remedy = remedy or "use the table that was predicted"
            raise DataError(f"{rows.path}, {place}: {who} is not in {table}; {remedy}")
        for name in joined:
            given = sorted({one[name] for one in found} - {""})
            if row.get(name) and not (images and name in KEYS and given):
                continue
            if images and len(given) > 1 and (name in (*KEYS, "split") or name.startswith("label")):
                raise DataError(
                    f"{table}: {row['image_path']} occurs {len(found)} times, with {name} {' and '.join(given)}; "
                    "keep one, or for frames, add a column frame to the predictions"
                )
            row[name] = "+".join(given)
    rows.header.extend(name for name in joined if name not in rows.header)


class ImageRecords:
    """The records of a table, by file and frame.

    Args:
        records: of the table.
        table: path of the table, for messages.
    """

    def __init__(self, records: Sequence[Record], table: str | Path) -> None:
        self._table = table
        self._frames: dict[Path, dict[int | str | None, Record]] = {}
        for record in records:
            self._frames.setdefault(record.path.absolute(), {})[record.frame] = record

    def find(self, path: Path, row: Mapping[str, str]) -> Record | None:
        """The record of a row of predictions, or None. Frames must match if both have one.

        Raises:
            DataError: if the table has several frames of the file, and the row does not name one.
        """
        found = self._frames.get(path.absolute(), {})
        cell = frame_of(row)
        frame = int(cell) if cell.isdecimal() else cell or None
        if frame is None and len(found) > 1 and None not in found:
            raise DataError(f"{path} has several frames in {self._table}; predict again to get a column frame")
        return found.get(frame, next(iter(found.values()), None) if frame is None else found.get(None))


def frame_of(row: Mapping[str, str]) -> str:
    """The frame of a row; "" if there is none."""
    return whole(row.get("frame", ""))


def place_of(image: str, folder: Path) -> str:
    """The absolute path of an image in a table in a folder."""
    return os.path.abspath(folder / image)


def missing_file_hint(image: str) -> str:
    """The hint for a path of predictions that does not exist here; empty if it exists."""
    if os.path.isabs(image) or os.path.lexists(image):
        return ""
    return "the file does not exist: paths are relative to the folder where gigamorph predict ran; run it there"


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
