"""A public data set: its files below the folder of its download, and the interface of its reader."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...datasets.tables.cells import Rows, read_rows
from ...datasets.tables.schema import Record
from ...errors import DataError

Records = Iterable[Record]
unlabelled_record = functools.partial(Record, label=-1)
"""A record with `labels` but without `label`, which is one of them."""


class Files:
    """The folder of a data set, or a table of it with the images in the same folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(f"{path}: no such file or folder")
        self.folder = self.path if self.path.is_dir() else self.path.parent

    @functools.cached_property
    def _names(self) -> dict[str, list[Path]]:
        """Files below the folder by lower-case name, from a single walk."""
        found: dict[str, list[Path]] = {}
        seen: set[str] = set()
        for folder, folders, names in os.walk(self.folder, followlinks=True):
            if os.path.realpath(folder) in seen:  # links may cycle
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            folders.sort()
            for name in names:
                found.setdefault(name.lower(), []).append(Path(folder, name))
        return found

    def table(self, *names: str) -> Path | None:
        """The first table of these names (also as .gz), in the folder or below; None if none exists."""
        if self.path.is_file():
            own = self.path.name.lower().removesuffix(".gz")
            return self.path if own in {name.lower() for name in names} else None
        wanted = [name + ending for name in names for ending in ("", ".gz")]
        for name in wanted:
            if (self.folder / name).is_file():
                return self.folder / name
        below = (self._names.get(name.lower()) for name in wanted)
        return next((min(paths) for paths in below if paths), None)

    def rows(self, *names: str, sheet: str | None = None) -> Rows:
        """The rows of the first table of these names; `DataError` if none exists."""
        path = self.table(*names)
        if path is None:
            raise DataError(f"{self.path}: contains no {' or '.join(names)}; pass the folder of the data set")
        return read_rows(path, sheet=sheet)

    def find(self, path: str) -> Path | None:
        """The file with the name of `path`; of several, the one whose path shares the longest end with `path`.

        None if there is no such file, or if several share only the name.
        """
        wanted = path.replace("\\", "/")
        found = self._names.get(wanted.rpartition("/")[2].lower(), [])
        if len(found) < 2:
            return found[0] if found else None
        if self.folder / wanted in found:
            return self.folder / wanted
        shared = {file: _shared_end(file.parts, tuple(wanted.split("/"))) for file in found}
        most = max(shared.values())
        best = [file for file in found if shared[file] == most]
        return best[0] if len(best) == 1 and most > 1 else None

    def expect(self, path: str) -> Path:
        """The result of `find`, or the expected path of a missing file."""
        return self.find(path) or self.folder / path.replace("\\", "/").lstrip("/")

    def matching(self, suffixes: Iterable[str]) -> list[Path]:
        """All files with one of these suffixes, sorted."""
        endings = tuple(suffixes)
        return sorted(path for name, paths in self._names.items() if name.endswith(endings) for path in paths)


def _shared_end(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0].lower() == pair[1].lower(), pairs)))


@dataclass(frozen=True)
class DataSet:
    """A public data set: its tables, the meaning of its labels, and its reader."""

    name: str
    """The name on the command line."""
    title: str
    tables: tuple[str, ...]
    """The names of its tables as downloaded; a folder that contains one of them may be this data set."""
    rules: dict[str, str]
    """Label columns with the meaning of 1 and 0; the first is the label by default."""
    split: str
    """The official split."""
    read: Callable[[Files], Records]
    """Iterates over all images of its tables in order, with `labels` filled in and `label` -1; files need not exist."""
    columns: tuple[str, ...] = ()
    """Columns that identify the table if its name is not specific."""
