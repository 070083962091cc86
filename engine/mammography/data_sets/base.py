"""The interface of a reader of a public data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...datasets.tables.schema import Record
from .files import Files


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
    read: Callable[[Files], list[Record]]
    """Returns all images of its tables in their order, with `labels` filled in and `label` -1; files need not exist."""
    columns: tuple[str, ...] = ()
    """Columns that identify the table if its name is not specific."""
