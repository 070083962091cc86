"""The command line called in this process, and the tables that it writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from gigamorph.cli.main import main


def run(*args: object) -> int | str | None:
    """Exit code of ``gigamorph ARGS``."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in args])
    return exit_.value.code


def rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))
