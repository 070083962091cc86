"""Kinds of files: whether a label can be told by how an image was written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .tables.file_names import suffix_of


def kind_of_file(path: Path) -> str:
    """What a file is by its name: DICOM, PNG, ..."""
    suffix = suffix_of(path).removeprefix(".")
    names = dict.fromkeys(("dcm", "dicom", "dic", "dc3", "ima", ""), "DICOM") | {"jpeg": "JPG", "tif": "TIFF"}
    return names.get(suffix, suffix.upper())


def kinds_told(labelled: Iterable[tuple[Path, str]]) -> str:
    """What there is to say where the kind of a file tells its label: then a network may learn how images were written.

    Empty if there is one kind, or one of them has images of several labels, or all have the same.

    Args:
        labelled: files and their labels, of those that have one.
    """
    labels_of: dict[str, set[str]] = defaultdict(set)
    for path, label in labelled:
        labels_of[kind_of_file(path)].add(label)
    if len(set().union(*labels_of.values())) < 2 or any(len(labels) > 1 for labels in labels_of.values()):
        return ""
    told = ", ".join(f"{kind} have label {min(labels)}" for kind, labels in labels_of.items())
    return f"the kind of a file tells its label (all {told}): the network may learn how images were written"
