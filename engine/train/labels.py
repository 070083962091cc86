"""Checks of a table's labels before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..datasets.kinds import label_by_kind_warning
from ..datasets.tables import Record
from ..errors import DataError
from .target import Kind, Target


def check_names(table: str | Path, names: Sequence[str], kind: Kind, warn: Callable[[str], object]) -> None:
    """Refuse labels that differ only in case or blanks; warn of the assumed order of names."""
    spelt: dict[str, str] = {}
    for name in names:
        other = spelt.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise DataError(
                f"{table}: the labels {other!r} and {name!r} differ only in case or blanks; spell them alike, or list "
                "all in data.classes"
            )
    if not all(name.isdigit() for name in names) and (kind == "ordinal" or len(names) > 2):
        listed = "[" + ", ".join(f'"{name}"' for name in names) + "]"
        of = "" if kind == "ordinal" else "; breasts and exams have the highest class of their images"
        warn(f"the assumed order is {' < '.join(names)}{of}; change it by -o 'data.classes={listed}'")


def label_warnings(target: Target, train: Sequence[Record], val: Sequence[Record], table: Path) -> list[str]:
    """Warnings about the labels of training and validation samples.

    Raises:
        DataError: if all training samples have the same class, or each of several labels is constant.
    """
    if target.kind == "labels":
        return _label_set_warnings(target, train, table)
    if target.kind in ("classes", "ordinal"):
        return [*_class_warnings(target, train, val, table), *_unused_columns(train)]
    return []


def _class_warnings(target: Target, train: Sequence[Record], val: Sequence[Record], table: Path) -> list[str]:
    samples = "images" if target.views is None else "exams"
    learnt, seen = ({record.label for record in part} for part in (train, val))
    if len(learnt) == 1:
        name = target.names[learnt.pop()]
        raise DataError(f"{table}: all {len(train)} training {samples} have label {name}; training needs two classes")
    texts = [f"no training {samples[:-1]} has label {name}" for n, name in enumerate(target.names) if n not in learnt]
    texts += filter(None, [label_by_kind_warning((record.path, target.names[record.label]) for record in train)])
    if len(seen) == 1:
        name = target.names[seen.pop()]
        texts.append(
            f"all {len(val)} validation {samples} have label {name}: their AUC is undefined, and the loss selects "
            "the best epoch"
        )
    return texts


def _label_set_warnings(target: Target, train: Sequence[Record], table: Path) -> list[str]:
    truth = target.truth(train)
    constant = {
        name: values[0]
        for name, column in zip(target.names, truth.T, strict=True)
        if len(values := np.unique(column[~np.isnan(column)])) == 1
    }
    texts = [f"label_{name} is {value:g} for all training images that have one" for name, value in constant.items()]
    if len(texts) == len(target.names):
        raise DataError(f"{table}: {', '.join(texts)}; there is nothing to learn")
    return [f"{one}; nothing is learnt from it" for one in texts]


def _unused_columns(train: Sequence[Record]) -> list[str]:
    names = sorted({name for record in train for name in record.labels})
    # A label that was made from a column equals that column.
    if any(all(r.labels.get(name) == r.label for r in train) for name in names):
        return []
    columns = ", ".join(f"label_{name}" for name in names)
    return [f"columns {columns} are not learnt, only label (choose it with data convert --label)"] if columns else []
