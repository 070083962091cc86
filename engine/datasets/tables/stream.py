"""Tables of images to predict, read row by row: any length, in the memory of a row (csv) or row group (Parquet).

Excel sheets, which have at most a million rows, are read as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import DataError
from .cells import EXCEL, column_names, read_rows, stream_rows
from .generic import columns_of, to_record, whole
from .parquet import PARQUET, parquet_rows
from .schema import Record

TABLES = (".csv", ".tsv", ".txt", ".csv.gz", PARQUET, *EXCEL)
"""Suffixes of tables."""


def stream_table(path: Path, classes: Sequence[str] | None, unknown: Counter[str]) -> Iterator[tuple[str, Record]]:
    """Iterate over (cell image_path, record) of the rows of a csv, Parquet or Excel file; records as in `read_table`.

    In contrast to `read_table`, an image may be in several rows, and files need not exist.

    Args:
        path: the file.
        classes: the class names; a label becomes the index of its class, or -1. None reads no labels.
        unknown: counts the labels that are not classes.

    Raises:
        DataError: names the file and line of a problem; also during iteration.
    """
    found, rows = _rows(path)
    header, needed = columns_of(path, found, False, None)
    numbers = {name: number for number, name in enumerate(classes or ())}
    for place, cells in rows:
        row = dict(zip(header, cells.values(), strict=True))
        for name in needed:
            if not row[name]:
                raise DataError(f"{path}, {place}: {name} is empty; fill it in, or remove the row")
        label = -1
        if classes is not None and row.get("label"):
            label = numbers.get(whole(row["label"]), -1)
            if label < 0:
                unknown[row["label"]] += 1
        yield row["image_path"], to_record(path, place, row, label)


def _rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    if path.name.lower().endswith(PARQUET):
        names, rows = parquet_rows(path)
        return column_names(path, names), rows
    if path.name.lower().endswith(EXCEL):
        table = read_rows(path)
        return table.header, zip(table.places, table.rows, strict=True)
    return stream_rows(path)
