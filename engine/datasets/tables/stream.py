"""Tables of images to predict, row by row: of any length, in the memory of one row (csv) or row group (Parquet).

Sheets of Excel, which end at a million rows, are read at once.
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
"""What the name of a table to predict from ends with."""


def stream_table(path: Path, classes: Sequence[str] | None, unknown: Counter[str]) -> Iterator[tuple[str, Record]]:
    """(cell image_path, record) of every row of a csv, Parquet or Excel file, with what `read_table` reads of a row.

    Unlike there an image may stand in several rows, and whether files exist is not looked at.

    Args:
        classes: names of the classes, whose numbers the labels become, -1 where there is none; None reads no labels.
        unknown: counts the labels that are none of the classes.

    Raises:
        DataError: what is wrong with the table, with file and line; also while the rows are taken.
    """
    found, rows = _rows(path)
    header, needed = columns_of(path, found, False, None)
    numbers = {name: number for number, name in enumerate(classes or ())}
    for place, cells in rows:
        row = dict(zip(header, cells.values(), strict=True))
        for name in needed:
            if not row[name]:
                raise DataError(f"{path}, {place}: {name} is empty; fill it in, or leave the row out")
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
