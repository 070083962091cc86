"""Parts of a page that are written already, beside a note of what each was made of."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..files import write_atomically
from ..versions import OWN


def note_of(settings: object, files: Iterable[Path]) -> str | None:
    """Of what a part is made: settings with a `repr` that says all, and files, by place, size and time.

    A hash alone, for pages name nobody. None where a file is not on this machine: then nothing is known.
    """
    told = [OWN, repr(settings)]
    try:
        for path in files:
            inside = sorted(path.rglob("*")) if path.is_dir() else []
            told += [repr((one.absolute(), one.stat().st_size, one.stat().st_mtime_ns)) for one in (path, *inside)]
    except OSError:
        return None
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def is_current(part: Path, note: str | None) -> bool:
    """Whether a part was written whole, and of the same."""
    beside = _beside(part)
    return note is not None and part.exists() and beside.is_file() and beside.read_text() == note


def remove(part: Path) -> None:
    """A part, if it is there; its note first."""
    _beside(part).unlink(missing_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def mark(part: Path, note: str | None) -> None:
    """A part is whole."""
    if note is not None:
        write_atomically(_beside(part), lambda path: path.write_text(note), "page")


def _beside(part: Path) -> Path:
    return part.with_name(f"{part.name}.made")
