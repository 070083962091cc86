"""Splits by patient: a patient must not be in two of train, val and test, or the test result is too good."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import DataError
from .tables import SPLITS, Record


def assign_splits(
    records: Sequence[Record], *, fractions: tuple[float, float, float] = (0.7, 0.15, 0.15), seed: int = 0
) -> list[Record]:
    """Records with their split filled in; splits in the table are kept and only checked.

    Patients are drawn separately for each label; a patient has the highest label of its images. A label with at least
    as many patients as splits is in all splits. The same records, fractions and seed give the same splits, in any order
    of the records.

    Args:
        fractions: of the patients, for train, val and test; they sum to 1.

    Raises:
        DataError: if only some records have a split, or a patient is in two splits.
    """
    given = [record.split is not None for record in records]
    if any(given) and not all(given):
        raise DataError(f"{given.count(False)} of {len(records)} rows have no split; give it for all rows or for none")
    if not all(given) or not records:
        records = _draw(records, fractions, seed)
    check_leaks(records)
    return list(records)


def fill_validation(
    records: Sequence[Record], *, fractions: tuple[float, float, float] = (0.7, 0.15, 0.15), seed: int = 0
) -> list[Record]:
    """Records of an official split into train and test, with a part of the train patients moved to val.

    The share of val is its share of train and val in `fractions`; patients are drawn as in `assign_splits`. Records
    without a split, or with a val split, are returned unchanged.
    """
    if {record.split for record in records} - {"train", "test"} or not records:
        return list(records)
    check_leaks(records)
    train = [record for record in records if record.split == "train"]
    both = fractions[0] + fractions[1]
    shares = (fractions[0] / both, fractions[1] / both, 0.0) if both else (1.0, 0.0, 0.0)
    drawn = iter(_draw(train, shares, seed))
    return [next(drawn) if record.split == "train" else record for record in records]


def leaks(records: Sequence[Record]) -> dict[str, list[str]]:
    """Patients with images in more than one split, with these splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.split is not None:
            splits[record.patient_id].add(record.split)
    return {
        patient: [split for split in SPLITS if split in found] for patient, found in splits.items() if len(found) > 1
    }


def check_leaks(records: Sequence[Record]) -> None:
    """Raise a `DataError` if a patient has images in two splits; it names the first one and counts the others."""
    found = leaks(records)
    if found:
        first, splits = next(iter(found.items()))
        more = f" (and {len(found) - 1} more patients)" if len(found) > 1 else ""
        raise DataError(f"patient {first} is in {' and '.join(splits)}{more}; put all images of a patient in one split")


def _draw(records: Sequence[Record], fractions: tuple[float, float, float], seed: int) -> list[Record]:
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(f"split fractions {fractions} must be three non-negative numbers with sum 1")
    label_of: dict[str, int] = {}
    for record in records:
        label_of[record.patient_id] = max(record.label, label_of.get(record.patient_id, record.label))
    strata: dict[int, list[str]] = defaultdict(list)
    for patient in sorted(label_of):
        strata[label_of[patient]].append(patient)
    split_of: dict[str, str] = {}
    for label, patients in sorted(strata.items()):
        order = np.random.default_rng([seed, label + 1]).permutation(len(patients))
        bounds = np.cumsum(_counts(len(patients), fractions))
        for rank, number in enumerate(order):
            split_of[patients[number]] = SPLITS[int(np.searchsorted(bounds, rank, side="right"))]
    return [replace(record, split=split_of[record.patient_id]) for record in records]


def _counts(patients: int, fractions: tuple[float, ...]) -> list[int]:
    """The number of patients per split, by largest remainders; at least one if there are enough."""
    exact = [patients * fraction for fraction in fractions]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: patients - sum(counts)]:
        counts[i] += 1
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if patients >= len(wanted):
        for i in wanted:
            if counts[i] == 0:
                counts[counts.index(max(counts))] -= 1
                counts[i] = 1
    return counts
