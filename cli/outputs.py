"""Checks of an output file before long work: it can be written, and overwrites nothing of value."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..engine.errors import DataError, GigamorphError
from ..engine.files import require_writable


def require_out(out: str | Path, read: Iterable[str | Path]) -> None:
    """Refuse an ``--out`` that is one of the input files ``read``, or that cannot be written."""
    if os.path.realpath(out) in {os.path.realpath(path) for path in read}:
        raise GigamorphError(f"{out}: is an input and would be overwritten; name another --out")
    require_writable(out)


def require_no_labels(out: str | Path) -> None:
    """Refuse an existing ``--out`` unless it is a table without labels; refuse one that cannot be written."""
    from ..engine.datasets.tables.cells import read_rows
    from ..engine.datasets.tables.schema import require_csv

    path = require_csv(out)
    require_writable(path)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        found = read_rows(path)
    except DataError as error:
        raise GigamorphError(f"{out}: exists and is not a table; name another --out") from error
    if any(row.get("label") for row in found.rows):
        raise GigamorphError(f"{out}: exists, and its labels would be overwritten; name another --out")
