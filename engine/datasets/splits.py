"""Splits by patient: no patient may be in two of train, val and test, or the test flatters the model."""

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
    """Records with their split filled in; splits that the table gives are kept and only checked.

    fractions: of the patients, for train, val and test; they add up to 1. Patients are drawn separately for every
    label (a patient counts for the highest label of its images), and a label with at least as many patients as there
    are splits is in all of them. The same records, fractions and seed give the same splits, whatever their order.

    Raises `DataError` if splits are given for some records only, or put a patient in two of them.
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
    """Records of an official split into train and test only, with part of the patients of train moved to val.

    The share of val is that which `fractions` give to val of train and val together; drawn as in `assign_splits`.
    Records that have no split, or a val already, come back unchanged.
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
    """Patients with images in more than one split, and which splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.split is not None:
            splits[record.patient_id].add(record.split)
    return {
        patient: [split for split in SPLITS if split in found] for patient, found in splits.items() if len(found) > 1
    }


def check_leaks(records: Sequence[Record]) -> None:
    """`DataError` that names the first patient with images in two splits, and counts them."""
    found = leaks(records)
    if found:
        first, splits = next(iter(found.items()))
        more = f" (and {len(found) - 1} more patients)" if len(found) > 1 else ""
        raise DataError(f"patient {first} is in {' and '.join(splits)}{more}; put all images of a patient in one split")


def _draw(records: Sequence[Record], fractions: tuple[float, float, float], seed: int) -> list[Record]:
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(f"split fractions {fractions} must be three numbers from 0 that add up to 1")
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
        for place, number in enumerate(order):
            split_of[patients[number]] = SPLITS[int(np.searchsorted(bounds, place, side="right"))]
    return [replace(record, split=split_of[record.patient_id]) for record in records]


def _counts(patients: int, fractions: tuple[float, ...]) -> list[int]:
    """How many patients each split gets: largest remainders, and one at least where there are enough."""
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
