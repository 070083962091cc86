"""Counts with the right plural, and warnings."""

from __future__ import annotations

import rich_click as click


def warn(text: str) -> None:
    """Print a warning to standard error."""
    click.echo(f"warning: {text}", err=True)


def counted(number: int, thing: str) -> str:
    """Return a count with its noun, as in "1 image" or "2 images"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
