"""Rows of Parquet files as those of csv files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...images.rawfile import one_line
from .packed import FACTOR, most_of

PARQUET = ".parquet"
_BATCH = 4096


def parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The names of the columns, and (place, row) of the rows one by one; `DataError` also while they are taken."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = map(file.schema.column, range(len(file.schema)))
        texts = [one.path for one in columns if one.physical_type == "BYTE_ARRAY"]
        file.close()
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)  # so that a text that repeats is held once
        left = most_of(path) - _declared(file.metadata)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({one_line(error)})") from error

    if left < 0:
        raise _bomb(path)

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        number, room = 0, left
        with file:
            try:
                for batch in file.iter_batches(_BATCH):
                    room -= sum(map(_bytes, batch.columns))
                    if room < 0:
                        raise _bomb(path)
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", {name: _text(cell) for name, cell in cells.items()}
            except DataError:
                raise
            except Exception as error:  # dates, durations and text that Python cannot hold raise errors of many kinds
                raise DataError(f"{path}: is damaged after row {number} ({one_line(error)}); write it again") from error

    return file.schema_arrow.names, rows()


def _bomb(path: Path) -> DataError:
    return DataError(f"{path}: unpacks to more than {FACTOR} times its size; save it as csv if it is sound")


def _declared(metadata: Any) -> int:
    """Bytes of the columns by the file's own word, of packed values or of Python's."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(max(16 * column.num_values, column.total_uncompressed_size) for column in columns)


def _bytes(column: Any) -> int:
    """Of an array, with each of its texts."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute  # whose functions are made as it is imported
    if pyarrow.types.is_dictionary(column.type):
        lengths = compute.binary_length(column.dictionary)
        return compute.sum(compute.take(lengths, column.indices)).as_py() or 0
    if pyarrow.types.is_map(column.type):
        return _bytes(column.keys) + _bytes(column.items)
    if pyarrow.types.is_struct(column.type):
        return sum(map(_bytes, column.flatten()))
    return _bytes(column.flatten()) if pyarrow.types.is_nested(column.type) else column.nbytes


def _text(cell: Any) -> str:
    """As the cell would stand in a csv file."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return json.dumps(cell, default=str) if isinstance(cell, list | dict) else str(cell).strip()
