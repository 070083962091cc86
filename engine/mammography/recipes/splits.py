"""Splits of a recipe's images into training, validation and test: the table's own split, or a random one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...datasets.splits import assign_splits, fill_validation
from ...datasets.tables import Record
from ...errors import DataError
from ...train.run import Run
from ...train.stages import Stage

SplitOf = Literal["table", "drawn"]
""""table": the table's own split, if it has one. "drawn": a random split in any case."""


_OF_STAGES = ("epochs", "lr", "optimizer", "weight_decay", "batch_size", "accumulate", "plateau", "patience")


@dataclass(frozen=True)
class ImagesConfig:
    """The part of a recipe's configuration that describes its images and their splits."""

    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    voi: str = "auto"
    split: SplitOf = "table"
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Fractions of the patients for a random split into train, val and test."""

    def stage(self, name: str, **more: Any) -> Stage:
        """Return a stage of training with the recipe's settings of that kind; `more` replaces or adds some."""
        settings = {key: getattr(self, key) for key in _OF_STAGES if hasattr(self, key)}
        return Stage(name, **{**settings, **more})


def split_records(
    records: Sequence[Record], config: ImagesConfig, run: Run, *, table: str | Path = "", validation: bool = True
) -> list[Record]:
    """Return records with a split each (train, val or test), without a patient in two of them.

    The table's split is used as it is; without val, patients of train are moved to val in the proportions of
    `fractions`.


    Args:
        table: its name for errors.
        validation: whether the recipe uses val; if not, the table's train stays complete.

    Raises:
        DataError: only some records have a split, or a patient is in two of them.
    """
    if config.split == "drawn":
        records = [replace(record, split=None) for record in records]
    try:
        found = assign_splits(records, fractions=config.fractions, seed=run.seed)
    except DataError as error:
        raise DataError(f"{table}: {error}") from error
    if all(record.split != "test" for record in found):
        run.say("the split test has no images, so nothing is measured")
    if not validation:
        return found
    filled = fill_validation(found, fractions=config.fractions, seed=run.seed)
    if filled != found:
        patients = {record.patient_id for record in filled if record.split == "val"}
        run.say(f"the table has no split val: {len(patients)} patients of train are moved to val")
    return filled
