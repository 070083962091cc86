"""The record of a run in its checkpoints; a resumed run must have the same settings.

Checkpoints contain no patients: the splits of images are reconstructed from a hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.dataset import exam_of
from ..datasets.masks import masks_of
from ..datasets.splits import assign_splits
from ..datasets.tables import SPLITS, Record
from ..errors import DataError, GigamorphError
from ..images.parallel import available_cpus
from ..models.folder import digest_of
from ..parallel.process_group import ProcessGroup
from ..versions import versions_of_results
from .checkpoint import read_record, scale_of
from .data import Data
from .folds import draw_folds
from .network import target_of
from .options import TrainOptions
from .target import Target

# Options that do not change the result.
_IRRELEVANT = ("memory_budget", "device", "weights", "split_image")


def make_record(data: Data, options: TrainOptions, group: ProcessGroup) -> dict[str, Any]:
    """The record for checkpoints, in addition to weights, state and Lightning's own entries."""
    parts = {name: images.records for name, images in data.parts.items()}
    return {
        "format": 1,
        "options": {**asdict(options), "memory_budget": options.budget},
        "images_at_once": group.at_once,
        "classes": list(data.classes),
        "target": data.target.to_plain(),
        "channels": data.channels,
        "preprocessing": data.preprocessing,
        # Checkpoints are passed on: they identify the split by a hash, without patients.
        "split": {
            "sha256": hash_of(parts),
            "truth_sha256": hash_of_truth(parts, data.target),
            "reading_sha256": hash_of_reading(
                parts, sides=data.preprocessing.get("flip") == "auto", exams=data.target.views is not None
            ),
            **{name: len(records) for name, records in parts.items()},
        },
        "weights_sha256": _weights_digest(options.weights),
        "versions": versions_of_results(),
    }


def _weights_digest(weights: str | Path | None) -> str | None:
    """The digest of a file or folder; None for weights that have only a name, such as timm's."""
    return digest_of(weights) if weights is not None and Path(weights).exists() else None


def scale_warning(weights: str | Path, preprocessing: Mapping[str, Any]) -> str | None:
    """A warning if a checkpoint's network was trained on another scale of grey values than the present one; else None.

    Scales differ if the means are more than half a standard deviation apart, or the standard deviations more than a
    factor of 1.5: scales measured on two data sets (``--mean auto``) always differ slightly.
    """
    path = Path(weights)
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    record = read_record(path) or {}
    before = scale_of(record, path)
    now = preprocessing.get("normalize")
    if before is None or now is None or len(before["mean"]) != len(now["mean"]):
        return None
    means, stds = (np.array([scale[name] for scale in (before, now)], float) for name in ("mean", "std"))
    if (abs(means[0] - means[1]) <= stds[0] / 2).all() and (abs(np.log(stds[0] / stds[1])) <= np.log(1.5)).all():
        return None
    return (
        f"{path}: was trained with mean {before['mean']} and std {before['std']}, but this run has mean "
        f"{now['mean']} and std {now['std']}; pass the former with --mean and --std"
    )


def require_same(stored: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Refuse to resume a run with different data or options.

    Raises:
        DataError: if the split or the labels differ.
        GigamorphError: if options differ.
    """
    if stored["options"]["seed"] != record["options"]["seed"]:  # the seed draws the split
        raise _changed_option(path, "seed", stored["options"]["seed"], record["options"]["seed"])
    if stored["split"]["sha256"] != record["split"]["sha256"]:
        raise DataError(f"{path}: belongs to another split of the data; resume with the table that it was started with")
    for name, value in stored.get("target", {}).items():
        now = record["target"].get(name)
        if not _equal(value, now):
            raise DataError(
                f"{path}: was started with target {name} {_MEANINGS.get(name, '')}{value}, not {now}; resume with the "
                "same labels and table"
            )
    truth = "masks" if record["target"]["kind"] == "masks" else "labels"
    reading = "sides, white levels" + (" or exams" if record["target"].get("views") else "")
    for key, what in (("truth_sha256", f"{truth} or frames"), ("reading_sha256", reading)):
        now = record["split"][key]
        if stored["split"].get(key, now) != now:  # checkpoints of older versions lack it
            raise DataError(f"{path}: was started with different {what} of the same images; resume with the same table")
    if stored.get("images_at_once", 1) != record["images_at_once"]:
        raise GigamorphError(
            f"{path}: was started with {stored.get('images_at_once', 1)} images at a time, one per device, not "
            f"{record['images_at_once']}; resume with the same number of devices"
        )
    given = dict(_flat(record["options"], ""))
    for name, value in _flat(stored["options"], ""):
        now = given.get(name)
        if name in _IRRELEVANT or (name == "epochs" and now > value):
            continue
        if name == "optimizer.momentum" and now is None:  # older versions stored one for every optimizer
            continue
        if now != value:
            raise _changed_option(path, name, value, now)
    weights = record["weights_sha256"]
    if weights is not None and stored.get("weights_sha256", weights) != weights:  # other folds would start from them
        reason = f"was started from other weights than {record['options']['weights']} now contains"
        raise DataError(f"{path}: {reason}; resume with the same weights")
    if stored["preprocessing"] != record["preprocessing"]:
        raise GigamorphError(f"{path}: was started with another preprocessing; resume with {stored['preprocessing']}")


def _changed_option(path: Path, name: str, before: Any, now: Any) -> GigamorphError:
    more = " or more" if name == "epochs" else ""
    return GigamorphError(f"{path}: was started with {name}={before!r}, not {now!r}; resume with the same value{more}")


_MEANINGS = {"center": "(the training images' mean) ", "spread": "(their standard deviation) "}


def _equal(before: Any, now: Any) -> bool:
    """Whether values are equal; means and deviations up to rounding."""
    if before == now:
        return True
    numbers = all(isinstance(one, list) and one and isinstance(one[0], float) for one in (before, now))
    return numbers and len(before) == len(now) and np.allclose(before, now, rtol=1e-9, atol=0)


def _flat(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    """Values with their dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("options", "rates"):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


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
