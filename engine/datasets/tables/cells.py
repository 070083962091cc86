"""Rows of published tables: csv in all dialects, compressed or not, Parquet and Excel."""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ...errors import DataError
from ...files import write_atomically
from ...images.rawfile import one_line

EXCEL = (".xlsx", ".xls")
"""Suffixes of Excel files."""
# The default limit of a field is 128 KiB; outlines of findings are longer.
csv.field_size_limit(2**27)
# Cells that a spreadsheet would run as a formula, perhaps already escaped.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")
_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?[\r\n]*', re.IGNORECASE)
_EXCEL_MEMORY = 4 * 2**30
_CHUNK = 2**20
log = logging.getLogger("gigamorph")
_BREAKS = re.compile(r"[\r\n]+")


@dataclass(frozen=True)
class Rows:
    """The rows below the header of one table, as dictionaries of stripped text."""

    path: Path
    header: list[str]
    rows: list[dict[str, str]]
    places: list[str]
    """The line of each row for messages: "line 7", "row 7"."""

    def require(self, *names: str) -> None:
        """Raise a `DataError` if columns are missing."""
        missing = [name for name in names if name not in self.header]
        if missing:
            raise DataError(f"{self.path}: column {', '.join(missing)} is missing; it has {', '.join(self.header)}")

    def number(self, row: Mapping[str, str], column: str, place: str) -> float:
        """The number in a cell, maybe NaN; `DataError` for other text."""
        try:
            return float(row[column])
        except ValueError as error:
            raise DataError(f"{self.path}, {place}: {column} {no_number(row[column])}") from error


def read_rows(path: Path, *, sheet: str | None = None) -> Rows:
    """All rows of a csv (also .gz), Parquet, .xlsx or .xls file; empty rows and columns without a name are dropped.

    Separator (comma, semicolon, tab, or that of a first line sep=;) and line ends are detected; text is UTF-8,
    UTF-16 with a byte order mark, or cp1252, with a warning. Line breaks within a cell become blanks. Integers of
    Excel sheets lose their ".0".

    Args:
        path: the file.
        sheet: the sheet of an Excel file; the first one by default.

    Raises:
        DataError: names the file and the line.
    """
    header, found = stream_rows(path, sheet=sheet)
    pairs = list(found)
    return Rows(path, header, [row for _, row in pairs], [place for place, _ in pairs])


def stream_rows(path: Path, *, sheet: str | None = None) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The columns of a table, and an iterator over (line, row) as in `read_rows`; Excel files are read whole.

    Args:
        path: the file.
        sheet: the sheet of an Excel file; the first one by default.

    Raises:
        DataError: names the file and the line; also during iteration.
    """
    if path.name.lower().endswith(PARQUET):
        columns, found = parquet_rows(path)
        header = column_names(path, columns)
        return header, ((place, dict(zip(header, row.values(), strict=True))) for place, row in found)
    if path.name.lower().endswith(EXCEL):
        lines, unit = iter(_excel(path, sheet)), "row"
    else:
        lines, unit = _csv(path), "line"
    names = column_names(path, next(lines, (0, []))[1])

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        for number, cells in lines:
            row = _row(path, unit, number, cells, names)
            if row is not None:
                yield f"{unit} {number}", row

    return [name for name in names if name], rows()


def column_names(path: Path, cells: Sequence[str]) -> list[str]:
    """The cleaned names in a header, "" for a column without a name; `DataError` if it is empty or has duplicates."""
    if not any(cell.strip() for cell in cells):
        raise DataError(f"{path}: is empty; the first line must have the names of the columns")
    names = [_clean(cell) for cell in cells]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: duplicate column {twice[0]}; rename one")
    while not names[-1]:  # commas at line ends, which some tables have in the header only or in the rows only
        names.pop()
    return names


def _row(path: Path, unit: str, number: int, cells: Sequence[str], names: Sequence[str]) -> dict[str, str] | None:
    """A row as a dictionary by column name; None if it is empty."""
    values = [_clean(cell) for cell in cells]
    if not any(values):
        return None
    if unit == "line" and (len(values) < len(names) or any(values[len(names) :])):
        raise DataError(f"{path}, line {number}: has {len(values)} cells, but the header has {len(names)}; correct it")
    values += [""] * (len(names) - len(values))
    return {name: value for name, value in zip(names, values, strict=False) if name}


def no_number(cell: str, remedy: str = "") -> str:
    """Why a cell is not a finite number, with a remedy: to replace a decimal comma, otherwise `remedy`."""
    point = cell.replace(",", ".")
    if is_number(cell):
        reason = "is not finite"
    else:
        reason, remedy = "is not a number", f"write {point}" if is_number(point) else remedy
    return f"{cell!r} {reason}{remedy and '; '}{remedy}"


def is_number(text: str) -> bool:
    """Whether a cell is a number in a form that tables use; Python's float() also accepts 1_0."""
    return _NUMBER.fullmatch(text) is not None


def escape(value: object) -> str:
    """A cell for a csv file: text that a spreadsheet would run as a formula gets an apostrophe, removed by `read_rows`.

    Numbers are unchanged, also negative ones.
    """
    text = "" if value is None else str(value)
    return f"'{text}" if _FORMULA.match(text) and not is_number(text) else text


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], line_end: str = "\r\n") -> None:
    """Write a csv file atomically and durably; text that a spreadsheet would evaluate is escaped."""

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator=line_end)
            writer.writerow(header)
            writer.writerows([escape(cell) for cell in row] for row in rows)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write, "table")


def _clean(cell: str) -> str:
    cell = cell.strip()
    if cell.startswith("'") and _FORMULA.match(cell):
        cell = cell[1:]
    return " ".join(filter(None, map(str.strip, _BREAKS.split(cell)))) if _BREAKS.search(cell) else cell


def _encoding(path: Path) -> str:
    """The encoding of a csv file: UTF-16 by its first bytes (Excel's "Unicode text"), UTF-8, otherwise cp1252."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        chunk = file.read(_CHUNK)
        if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        try:
            while chunk:
                decoder.decode(chunk)
                chunk = file.read(_CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            _warn_of_encoding(path)
            return "cp1252"
    return "utf-8-sig"


@functools.cache  # commands read some tables twice
def _warn_of_encoding(path: Path) -> None:
    log.warning("%s: read as cp1252, because it is not in UTF-8; in Excel, save it as CSV UTF-8", path)


def _open(path: Path) -> IO[bytes]:
    return path.open("rb") if path.suffix != ".gz" else cast(IO[bytes], _LimitedGzip(path))


def _reader(lines: Iterator[str], first: str) -> tuple[int, Any]:
    """The number of lines before the rows, and a reader of the rows.

    Excel writes and reads a first line with the separator: ``sep=;``.
    """
    if named := _SEPARATOR.fullmatch(first):
        return 1, csv.reader(lines, delimiter=named[1], strict=True)
    separator = max(",;\t", key=first.count)
    return 0, csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of each row, without loading the file."""
    try:
        encoding = _encoding(path)
        with _open(path) as file:
            text = io.TextIOWrapper(file, encoding, "replace" if encoding == "cp1252" else "strict", newline="")
            lines = _without_zeros(text, path)
            begun, reader = _reader(lines, next(lines, ""))
            try:
                yield from ((begun + reader.line_num, cells) for cells in reader)
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {begun + reader.line_num}: is not a csv file ({error}); save it as one"
                ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is damaged ({error}); save it again (in Excel: CSV UTF-8)") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _without_zeros(lines: Iterable[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise DataError(f"{path}: is not a csv file (it contains zero bytes); save it as csv in UTF-8")
        yield line


def _excel(path: Path, sheet: str | None) -> list[tuple[int, list[str]]]:
    try:
        import python_calamine  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise DataError(
            f"{path}: Excel files need python-calamine: pip install python-calamine, or save it as csv"
        ) from error
    child = Path(__file__).with_name("excel_child.py")
    command = [sys.executable, "-P", str(child), str(path), sheet or "", str(_EXCEL_MEMORY)]
    run = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    errors = run.stderr.decode(errors="replace")
    if run.returncode == 1 and "MemoryError" not in errors:
        raise DataError(f"{path}: is not a readable Excel file ({' '.join(errors.split())}); save it as csv")
    if run.returncode:
        raise DataError(f"{path}: reading needs more than {_EXCEL_MEMORY // 2**30} GiB; save it as csv")
    return list(enumerate(json.loads(run.stdout), 1))


class _LimitedGzip(gzip.GzipFile):
    """A .gz file that is decompressed up to the size limit of tables."""

    def read1(self, size: int = -1) -> bytes:
        data = super().read1(size)
        if self.tell() > unpacked_limit(Path(self.name)):
            raise DataError(
                f"{self.name}: unpacks to more than {FACTOR} times its size; if you trust it, unpack it yourself"
            )
        return data


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
