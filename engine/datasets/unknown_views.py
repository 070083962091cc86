"""Images whose side, view or exam is not known, where it is known of others of their patient.

Such an image is in no breast, pair or exam: taken for one of its own, it would be the third breast of a woman. Where no
image of a patient says it, as in tables without the column, each image stands for itself, or all are one exam.
"""

from __future__ import annotations

from collections.abc import Sequence

WHAT = {"laterality": ("a side", "breast"), "view": ("a view", "pair"), "exam_id": ("an exam", "exam")}
"""Columns: what they say, and what an image without it is not in."""


def unplaced(patients: Sequence[str], values: Sequence[str]) -> list[int]:
    """The rows without a value, where another row of their patient has one; never those without a patient ("")."""
    pairs = list(zip(patients, values, strict=True))
    known = {patient for patient, value in pairs if patient and value}
    return [number for number, (patient, value) in enumerate(pairs) if not value and patient in known]


def unplaced_line(column: str, count: int, first: str) -> str:
    """A warning of such images.

    Args:
        column: one of `WHAT`.
        first: name and place of the first one.
    """
    what, group = WHAT[column]
    images = "1 image" if count == 1 else f"{count} images"
    return f"{images} without {what}, where others of their patient have one (first: {first}); they are in no {group}"
