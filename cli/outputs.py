"""What is looked at before long work whose result goes to one file: that it loses nothing, and can be written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..engine.errors import DataError, GigamorphError
from ..engine.files import require_writable


def require_out(out: str | Path, read: Iterable[str | Path]) -> None:
    """Refuse an ``--out`` that is one of the files that are ``read``, or that cannot be written."""
    if os.path.realpath(out) in {os.path.realpath(path) for path in read}:
        raise GigamorphError(f"{out}: is read, and would be lost; name another --out")
    require_writable(out)


def require_no_labels(out: str | Path) -> None:
    """Refuse an ``--out`` that is there and is more than a table without labels, or that cannot be written."""
    from ..engine.datasets.tables.cells import read_rows
    from ..engine.datasets.tables.schema import require_csv

    path = require_csv(out)
    require_writable(path)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        found = read_rows(path)
    except DataError as error:
        raise GigamorphError(f"{out}: is there, and is no table; name another --out") from error
    if any(row.get("label") for row in found.rows):
        raise GigamorphError(f"{out}: is there, and its labels would be lost; name another --out")
