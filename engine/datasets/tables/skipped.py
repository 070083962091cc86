"""What is left out of folders of images, and told: what commands of gigamorph wrote, and formats that are not read."""

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
"""Files that tell it, all of one of the groups."""
UNREAD = {
    *(".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jxl", ".ljpeg", ".heic"),
    *(".nii", ".nrrd", ".mha", ".mhd", ".npz", ".ndpi", ".mrxs"),
}
"""Of files that are images, too."""
CONVERTED = "data convert"
_NOTED = ("predict", "explain", CONVERTED)
BOOKS = ("parts", "quarantine")
"""Of folders with such a note: what is done."""


def tell_unread(folder: Path, found: Counter[str]) -> None:
    """Say how many files of each suffix in `UNREAD` a folder has."""
    if found:
        told = ", ".join(f"{count} {suffix}" for suffix, count in found.items())
        log.warning("%s: left out, because their format is not read: %s; convert them to PNG or TIFF", folder, told)


def is_left_out(folder: Path) -> bool:
    """Whether a folder inside one of images holds results, which is told."""
    command = made_by(folder)
    if command:
        tell_made(folder, command)
    return bool(command)


def tell_made(folder: Path, command: str) -> None:
    """Say whose results a folder holds, which is left out therefore."""
    named = f"; {folder / 'table.csv'} names its images" if command == CONVERTED else ""
    log.warning("%s: left out, because it holds what gigamorph %s wrote%s", folder, command, named)


def made_by(folder: Path) -> str:
    """The command whose results a folder holds; empty if it is of none."""
    try:
        for command, groups in _MADE_BY.items():
            if any(all((folder / name).is_file() for name in group) for group in groups):
                return command
        note = parse_json((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    kind = note.get("kind", "predict") if isinstance(note, dict) and "checkpoint" in note else ""
    return kind if kind in _NOTED else ""
