"""A temporary database of the images of a run and their states, on disk, with bounded memory.

It is rebuilt at every start from the table and the stored parts; SQLite removes it when the process ends or is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import os
import pickle
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..datasets.tables import READING, Record, reading_of
from ..datasets.tables.folders import LeftOutMasks
from ..datasets.tables.generic import is_absent
from ..datasets.unknown_views import unplaced_line
from ..errors import DataError, GigamorphError
from .rows import Row, Work, is_folder, is_table, rows_of, writable

_TABLES = """
create table rows (number integer primary key, key text not null, row blob not null, pixels integer not null);
create table images (number integer primary key, key text not null, shard integer not null default 1, name text);
create table done (key text primary key) without rowid;
create table failed (key text primary key, image text not null, reason text not null) without rowid;
create table results (key text primary key, result blob) without rowid;
create table items (number integer primary key, image text, patient text, exam text, side text, item blob);
create table numbers (kind text, name text, number integer, primary key (kind, name)) without rowid;
create unique index of_numbers on numbers (kind, number);
create table named (number integer primary key, name text not null);
create table sizes (number integer primary key, pixels integer not null);
create table shares (number integer primary key, shard integer not null);
create table stored (key text primary key) without rowid;
create table places (place blob primary key, source integer, label integer) without rowid;
create table names (name text primary key collate nocase) without rowid;
"""
# Items without a value that others of their patient have.
_UNPLACED = "({0} = '' and patient in (select patient from items where patient <> '' and {0} <> ''))"
Level = Literal["breast", "exam"]
Kind = Literal["P", "E"]
_NUMBERED = re.compile(r"[PE][0-9]{5,15}")
_CACHE_KIB = 16 * 1024
_MISSING = 3  # files that a message names
_NAMED = 5  # labels
log = logging.getLogger("gigamorph")


class RunDatabase:
    """The rows of a run; a context manager, which raises `GigamorphError` if the database cannot be written.

    Args:
        key: returns the key of a row's result.
    """

    def __init__(self, key: Callable[[Row], str]) -> None:
        self._key = key
        # A private file in TMPDIR, with a cache in memory.
        self._base = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode=memory", "synchronous=off", f"cache_size=-{_CACHE_KIB}", "temp_store=file"):
            self._base.execute(f"pragma {setting}")
        self._base.executescript(_TABLES)
        self.rows = self.images = 0
        self.sha256 = ""
        self._reading = set[str]()

    def __enter__(self) -> RunDatabase:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._base.close()
        if isinstance(error, sqlite3.Error):
            raise GigamorphError(f"cannot store the list of images in TMPDIR ({error}); free some space") from error

    def fill(
        self,
        sources: Sequence[str | Path | Record],
        classes: Sequence[str] | None,
        *,
        check_files: bool,
        skip: Path | None = None,
    ) -> list[str]:
        """Add the rows of all sources, in order; returns warnings about unknown labels, masks and repeated images.

        Args:
            sources: tables, folders, images or records.
            classes: names of the classes.
            check_files: raise an error for missing files, before any work.
            skip: a folder whose files are ignored.

        Raises:
            DataError: if a table is invalid, a file is missing (with ``check_files``), or there are no images.
        """
        texts: list[str] = []
        # Tables before folders, because the row of a table has more information on an image.
        for number, source in enumerate(sorted(sources, key=is_folder)):
            unknown, again, left = Counter[str](), Counter[str](), LeftOutMasks()
            rows = rows_of(source, classes, unknown, left, skip)
            with self._transaction():
                self._add(
                    rows if isinstance(source, Record) or len(sources) == 1 else self._new(rows, number, source, again)
                )
            if again:
                texts.append(f"{again.total()} images of {source} are repeated, and count once")
            if left.count:
                texts.append(f"{source}: {left}")
            if unknown and classes is not None:
                listed = ", ".join(f"{label} ({count})" for label, count in unknown.most_common(_NAMED))
                texts.append(
                    f"{source}: the labels of {unknown.total()} images are not among the classes {', '.join(classes)} "
                    f"and count as unknown: {listed}"
                )
        [self.rows] = self._one("select count(*) from rows")
        if not self.rows:
            raise DataError("no images to predict")
        if check_files:
            self._check_files()
        self._base.execute("insert into images (number, key) select min(number), key from rows group by key")
        self._base.execute("create unique index of_image on images (key)")
        [self.images] = self._one("select count(*) from images")
        digest = hashlib.sha256()
        for (key,) in self._base.execute("select key from rows order by number"):
            digest.update(key.encode())
        self.sha256 = digest.hexdigest()
        return texts

    @property
    def reading(self) -> list[str]:
        """The columns of `READING` that have values in the rows."""
        return [name for name in READING if name in self._reading]

    def resolve(self, change: Callable[[list[Record]], Sequence[Record]]) -> None:
        """Replace all records by `change` of all of them; needs memory for all rows."""
        rows = list(self.all_rows())
        changed = change([row.record for _, row in rows])
        for (number, row), record in zip(rows, changed, strict=True):
            blob = pickle.dumps(replace(row, record=record), 5)
            self._base.execute("update rows set row = ? where number = ?", (blob, number))

    def sample(self, count: int) -> list[Row]:
        """`count` rows, spread over the table."""
        wanted = sorted({round(n * (self.rows - 1) / max(count - 1, 1)) + 1 for n in range(count)})
        found = [self._one("select row from rows where number = ?", number) for number in wanted]
        return [pickle.loads(blob) for (blob,) in found]

    def measure(self, pixels: Callable[[Iterator[Row]], Iterable[int]]) -> None:
        """Look up the sizes of images whose table does not contain them."""
        unknown = "from images join rows using (number) where pixels = 0 order by number"
        numbers = (number for (number,) in self._base.execute(f"select number {unknown}"))
        rows = (pickle.loads(blob) for (blob,) in self._base.execute(f"select row {unknown}"))
        self._base.executemany("insert into sizes values (?, ?)", zip(numbers, pixels(rows), strict=True))
        self._base.execute("update rows set pixels = sizes.pixels from sizes where sizes.number = rows.number")

    def share_out(self, shards: int) -> None:
        """Assign images to shards with about equal numbers of pixels, reproducibly: the largest images first, each to
        the smallest shard (Graham's rule: no shard has more than 4/3 of the optimum)."""
        loads = [(0, 0, shard) for shard in range(1, shards + 1)]
        found = self._base.execute(
            "select number, pixels from images join rows using (number) order by pixels desc, images.key"
        )

        def shares() -> Iterator[tuple[int, int]]:
            for number, pixels in found:
                load, count, shard = loads[0]
                heapq.heapreplace(loads, (load + pixels, count + 1, shard))
                yield number, shard

        self._insert("insert into shares values (?, ?)", shares())
        self._base.execute("update images set shard = shares.shard from shares where shares.number = images.number")

    def add_done(self, results: Iterable[tuple[str, str | None]]) -> None:
        """Add the keys of images that have a result, and the names of their files."""
        with self._transaction():
            for key, name in results:
                self._base.execute("insert or ignore into done values (?)", (key,))
                if name:
                    self._base.execute("insert or ignore into names values (?)", (name,))

    def add_stored(self, keys: Iterable[str]) -> None:
        """Add the keys of documents that a store has."""
        self._insert("insert or ignore into stored values (?)", ((key,) for key in keys))

    def is_stored(self, key: str) -> bool:
        """Whether a store has a document."""
        return self._one("select count(*) from stored where key = ?", key)[0] > 0

    def add_failed(self, failures: Iterable[dict[str, Any]]) -> None:
        """Add failed images; the last reason replaces earlier ones."""
        values = ((failure["key"], failure["image_path"], failure["reason"]) for failure in failures)
        self._insert("insert or replace into failed values (?, ?, ?)", values)

    def name_files(self, wanted: Callable[[Row], str]) -> None:
        """Name the files of images without a result, as `wanted`, with -2, -3, ... if a name is taken."""
        found = self._base.execute(
            "select number, row from images join rows using (number) "
            "where images.key not in (select key from done) order by number"
        )
        with self._transaction():
            self._name(found, wanted)
        self._base.execute("update images set name = named.name from named where named.number = images.number")

    def _name(self, found: Iterable[tuple[int, bytes]], wanted: Callable[[Row], str]) -> None:
        for number, blob in found:
            stem, own, count = writable(wanted(pickle.loads(blob))), "", 0
            while not own:
                count += 1
                name = stem if count == 1 else f"{stem}-{count}"
                if self._base.execute("insert or ignore into names values (?)", (name,)).rowcount:
                    own = name
            self._base.execute("insert into named values (?, ?)", (number, own))

    def work(self, shard: int, *, failed: bool) -> Iterator[Work]:
        """The work of a shard, in the order of the table, including failed images with `failed`."""
        again = "" if failed else "and images.key not in (select key from failed)"
        found = self._base.execute(
            "select images.key, row, name from images join rows using (number) where shard = ? "
            f"and images.key not in (select key from done) {again} order by number",
            (shard,),
        )
        for key, blob, name in found:
            yield Work(key, pickle.loads(blob), name or "")

    def counts(self, shard: int | None = None) -> tuple[int, int, int]:
        """The numbers of images, of results and of failed images, of a shard or of all."""
        where = "1" if shard is None else f"shard = {shard}"
        [images] = self._one(f"select count(*) from images where {where}")
        [done] = self._one(f"select count(*) from images where {where} and key in (select key from done)")
        [failed] = self._one(
            f"select count(*) from images where {where} and key in (select key from failed) "
            "and key not in (select key from done)"
        )
        return images, done, failed

    def unlisted_results(self) -> int:
        """The number of results whose images are not in the table."""
        return self._one("select count(*) from done where key not in (select key from images)")[0]

    def failures(self) -> Iterator[tuple[str, str]]:
        """(image, reason) of failed images without a result, in the order of the table."""
        yield from self._base.execute(
            "select image, reason from images join failed using (key) "
            "where key not in (select key from done) order by number"
        )

    def all_rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row) in the order of the table."""
        for number, blob in self._base.execute("select number, row from rows order by number"):
            yield number, pickle.loads(blob)

    def joined(self, results: Iterable[dict[str, Any]]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """The rows with a result, and the result, in the order of the table."""
        values = ((result["key"], pickle.dumps(result, 5)) for result in results)
        with self._transaction():
            self._base.execute("delete from results")
            self._base.executemany("insert or ignore into results values (?, ?)", values)
        for blob, result in self._base.execute("select row, result from rows join results using (key) order by number"):
            yield pickle.loads(blob), pickle.loads(result)

    def store_items(self, items: Iterable[tuple[str, str, str, str, Any]]) -> None:
        """Store items with their image, patient, exam and side, which are "" where unknown."""
        values = ((*keys, pickle.dumps(item, 5)) for *keys, item in items)
        self._insert("insert into items (image, patient, exam, side, item) values (?, ?, ?, ?, ?)", values)

    def clear_items(self) -> None:
        """Delete the stored items."""
        self._base.execute("delete from items")

    def groups(self, level: Level) -> Iterator[list[Any]]:
        """The stored items, grouped by breast or exam, in the order of the first item of each group.

        Items of unknown breast or exam form groups of one item. They are left out with a warning where others of their
        patient have a side or exam, see `unknown_views`.
        """
        left_out, alone, column, side = _UNPLACED.format("exam"), "patient = ''", "exam_id", ""
        images = f"select image from items where {left_out} order by number"
        if level == "breast":
            images = f"select image from items where {_UNPLACED.format('side')} and not {left_out} order by number"
            left_out += f" or {_UNPLACED.format('side')}"
            alone, column, side = "patient = '' or side = ''", "laterality", "side, "
        if left := self._base.execute(images).fetchall():
            log.warning(unplaced_line(column, len(left), left[0][0]))
        group: list[Any] = []
        last = None
        found = (
            f"select min(number) over (partition by patient, exam, {side} case when {alone} then number end) as first, "
            f"item from items where not ({left_out}) order by first, number"
        )
        for first, blob in self._base.execute(found):
            if first != last and group:
                yield group
                group = []
            last = first
            group.append(pickle.loads(blob))
        if group:
            yield group

    def numbered(self, kind: Kind, name: str) -> str:
        """The pseudonym of a name: P00001 for a patient, E00001 for an exam, ..., distinct from names in the rows."""
        count = "select ?, ?, 1 + coalesce(max(number), 0) from numbers where kind = ?"
        self._base.execute(f"insert or ignore into numbers (kind, name, number) {count}", (kind, name, kind))
        return f"{kind}{self._one('select number from numbers where kind = ? and name = ?', kind, name)[0]:05d}"

    def _reserve_number(self, name: str | None) -> None:
        """Reserve the number of a name that has the form of `numbered`, as in tables of `gigamorph data index`."""
        if name and _NUMBERED.fullmatch(name):
            values = (name[0], name, int(name[1:]))
            self._base.execute("insert or ignore into numbers (kind, name, number) values (?, ?, ?)", values)

    def _add(self, rows: Iterable[Row]) -> None:
        def values() -> Iterator[tuple[str, bytes, int]]:
            for row in rows:
                self._reserve_number(row.record.patient_id)
                self._reserve_number(row.record.exam_id)
                self._reading.update(reading_of(row.record))
                yield self._key(row), pickle.dumps(row, 5), row.pixels

        self._base.executemany("insert into rows (key, row, pixels) values (?, ?, ?)", values())

    def _new(self, rows: Iterable[Row], number: int, source: str | Path, again: Counter[str]) -> Iterator[Row]:
        """The rows whose images are not in earlier sources; images of folders are unique. Single images always remain.

        Raises:
            DataError: if an earlier source has the image with another label.
        """
        named = not is_folder(source) and not is_table(source)
        for row in rows:
            label = row.record.label
            place = os.fsencode(row.url or f"{os.path.realpath(row.record.path)}\0{row.record.frame}")
            added = self._base.execute("insert or ignore into places values (?, ?, ?)", (place, number, label)).rowcount
            first, before = self._one("select source, label from places where place = ?", place)
            if added or named or (first == number and not is_folder(source)):
                yield row
                continue
            again["images"] += 1
            if label != before and min(label, before) >= 0:
                raise DataError(
                    f"{source}: {row.name} has label {label}, but {before} in an earlier source; keep one of them"
                )

    def _check_files(self) -> None:
        missing: list[Path] = []
        count = 0
        for _, row in self.all_rows():
            if not row.url and is_absent(row.record.path):
                count += 1
                missing += [row.record.path] if count <= _MISSING else []
        if count == 1:
            raise DataError(f"{missing[0]}: no such file")
        if count:
            names = ", ".join(map(str, missing)) + (", ..." if count > _MISSING else "")
            raise DataError(f"{count} of {self.rows} images do not exist: {names}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Context of a transaction, which makes many changes faster."""
        self._base.execute("savepoint together")
        yield
        self._base.execute("release together")

    def _insert(self, query: str, values: Iterable[tuple[object, ...]]) -> None:
        with self._transaction():
            self._base.executemany(query, values)

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        return self._base.execute(query, values).fetchone()
