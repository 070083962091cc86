"""Files and folders that are left out of folders of images, with warnings: results of gigamorph, other formats."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from ...parsing import parse_json

log = logging.getLogger("gigamorph")
_MADE_BY = {
    "train": (("last.ckpt",), ("best.ckpt",)),
    "eval": (("report.html", "metrics.json"),),
    "view": (("index.html", "view.js"),),
}
"""The files that identify the results of a command: all files of one of the groups."""
UNREAD = {
    *(".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jxl", ".ljpeg", ".heic"),
    *(".nii", ".nrrd", ".mha", ".mhd", ".npz", ".ndpi", ".mrxs"),
}
"""Suffixes of images in formats that are not supported."""
CONVERTED = "data convert"
_NOTED = ("predict", "explain", CONVERTED)
NOT_IMAGES = ("parts", "quarantine")
"""Sub-folders of converted data that hold records of progress, not images."""


def warn_of_unread(folder: Path, found: Counter[str]) -> None:
    """Log a warning with the number of files of each suffix in `UNREAD`."""
    if found:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in found.items())
        log.warning("%s: left out files of unsupported formats: %s; convert them to PNG or TIFF", folder, counts)


def is_left_out(folder: Path) -> bool:
    """Whether a folder of results is left out of a folder of images; logs a warning if so."""
    command = made_by(folder)
    if command:
        warn_of_results(folder, command)
    return bool(command)


def warn_of_results(folder: Path, command: str) -> None:
    """Log a warning that a folder is left out because it contains results of a command."""
    table = f"; {folder / 'table.csv'} lists its images" if command == CONVERTED else ""
    log.warning("%s: left out, because it contains results of gigamorph %s%s", folder, command, table)


def made_by(folder: Path) -> str:
    """The command that wrote the results in a folder; empty for other folders."""
    try:
        for command, groups in _MADE_BY.items():
            if any(all((folder / name).is_file() for name in group) for group in groups):
                return command
        note = parse_json((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    kind = note.get("kind", "predict") if isinstance(note, dict) and "checkpoint" in note else ""
    return kind if kind in _NOTED else ""
