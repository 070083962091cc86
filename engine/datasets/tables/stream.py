"""Tables of images to predict, row by row: of any length, in the memory of one row (csv) or row group (Parquet)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from .cells import column_names, stream_rows
from .generic import columns_of, to_record, whole
from .schema import Record

TABLES = (".csv", ".tsv", ".txt", ".csv.gz", ".parquet")
"""What the name of a table to predict from ends with."""
_BATCH = 4096


def stream_table(path: Path, classes: Sequence[str] | None, unknown: Counter[str]) -> Iterator[tuple[str, Record]]:
    """(cell image_path, record) of every row of a csv or Parquet file, with what `read_table` reads of a row.

    Unlike there an image may stand in several rows, and whether files exist is not looked at.

    Args:
        classes: names of the classes, whose numbers the labels become, -1 where there is none; None reads no labels.
        unknown: counts the labels that are none of the classes.

    Raises:
        DataError: what is wrong with the table, with file and line; also while the rows are taken.
    """
    found, rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else stream_rows(path)
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


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({' '.join(str(error).split())[:160]})") from error
    names = column_names(path, file.schema_arrow.names)

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        number = 0
        with file:
            try:
                for batch in file.iter_batches(_BATCH):
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", {name: _text(cell) for name, cell in cells.items()}
            except (OSError, pyarrow.ArrowException) as error:
                said = " ".join(str(error).split())[:160]
                raise DataError(f"{path}: is damaged after row {number} ({said}); write it again") from error

    return names, rows()


def _text(cell: Any) -> str:
    """As the cell would stand in a csv file."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return json.dumps(cell) if isinstance(cell, list | dict) else str(cell).strip()
