"""Stores rows one by one: each is complete and durable, or absent, even if the process or the machine fails.

A shard of a run writes its rows to a journal, ``_00000003.jsonl``, one per line. When full, it is converted to the
part ``00000003.parquet``, which is created atomically, and the journal is removed. A journal with the number of an
existing part was left by a kill between these steps and has the same rows. An incomplete line was cut by a kill and was
never counted as done.

Parquet readers ignore names that begin with ``_``, so a folder of parts is always a valid data set.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import GigamorphError
from ..files import write_atomically
from ..parallel.lock import cannot_write
from ..parsing import is_whole, parse_json

ROWS = 10_000
"""Rows per part."""
# A sync may take milliseconds; it is limited to this fraction of the time.
_SHARE = 0.05

_NAMES = ("name", "mask", "heatmap")  # columns

Row = dict[str, Any]
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Parts:
    """Adds rows to a folder, which this process has locked.

    Args:
        folder: created with the first row.
        schema: of the parts.
        rows: maximum rows per part.

    Raises:
        GigamorphError: here and in all methods, if the folder cannot be read or written; earlier rows remain valid.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows: int = ROWS) -> None:
        self._folder, self._schema, self._most = folder, schema, rows
        self._file: int | None = None
        self._size = self._count = self._unsynced = 0
        self._synced, self._cost = time.monotonic(), 0.0
        self._number = 1
        with _write_errors(folder):
            self._recover()

    def append(self, row: Row) -> None:
        """Add a row. It survives a crash of this process immediately, and of the machine after the next `sync`."""
        line = _encode(row).encode() + b"\n"
        with _write_errors(self._folder):
            if self._file is None:
                self._open()
            assert self._file is not None
            try:
                rest = line
                while rest:  # a write may be partial, and raise its error only for the rest
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                    os.lseek(self._file, self._size, os.SEEK_SET)
                raise
        self._size += len(line)
        self._count += 1
        self._unsynced += 1

    def sync(self, *, now: bool = True) -> int:
        """Make the rows durable; returns their number. Unless `now`, only if it costs little time."""
        full = self._count >= self._most  # else parts, and their memory, would grow with the speed of images
        if not self._unsynced or not (now or full or (time.monotonic() - self._synced) * _SHARE >= self._cost):
            return 0
        assert self._file is not None
        began = time.monotonic()
        with _write_errors(self._folder):
            os.fsync(self._file)
        done, self._unsynced = self._unsynced, 0
        if self._count >= self._most:
            self.pack()
        self._synced = time.monotonic()
        self._cost = self._synced - began
        return done

    def pack(self) -> None:
        """Convert the journal to a part."""
        if self._count:
            journal = self._journal(self._number)
            rows = _lines(journal.read_bytes())[0]
            part = self._folder / f"{self._number:08d}.parquet"
            write_atomically(part, lambda path: _write(path, rows, self._schema), "part")
            with _write_errors(self._folder):
                _sync_folder(self._folder)
                self._close()
                journal.unlink()
            self._number, self._count, self._size = self._number + 1, 0, 0

    def close(self) -> None:
        """Make the rows durable and close the journal."""
        try:
            self.sync()
        finally:
            self._close()

    def _recover(self) -> None:
        """Continue the journal of the last process."""
        if not self._folder.is_dir():
            return
        parts = _numbers(path.stem for path in self._folder.glob("*.parquet"))
        journals = sorted(_numbers(path.stem[1:] for path in self._folder.glob("_*.jsonl")))
        for number in journals:
            if number in parts:
                self._journal(number).unlink()
        self._number = max(parts, default=0) + 1
        if self._journal(self._number).exists():
            self._open()

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._journal(self._number)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        rows, self._size = _lines(path.read_bytes())
        self._count = len(rows)
        if os.fstat(self._file).st_size > self._size:
            os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)
        os.fsync(self._file)
        _sync_folder(self._folder)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _journal(self, number: int) -> Path:
        return self._folder / f"_{number:08d}.jsonl"


def read_parts(folder: Path, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
    """The rows of all shards below a folder, in batches, including journals; other processes may write there.

    Raises:
        GigamorphError: if a part cannot be read.
    """
    for shard in sorted(path for path in folder.glob("*-of-*") if path.is_dir()):
        names = sorted(shard.glob("[0-9]*.parquet"))
        for path in names:
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(ROWS, columns=None if columns is None else list(columns)):
                        yield batch.to_pylist()
            except (OSError, pa.ArrowException) as error:
                said = " ".join(str(error).split())[:160]
                raise GigamorphError(
                    f"{path}: cannot be read ({said}); if you remove it, its images are predicted again"
                ) from error
        for path in sorted(shard.glob("_[0-9]*.jsonl")):
            if shard / f"{path.stem[1:]}.parquet" not in names:
                with contextlib.suppress(FileNotFoundError):  # it has just become a part, which another run will read
                    yield _lines(path.read_bytes())[0]


def read_results(folder: Path, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
    """`read_parts` of results, with a check of their file names, by which files are removed or sent to a store.

    Raises:
        GigamorphError: if a part cannot be read, or names a file in another folder.
    """
    for rows in read_parts(folder, columns):
        for name in (str(row[column]) for row in rows for column in _NAMES if row.get(column) is not None):
            if os.path.basename(name) != name:
                raise GigamorphError(f"{folder}: names the file {name!r} of another folder; name another --out")
        yield rows


def _numbers(names: Iterable[str]) -> set[int]:
    """The numbers of parts; files with other names are ignored."""
    return {int(name) for name in names if is_whole(name)}


def _lines(data: bytes) -> tuple[list[Row], int]:
    """The rows of a journal, and the end of the last complete one."""
    rows, end = [], 0
    while (stop := data.find(b"\n", end)) >= 0:
        try:
            row = parse_json(data[end:stop])
        except ValueError:  # after a power loss before the sync
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
        end = stop + 1
    return rows, end


def _write(path: Path, rows: Sequence[Row], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the directory entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        known = cannot_write(folder, error, "check the disk")
        raise GigamorphError(f"{known}; then continue with --resume") from error
