"""How reading a table that unpacks to gigabytes ends, in a process of its own."""

from __future__ import annotations

import resource
import sys
from collections import deque
from pathlib import Path

from gigamorph.engine.datasets.tables.cells import read_rows
from gigamorph.engine.datasets.tables.generic import stream_table
from gigamorph.engine.errors import DataError


def read(path: str) -> None:
    """Print the error of each way to read the table, and by how many KiB the peak of memory grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for way in (read_rows, lambda table: deque(stream_table(table, None, {}), 0)):
        try:
            way(Path(path))
            sys.exit("opened")
        except DataError as error:
            print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
