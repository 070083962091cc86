"""Images without side, view or exam, although other images of the patient have it.

Such an image is in no breast, pair or exam: as a group of its own it would be a third breast of the patient. If no
image of a patient has it, as in tables without the column, each image is a group, or all are one exam.
"""

from __future__ import annotations

from collections.abc import Sequence

GROUP_COLUMNS = {"laterality": ("a side", "breast"), "view": ("a view", "pair"), "exam_id": ("an exam", "exam")}
"""Columns: the name of their value, and the group that an image without the value is not in."""


def unplaced(patients: Sequence[str], values: Sequence[str]) -> list[int]:
    """The rows without a value whose patient has a value in another row; never rows without a patient ("")."""
    pairs = list(zip(patients, values, strict=True))
    known = {patient for patient, value in pairs if patient and value}
    return [number for number, (patient, value) in enumerate(pairs) if not value and patient in known]


def unplaced_line(column: str, count: int, first: str) -> str:
    """A warning about such images.

    Args:
        column: one of `GROUP_COLUMNS`.
        count: the number of images.
        first: name and line of the first image.
    """
    what, group = GROUP_COLUMNS[column]
    images = "1 image" if count == 1 else f"{count} images"
    return f"{images} without {what}, but others of their patient have one (first: {first}); they are in no {group}"
