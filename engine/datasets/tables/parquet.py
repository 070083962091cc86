"""Rows of Parquet files, in the form of csv rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...images.rawfile import one_line

PARQUET = ".parquet"
FACTOR = 200  # rows that differ in more than a digit compress at most to a hundredth
_FREE = 2**26
_BATCH = 4096


def unpacked_limit(path: Path) -> int:
    """The maximum number of bytes to which a table may unpack, because decompression bombs are refused."""
    return _FREE + FACTOR * path.stat().st_size


def parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The names of the columns, and an iterator over (line, row), which may raise a `DataError` too."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = map(file.schema.column, range(len(file.schema)))
        texts = [one.path for one in columns if one.physical_type == "BYTE_ARRAY"]
        file.close()
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)  # stores repeated texts once
        left = unpacked_limit(path) - _declared_bytes(file.metadata)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is not a readable Parquet file ({one_line(error)})") from error

    if left < 0:
        raise _bomb(path)

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        number, free = 0, left
        with file:
            try:
                for batch in file.iter_batches(_BATCH):
                    free -= sum(map(_bytes, batch.columns))
                    if free < 0:
                        raise _bomb(path)
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", {name: _text(cell) for name, cell in cells.items()}
            except DataError:
                raise
            except Exception as error:  # dates, durations and text beyond Python's range raise errors of many kinds
                raise DataError(f"{path}: damaged after row {number} ({one_line(error)}); write it again") from error

    return file.schema_arrow.names, rows()


def _bomb(path: Path) -> DataError:
    return DataError(f"{path}: unpacks to more than {FACTOR} times its size; if you trust it, save it as csv")


def _declared_bytes(metadata: Any) -> int:
    """The bytes of the columns that the file declares, or of Python's values if those are more."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(max(16 * column.num_values, column.total_uncompressed_size) for column in columns)


def _bytes(column: Any) -> int:
    """The bytes of an array, with the text of each row."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are generated on import
    if pyarrow.types.is_dictionary(column.type):
        lengths = compute.binary_length(column.dictionary)
        return compute.sum(compute.take(lengths, column.indices)).as_py() or 0
    if pyarrow.types.is_map(column.type):
        return _bytes(column.keys) + _bytes(column.items)
    if pyarrow.types.is_struct(column.type):
        return sum(map(_bytes, column.flatten()))
    return _bytes(column.flatten()) if pyarrow.types.is_nested(column.type) else column.nbytes


def _text(cell: Any) -> str:
    """The cell as text of a csv file."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return json.dumps(cell, default=str) if isinstance(cell, list | dict) else str(cell).strip()
