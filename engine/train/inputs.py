"""From a table, a folder or single files to the images of a run."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..datasets.augment import Augment
from ..datasets.dataset import ImageDataset
from ..datasets.exams import ExamDataset
from ..datasets.grey import grey_warnings
from ..datasets.splits import assign_splits, check_leaks
from ..datasets.tables import Record, label_columns, read_table
from ..errors import DataError
from ..images.levels import White
from ..images.pixels import Normalize
from ..models.views import Views
from .data import Data, samples_of
from .data_statistics import normalize_of, unreadable
from .folds import draw_folds
from .labels import check_names, labels_told
from .mask_target import read_masks
from .target import Kind, Target


@dataclass(frozen=True)
class Labels:
    """What of a table is learnt.

    Attributes:
        kind: as in `Target`.
        names: of "labels" and "numbers" the columns label_NAME; all of them where none is named.
        classes: of "classes" and "ordinal" their names in order; as in `read_table` where none is named. Of "masks"
            the names of 0, 1, ...
        views: how the views of an exam (patient, exam_id) are one sample, as in `Target`; None takes single images.
    """

    kind: Kind = "classes"
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    views: Views | None = None


@dataclass(frozen=True)
class Chosen:
    """What of a table is learnt from: its images, what is learnt of them, and those that were left out, with why."""

    records: list[Record]
    target: Target
    left_out: Mapping[Path, str]


def choose_images(
    table: str | Path,
    *,
    labels: Labels | None = None,
    channels: int = 1,
    voi: str = "auto",
    for_processing: bool = False,
    white: White | None = None,
    skip_bad: bool = False,
    warn: Callable[[str], object] = warnings.warn,
    **others: Any,
) -> Chosen:
    """Read a table, and with ``skip_bad`` all its images, as `training_data` does: once, where several runs take it.

    Args:
        others: what else `training_data` takes, and is no matter here.

    Raises:
        DataError: what is wrong with the table.
    """
    bad: dict[Path, str] = {}
    records, target = _read(table, labels or Labels(), not skip_bad, warn, bad)
    if skip_bad:
        records = _without_bad(images(records, channels, _prepared(None, voi, 1, for_processing, white)), warn, bad)
    return Chosen(records, target, bad)


def _prepared(normalize: Any, voi: str, downsample: int, for_processing: bool, white: White | None) -> dict[str, Any]:
    return {
        "normalize": (normalize if isinstance(normalize, Normalize) else Normalize()).to_dict(),
        "voi": voi,
        "flip": "auto",
        "downsample": downsample,
        **({"for_processing": True} if for_processing else {}),
        **({} if white is None else {"white": white}),
    }


def training_data(
    table: str | Path,
    *,
    labels: Labels | None = None,
    channels: int = 1,
    normalize: Normalize | Literal["auto"] | None = None,
    voi: str = "auto",
    downsample: int = 1,
    for_processing: bool = False,
    white: White | None = None,
    augment: Augment | None = None,
    skip_bad: bool = False,
    fold: tuple[int, int] | None = None,
    chosen: Chosen | None = None,
    seed: int = 0,
    warn: Callable[[str], object] = warnings.warn,
) -> Data:
    """The images of a csv or of a folder per class, split by patient as the table says, or drawn by the seed.

    Only the training images are varied as ``augment`` says, anew in each epoch. ``warn`` is called with what a look at
    a few training images tells: a grey scale or a normalisation that cannot be theirs.

    Args:
        normalize: "auto" takes mean and standard deviation of a sample of the training images, see `survey`.
        skip_bad: read all images first, and leave out those that cannot be.
        fold: (k, n): the k-th of n runs of a cross-validation, from 1; see `folds.draw_folds`.
        chosen: what `choose_images` has found in the table; None looks now.

    Raises:
        DataError: what is wrong with the table, with file and line; missing files; a patient in two splits.
    """
    if chosen is None:
        how: dict[str, Any] = {"voi": voi, "for_processing": for_processing, "white": white}
        chosen = choose_images(table, labels=labels, channels=channels, skip_bad=skip_bad, warn=warn, **how)
    read, target = chosen.records, chosen.target
    preprocessing = _prepared(normalize, voi, downsample, for_processing, white)
    try:
        records = _split(read, fold, seed)
    except DataError as error:
        raise DataError(f"{table}: {error}") from error
    _require_training(records, table)
    if normalize == "auto":
        learnt = images([record for record in records if record.split == "train"], channels, preprocessing)
        preprocessing["normalize"] = normalize_of(learnt).to_dict()
    if augment is not None:
        preprocessing["augment"] = str(augment)
    parts = [
        images(
            [record for record in records if record.split == name],
            channels,
            preprocessing,
            augment=augment if name == "train" else None,
            seed=seed,
        )
        for name in ("train", "val", "test")
    ]
    train, val, test = (_samples(part, target) for part in parts)
    told = labels_told(target, samples_of(train), samples_of(val), Path(table))
    for text in [*told, *_strange(records, parts[0])]:
        warn(text)
    measured = target.measured_on(samples_of(train))
    return Data(train, val, test, target.names, channels, preprocessing, measured, chosen.left_out)


def _samples(part: ImageDataset, target: Target) -> ImageDataset | ExamDataset:
    if target.views is None:
        return part
    return ExamDataset(part, numbers=target.kind == "numbers", positive=target.positive)


def _split(records: list[Record], fold: tuple[int, int] | None, seed: int) -> list[Record]:
    if fold is None:
        return assign_splits(records, seed=seed)
    drawn = draw_folds(records, fold[1], seed)[fold[0] - 1]
    check_leaks(drawn)
    return drawn


def _require_training(records: Sequence[Record], table: str | Path) -> None:
    there = Counter(record.split for record in records)
    if not there["train"]:
        told = ", ".join(f"{count} {name}" for name, count in there.items())
        raise DataError(
            f"{table}: no images are in split train ({told}); give it to some patients, or leave the column out"
        )


def _strange(records: Sequence[Record], train: ImageDataset) -> list[str]:
    """What people should know of a table's images before they train on it."""
    unknown = sum(not record.patient_known for record in records)
    if not unknown:
        return grey_warnings(train)
    text = f"of {unknown} of {len(records)} images the patient is not known, so that one may be in two splits"
    return [text, *grey_warnings(train)]


def _read(
    table: str | Path, labels: Labels, check_files: bool, warn: Callable[[str], object], bad: dict[Path, str]
) -> tuple[list[Record], Target]:
    """The records that say something of the target, and the target.

    Args:
        bad: gets the images whose masks cannot be used, and why.

    Raises:
        DataError: what is wrong with the table.
    """
    if labels.kind == "masks":
        if labels.views is not None:
            raise DataError("--views makes one sample of several images; masks are of single images")
        return read_masks(table, labels.classes, check_files=check_files, warn=warn, bad=bad)
    if labels.kind in ("classes", "ordinal"):
        read = read_table(table, classes=labels.classes or None, check_files=check_files)
        if not labels.classes:
            check_names(table, read.classes, labels.kind, warn)
        return read.records, Target(tuple(read.classes), labels.kind, views=labels.views)
    read = read_table(table, labels=False, check_files=check_files)
    there = label_columns(table, read.records, labels.names)
    target = Target(labels.names or tuple(there), labels.kind, views=labels.views)
    records = target.known(read.records)
    if len(records) < len(read.records):
        warn(f"{len(read.records) - len(records)} of {len(read.records)} images have no label, and are left out")
    others = "" if labels.names else "; --label NAME names those to learn"
    for record in records:
        for name in target.names:
            value = record.labels.get(name, 0)
            if labels.kind == "labels" and value not in (0, 1):
                raise DataError(f"{table}: label_{name} of {record.path.name} is neither 1 nor 0, nor empty{others}")
            if math.isinf(value):
                raise DataError(f"{table}: label_{name} of {record.path.name} is {value}; leave it empty if not known")
    return records, target


def _without_bad(images: ImageDataset, warn: Callable[[str], object], bad: dict[Path, str]) -> list[Record]:
    found = unreadable(images)
    for number, text in found.items():
        warn(f"left out: {text}")
        bad[images.records[number].path] = text
    if len(found) == len(images):
        raise DataError(f"none of the {len(images)} images can be read")
    return [record for number, record in enumerate(images.records) if number not in found]


def images(
    records: Sequence[Record],
    channels: int,
    preprocessing: dict[str, Any],
    *,
    augment: Augment | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Records as images that are prepared as a checkpoint's ``preprocessing`` says; varied only by ``augment``."""
    return ImageDataset(
        records,
        channels=channels,
        normalize=Normalize.from_dict(preprocessing["normalize"]),
        voi=preprocessing["voi"],
        flip=preprocessing["flip"],
        downsample=preprocessing["downsample"],
        for_processing=preprocessing.get("for_processing", False),
        white=preprocessing.get("white"),
        augment=augment,
        seed=seed,
    )
