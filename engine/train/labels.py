"""What a look at a table's labels tells before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..datasets.kinds import label_by_kind_warning
from ..datasets.tables import Record
from ..errors import DataError
from .target import Kind, Target


def check_names(table: str | Path, names: Sequence[str], kind: Kind, warn: Callable[[str], object]) -> None:
    """Refuse labels that are one but for their spelling; warn of the order in which names are taken."""
    spelt: dict[str, str] = {}
    for name in names:
        other = spelt.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise DataError(
                f"{table}: the labels {other!r} and {name!r} differ in case or blanks alone; write them alike, or name "
                "all in data.classes"
            )
    if not all(name.isdigit() for name in names) and (kind == "ordinal" or len(names) > 2):
        told = "[" + ", ".join(f'"{name}"' for name in names) + "]"
        of = "" if kind == "ordinal" else ", by which breasts and exams have the highest class of their images"
        warn(f"the order taken is {' < '.join(names)}{of}; another one is given by -o 'data.classes={told}'")


def labels_told(target: Target, train: Sequence[Record], val: Sequence[Record], table: Path) -> list[str]:
    """What people should know of the labels of training and validation samples.

    Raises:
        DataError: all training samples have one label, or, of several labels, each is the same for all.
    """
    if target.kind == "labels":
        return _of_labels(target, train, table)
    if target.kind in ("classes", "ordinal"):
        return [*_of_classes(target, train, val, table), *_columns_left(train)]
    return []


def _of_classes(target: Target, train: Sequence[Record], val: Sequence[Record], table: Path) -> list[str]:
    samples = "images" if target.views is None else "exams"
    learnt, seen = ({record.label for record in part} for part in (train, val))
    if len(learnt) == 1:
        name = target.names[learnt.pop()]
        raise DataError(f"{table}: all {len(train)} training {samples} have label {name}; training needs another class")
    told = [f"no training {samples[:-1]} has label {name}" for n, name in enumerate(target.names) if n not in learnt]
    told += filter(None, [label_by_kind_warning((record.path, target.names[record.label]) for record in train)])
    if len(seen) == 1:
        name = target.names[seen.pop()]
        told.append(
            f"all {len(val)} validation {samples} have label {name}: their AUC is not defined, and the loss chooses "
            "the best epoch"
        )
    return told


def _of_labels(target: Target, train: Sequence[Record], table: Path) -> list[str]:
    truth = target.truth(train)
    constant = {
        name: values[0]
        for name, column in zip(target.names, truth.T, strict=True)
        if len(values := np.unique(column[~np.isnan(column)])) == 1
    }
    told = [f"label_{name} is {value:g} for all training images that have one" for name, value in constant.items()]
    if len(told) == len(target.names):
        raise DataError(f"{table}: {', '.join(told)}; nothing is to learn")
    return [f"{one}; nothing is learnt of it" for one in told]


def _columns_left(train: Sequence[Record]) -> list[str]:
    names = sorted({name for record in train for name in record.labels})
    # A label that was made from a column is that column.
    if any(all(r.labels.get(name) == r.label for r in train) for name in names):
        return []
    told = ", ".join(f"label_{name}" for name in names)
    return [f"columns {told} are not learnt, label is (data convert --label makes another one it)"] if told else []
