"""The splits of images in a training, reconstructed from the hash in a checkpoint, which contains no patients."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..datasets.exams import exam_of
from ..datasets.masks import masks_of
from ..datasets.splits import assign_splits
from ..datasets.tables import SPLITS, Record
from ..errors import DataError
from ..images.parallel import available_cpus
from .folds import draw_folds
from .network import target_of
from .target import Target

_FOLDS = 10  # larger cross-validations are not reconstructed


def hash_of(parts: Mapping[str, Sequence[Record]]) -> str:
    """SHA-256 of the images, patients and labels of each split."""
    # Only the last two parts of a path: the folder may have moved before a resume.
    split = {name: [["/".join(r.path.parts[-2:]), r.patient_id, r.label] for r in part] for name, part in parts.items()}
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()


def hash_of_truth(parts: Mapping[str, Sequence[Record]], target: Target) -> str:
    """SHA-256 of the labels, or masks, of each image."""
    digest = hashlib.sha256()
    for part in parts.values():
        for record, truth in zip(part, _truths(part, target), strict=True):
            digest.update(json.dumps(["/".join(record.path.parts[-2:]), record.frame, truth]).encode())
    return digest.hexdigest()


def hash_of_reading(parts: Mapping[str, Sequence[Record]], *, sides: bool = True, exams: bool = True) -> str:
    """SHA-256 of the table's columns on how images are read, and of the grouping of images into exams.

    Args:
        parts: records of each split.
        sides: whether images are mirrored by laterality.
        exams: whether the views of an exam are one sample.
    """
    digest = hashlib.sha256()
    for part in parts.values():
        numbers: dict[tuple[str, ...], int] = {}  # exams may have been renamed
        for record in part:
            values: list[Any] = [record.frame, record.white, record.chest_wall]
            values.append(record.laterality if sides and record.chest_wall is None else None)
            values.append(numbers.setdefault(exam_of(record), len(numbers)) if exams else None)
            digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def _truths(records: Sequence[Record], target: Target) -> Iterable[list[Any]]:
    """The truth of each image, as plain values."""
    if target.kind != "masks":
        return target.truth(records).tolist()
    with ThreadPoolExecutor(available_cpus()) as pool:
        return list(pool.map(lambda record: [_digest(path) for path in masks_of(record)], records))


def _digest(path: Path) -> str:
    if path.is_dir():  # a zarr folder
        return "/".join(path.parts[-2:])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_splits(records: Sequence[Record], trained: Mapping[str, Any]) -> list[Record]:
    """Records with the split that they had in a training, if known.

    If the records are the training's table, the splits are drawn again by its seed and verified by the hash. Images
    without labels get the split of their patient. For other tables, the records keep the split of their table, or None.

    Args:
        records: images of a table.
        trained: the record of a checkpoint.
    """
    with contextlib.suppress(DataError, KeyError):  # other images, or a recipe's checkpoint, which has no hash
        own, seed = trained["split"], trained["options"]["seed"]
        learnt = target_of(trained).known(records) if "target" in trained else records
        if len(learnt) != sum(own.get(name, 0) for name in SPLITS):
            return list(records)
        for drawn in _draws(learnt, seed):
            parts = {name: [record for record in drawn if record.split == name] for name in SPLITS}
            # Counts first, because the hash of a large table takes long.
            if all(len(part) == own.get(name, len(part)) for name, part in parts.items()) and (
                hash_of(parts) == own["sha256"]
            ):
                split_of = {record.patient_id: record.split for record in drawn}
                return [replace(record, split=split_of.get(record.patient_id, record.split)) for record in records]
    return list(records)


def _draws(records: Sequence[Record], seed: int) -> Iterator[list[Record]]:
    """The split of a single run, and those of cross-validations."""
    yield assign_splits(records, seed=seed)
    for count in range(2, _FOLDS + 1):
        yield from draw_folds(records, count, seed)
