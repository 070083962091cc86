"""Pickle files read as data: lists, dictionaries, text and numbers; nothing is imported or called."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...images.rawfile import one_line


class Unread:
    """A placeholder for an object of any class."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, *_: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        return Unread

    def persistent_load(self, pid: Any, /) -> Any:
        return Unread()


def read_pickle(path: Path) -> Any:
    """The contents of a pickle file: lists, tuples, sets, dictionaries, text, numbers, None, and `Unread` for others.

    Raises:
        DataError: if the file is not a pickle, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle raises errors of all kinds
        raise DataError(f"{path}: not a pickle file, or damaged ({one_line(error)}); download it again") from error
