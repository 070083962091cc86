"""Rows of Parquet files as those of csv files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...images.rawfile import one_line

PARQUET = ".parquet"
_BATCH = 4096


def parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The names of the columns, and (place, row) of the rows one by one; `DataError` also while they are taken."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({one_line(error)})") from error

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        number = 0
        with file:
            try:
                for batch in file.iter_batches(_BATCH):
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", {name: _text(cell) for name, cell in cells.items()}
            except Exception as error:  # dates, durations and text that Python cannot hold raise errors of many kinds
                raise DataError(f"{path}: is damaged after row {number} ({one_line(error)}); write it again") from error

    return file.schema_arrow.names, rows()


def _text(cell: Any) -> str:
    """As the cell would stand in a csv file."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return json.dumps(cell, default=str) if isinstance(cell, list | dict) else str(cell).strip()
