"""What a checkpoint says of its run, and whether a run that goes on is the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, GigamorphError
from ..models.folder import digest_of
from ..parallel.process_group import ProcessGroup
from ..versions import versions_of_results
from .data import Data
from .options import TrainOptions
from .splits import hash_of, hash_of_reading, hash_of_truth
from .stored import read_record, scale_of

# Where and in how much memory a step is computed does not change what it computes.
_FREE = ("memory_budget", "device", "weights", "split_image")


def make_record(data: Data, options: TrainOptions, group: ProcessGroup) -> dict[str, Any]:
    """What a checkpoint says besides weights, state and what Lightning needs."""
    parts = {name: images.records for name, images in data.parts.items()}
    return {
        "format": 1,
        "options": {**asdict(options), "memory_budget": options.budget},
        "images_at_once": group.at_once,
        "classes": list(data.classes),
        "target": data.target.to_plain(),
        "channels": data.channels,
        "preprocessing": data.preprocessing,
        # A checkpoint is passed on: it tells whether a split is the same, not who is in it.
        "split": {
            "sha256": hash_of(parts),
            "truth_sha256": hash_of_truth(parts, data.target),
            "reading_sha256": hash_of_reading(
                parts, sides=data.preprocessing.get("flip") == "auto", exams=data.target.views is not None
            ),
            **{name: len(records) for name, records in parts.items()},
        },
        "weights_sha256": _digest(options.weights),
        "versions": versions_of_results(),
    }


def _digest(weights: str | Path | None) -> str | None:
    """Of a file or a folder; others (of timm, say) are known by their name."""
    return digest_of(weights) if weights is not None and Path(weights).exists() else None


def scale_told(weights: str | Path, preprocessing: Mapping[str, Any]) -> str | None:
    """A line where a checkpoint's network has learnt on another scale of grey values than it gets now; else None.

    Scales count as another where a value would be moved by half a standard deviation, or spread half as much again:
    those that two sets of images measure (``--mean auto``) are always a little apart.
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
        f"{path}: has learnt on grey values of mean {before['mean']} and std {before['std']}, and gets them by mean "
        f"{now['mean']} and std {now['std']}; give its own with --mean and --std"
    )


def require_same(stored: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Refuse to go on with a run as another one.

    Raises:
        DataError: it has another split, or learns other labels. GigamorphError: other options.
    """
    if stored["options"]["seed"] != record["options"]["seed"]:  # it draws the split
        raise _other(path, "seed", stored["options"]["seed"], record["options"]["seed"])
    if stored["split"]["sha256"] != record["split"]["sha256"]:
        raise DataError(f"{path}: belongs to another split of the data; resume with the table it was begun with")
    for name, value in stored.get("target", {}).items():
        now = record["target"].get(name)
        if not _equal(value, now):
            raise DataError(
                f"{path}: was begun to learn {name} {_TOLD.get(name, '')}{value}, not {now}; resume with the labels, "
                "and the table, that it was begun with"
            )
    truth = record["split"]["truth_sha256"]
    if stored["split"].get("truth_sha256", truth) != truth:  # checkpoints of older versions do not say
        what = "masks" if record["target"]["kind"] == "masks" else "labels"
        raise DataError(
            f"{path}: was begun with other {what} or frames of the same images; resume with those it was begun with"
        )
    reading = record["split"]["reading_sha256"]
    if stored["split"].get("reading_sha256", reading) != reading:
        what = "sides, white levels" + (" or exams" if record["target"].get("views") else "")
        raise DataError(
            f"{path}: was begun with other {what} of the same images; resume with the table it was begun with"
        )
    if stored.get("images_at_once", 1) != record["images_at_once"]:
        raise GigamorphError(
            f"{path}: was begun with {stored.get('images_at_once', 1)} images at a time, each on a device of its own, "
            f"not {record['images_at_once']}; resume with as many devices"
        )
    given = dict(_flat(record["options"], ""))
    for name, value in _flat(stored["options"], ""):
        now = given.get(name)
        if name in _FREE or (name == "epochs" and now > value):
            continue
        if name == "optimizer.momentum" and now is None:  # runs of older versions say one of every optimizer
            continue
        if now != value:
            raise _other(path, name, value, now)
    weights = record["weights_sha256"]
    if weights is not None and stored.get("weights_sha256", weights) != weights:  # other folds would begin from them
        told = f"was begun from other weights than {record['options']['weights']} has now"
        raise DataError(f"{path}: {told}; resume with those it was begun from")
    if stored["preprocessing"] != record["preprocessing"]:
        raise GigamorphError(f"{path}: was begun with another preprocessing; resume with {stored['preprocessing']}")


def _other(path: Path, name: str, before: Any, now: Any) -> GigamorphError:
    more = " or more" if name == "epochs" else ""
    return GigamorphError(f"{path}: was begun with {name}={before!r}, not {now!r}; resume with the same{more}")


_TOLD = {"center": "(the training images' mean) ", "spread": "(their standard deviation) "}


def _equal(before: Any, now: Any) -> bool:
    """Means and deviations up to the order of their sums."""
    if before == now:
        return True
    numbers = all(isinstance(one, list) and one and isinstance(one[0], float) for one in (before, now))
    return numbers and len(before) == len(now) and np.allclose(before, now, rtol=1e-9, atol=0)


def _flat(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    """Values by their dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("options", "rates"):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value
