"""How much a packed table may unpack to: a bomb of a few bytes is refused, whatever its format."""

from __future__ import annotations

from pathlib import Path

FACTOR = 200  # rows that differ in more than a digit are packed to a hundredth at best
_FREE = 2**26


def most_of(path: Path) -> int:
    """Bytes."""
    return _FREE + FACTOR * path.stat().st_size
