"""Which split of a training an image was in, as far as a checkpoint can tell: it knows the split, not who is in it."""

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

_FOLDS = 10  # of larger cross-validations it is not known


def hash_of(parts: Mapping[str, Sequence[Record]]) -> str:
    """SHA-256 of which images, patients and labels are in which split."""
    # The last two parts of a path: the folder may have moved when a run is resumed.
    split = {name: [["/".join(r.path.parts[-2:]), r.patient_id, r.label] for r in part] for name, part in parts.items()}
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()


def hash_of_truth(parts: Mapping[str, Sequence[Record]], target: Target) -> str:
    """SHA-256 of what the table, and its masks, say of each image that is learnt."""
    digest = hashlib.sha256()
    for part in parts.values():
        for record, truth in zip(part, _truths(part, target), strict=True):
            digest.update(json.dumps(["/".join(record.path.parts[-2:]), record.frame, truth]).encode())
    return digest.hexdigest()


def hash_of_reading(parts: Mapping[str, Sequence[Record]], *, sides: bool = True, exams: bool = True) -> str:
    """SHA-256 of what the table says of how each image is read, and with which others it is one exam.

    Args:
        sides: whether an image is turned by its laterality. exams: whether views of an exam are one sample.
    """
    digest = hashlib.sha256()
    for part in parts.values():
        numbers: dict[tuple[str, ...], int] = {}  # exams may be named in another way
        for record in part:
            told: list[Any] = [record.frame, record.white, record.chest_wall]
            told.append(record.laterality if sides and record.chest_wall is None else None)
            told.append(numbers.setdefault(exam_of(record), len(numbers)) if exams else None)
            digest.update(json.dumps(told).encode())
    return digest.hexdigest()


def _truths(records: Sequence[Record], target: Target) -> Iterable[list[Any]]:
    """Plain values for each."""
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
    """Records with the split that they had in a training, as far as it is known.

    The table of the training gives the splits of the training: drawn again by its seed, with the same hash; images that
    it left out, for they say nothing of what is learnt, have their patient's. Of other images it is the split that
    their table names, or None.

    Args:
        trained: what a checkpoint says of its network.
    """
    with contextlib.suppress(DataError, KeyError):  # other images; a recipe's checkpoint, which keeps no hash
        own, seed = trained["split"], trained["options"]["seed"]
        learnt = target_of(trained).known(records) if "target" in trained else records
        if len(learnt) != sum(own.get(name, 0) for name in SPLITS):
            return list(records)
        for drawn in _draws(learnt, seed):
            parts = {name: [record for record in drawn if record.split == name] for name in SPLITS}
            # Counts first, for the hash of a large table takes long.
            if all(len(part) == own.get(name, len(part)) for name, part in parts.items()) and (
                hash_of(parts) == own["sha256"]
            ):
                split_of = {record.patient_id: record.split for record in drawn}
                return [replace(record, split=split_of.get(record.patient_id, record.split)) for record in records]
    return list(records)


def _draws(records: Sequence[Record], seed: int) -> Iterator[list[Record]]:
    """The split of a run by itself, and those of cross-validations."""
    yield assign_splits(records, seed=seed)
    for count in range(2, _FOLDS + 1):
        yield from draw_folds(records, count, seed)
