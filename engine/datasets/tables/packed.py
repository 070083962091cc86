"""The maximum size of an unpacked table: decompression bombs are refused in all formats."""

from __future__ import annotations

from pathlib import Path

FACTOR = 200  # rows that differ in more than a digit compress at most to a hundredth
_FREE = 2**26


def unpacked_limit(path: Path) -> int:
    """The maximum number of bytes to which a file may unpack."""
    return _FREE + FACTOR * path.stat().st_size
