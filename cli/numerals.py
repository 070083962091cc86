"""Counts with the right plural."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return a count with its noun, as in "1 image" or "2 images"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
