"""The command line called in this process, and the tables that it writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from gigamorph.cli.main import main
from gigamorph.engine.mammography.phantom import write_phantoms

SMALL_TRAINING = ["--model", "lesionnet?stages=1", "--mean", "0.3", "--std", "0.1", "--epochs", "1"]
"""Options of `gigamorph train` for one epoch of a small network."""


def run(*args: object) -> int | str | None:
    """Exit code of ``gigamorph ARGS``."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in args])
    return exit_.value.code


def rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def train_and_import(folder: Path, model: str = "lesionnet") -> Path:
    """The table of phantoms that a small network, in ``run`` and imported in ``net``, was trained on."""
    table = write_phantoms(folder, patients=6, height=128, width=96, seed=1)
    options = ["--model", model, "--epochs", "1", "--accumulate", "4", "--out", folder / "run"]
    assert run("train", table, *options) == 0
    assert run("import", model, "--weights", folder / "run" / "best.ckpt", "--out", folder / "net") == 0
    return table
