"""Tracks the written parts of a page, by a note next to each part with a hash of its sources."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...files import write_atomically
from ...versions import OWN


def note_of(settings: object, files: Iterable[Path]) -> str | None:
    """The hash of a part's sources: settings with a complete `repr`, and files by path, size and time.

    It is a hash because pages must not contain names. None if a file is not local, because its state is unknown.
    """
    texts = [OWN, repr(settings)]
    try:
        for path in files:
            inside = sorted(path.rglob("*")) if path.is_dir() else []
            texts += [repr((one.absolute(), one.stat().st_size, one.stat().st_mtime_ns)) for one in (path, *inside)]
    except OSError:
        return None
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def is_current(part: Path, note: str | None) -> bool:
    """Whether a part is complete and was made from the same sources."""
    note_path = _note_path(part)
    return note is not None and part.exists() and note_path.is_file() and note_path.read_text() == note


def remove(part: Path) -> None:
    """Remove a part if it exists, its note first."""
    _note_path(part).unlink(missing_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def mark(part: Path, note: str | None) -> None:
    """Write the note of a complete part."""
    if note is not None:
        write_atomically(_note_path(part), lambda path: path.write_text(note), "page")


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.made")
