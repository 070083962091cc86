"""File types: whether the type of a file reveals its label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .tables.file_names import suffix_of


def kind_of_file(path: Path) -> str:
    """The type of a file by its name: DICOM, PNG, ..."""
    suffix = suffix_of(path).removeprefix(".")
    names = dict.fromkeys(("dcm", "dicom", "dic", "dc3", "ima", ""), "DICOM") | {"jpeg": "JPG", "tif": "TIFF"}
    return names.get(suffix, suffix.upper())


def label_by_kind_warning(labelled: Iterable[tuple[Path, str]]) -> str:
    """A warning if the file type determines the label, because a network may then learn the file type.

    Empty if there is one type, if a type has images of several labels, or if all images have the same label.

    Args:
        labelled: the files that have a label, with the label.
    """
    labels_of: dict[str, set[str]] = defaultdict(set)
    for path, label in labelled:
        labels_of[kind_of_file(path)].add(label)
    if len(set().union(*labels_of.values())) < 2 or any(len(labels) > 1 for labels in labels_of.values()):
        return ""
    pairs = ", ".join(f"{kind} have label {min(labels)}" for kind, labels in labels_of.items())
    return f"the file type determines the label (all {pairs}): the network may learn the type"
