"""Which images a recipe learns from, chooses by and is measured on: a table's own split, or one that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from ..datasets.splits import assign_splits, fill_validation
from ..datasets.tables import Record
from ..errors import DataError
from ..train.run import Run

SplitOf = Literal["table", "drawn"]
"""The split that the table gives, where it gives one; or one that is drawn whatever the table says."""


class Splitting(Protocol):
    """What a configuration says of splits."""

    @property
    def split(self) -> SplitOf: ...
    @property
    def fractions(self) -> tuple[float, float, float]:
        """Of the patients, for train, val and test."""
        ...


def split_records(
    records: Sequence[Record], config: Splitting, run: Run, *, table: str | Path = "", validation: bool = True
) -> list[Record]:
    """Records with train, val or test each, no patient in two of them.

    An official split runs as it is; where it has no val, patients of train become val, in the proportion that
    `fractions` have.

    Args:
        table: that errors name.
        validation: whether the recipe chooses anything by val; if not, all of an official train is trained on.

    Raises:
        DataError: if splits are given for some records only, or put a patient in two of them.
    """
    if config.split == "drawn":
        records = [replace(record, split=None) for record in records]
    try:
        found = assign_splits(records, fractions=config.fractions, seed=run.seed)
    except DataError as error:
        raise DataError(f"{table}: {error}") from error
    if all(record.split != "test" for record in found):
        run.say("there are no images in the split test, so nothing is measured")
    if not validation:
        return found
    filled = fill_validation(found, fractions=config.fractions, seed=run.seed)
    if filled != found:
        patients = {record.patient_id for record in filled if record.split == "val"}
        run.say(f"the table has no split val: {len(patients)} patients of train are val")
    return filled
