"""Pickle files read as data: lists, dictionaries, text and numbers, and nothing in them is imported or called."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...images.rawfile import one_line


class Unread:
    """Stands for an object of any class, which is not made."""

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
    """What a pickle file holds, with `Unread` for all that is no list, tuple, set, dictionary, text, number or None.

    Raises `DataError` that names the file if it is no pickle or damaged.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle shows in errors of every kind
        raise DataError(f"{path}: is no pickle file, or damaged ({one_line(error)}); fetch it again") from error
