"""What a reader of a public data set offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .files import Files
from .schema import Record


@dataclass(frozen=True)
class DataSet:
    """A public data set: how to recognise it, what its labels mean, how to read it."""

    name: str
    """As on the command line."""
    title: str
    tables: tuple[str, ...]
    """Names of its tables as downloaded; a folder that holds one of them may be this data set."""
    rules: dict[str, str]
    """Label columns and what 1 and 0 mean; the first is the label unless another is chosen."""
    split: str
    """Which official split it has."""
    read: Callable[[Files], list[Record]]
    """All images of its tables, in their order, with `labels` filled in and `label` -1; files need not exist."""
    columns: tuple[str, ...] = ()
    """Of the table, where its name does not tell enough."""
