"""Reads the images of a run from a table or a folder, splits them, and checks their labels."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..datasets.augment import Augment
from ..datasets.dataset import ExamDataset, ImageDataset
from ..datasets.grey import grey_warnings, label_by_kind_warning
from ..datasets.splits import assign_splits, check_leaks
from ..datasets.tables import Record, columns_named, label_columns, read_table
from ..errors import DataError
from ..images.levels import White
from ..images.pixels import Normalize
from .data import Data, samples_of
from .folds import draw_folds
from .mask_target import read_masks
from .options import Kind, Labels
from .pixels import normalize_of, unreadable
from .target import Target


@dataclass(frozen=True)
class Chosen:
    """The images of a table that are used, the target, and the images that were left out, with the reasons."""

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
    columns: Mapping[str, str] | None = None,
    warn: Callable[[str], object] = warnings.warn,
    **others: Any,
) -> Chosen:
    """Read a table, and with ``skip_bad`` all its images, once for several calls of `training_data`.

    Args:
        table, labels, channels, voi, for_processing, white, skip_bad, columns, warn: see `training_data`.
        others: other arguments of `training_data`, which are ignored.

    Raises:
        DataError: for errors in the table.
    """
    bad: dict[Path, str] = {}
    with columns_named(columns or {}):
        records, target = _read(table, labels or Labels(), not skip_bad, warn, bad)
    if skip_bad:
        given = _settings(None, voi, 1, for_processing, white, _are_volumes(records, target))
        records = _without_bad(images(records, channels, given), warn, bad)
    return Chosen(records, target, bad)


def _settings(
    normalize: Any, voi: str, downsample: int, for_processing: bool, white: White | None, volume: bool
) -> dict[str, Any]:
    return {
        "normalize": (normalize if isinstance(normalize, Normalize) else Normalize()).to_dict(),
        "voi": voi,
        "flip": "auto",
        "downsample": downsample,
        **({"for_processing": True} if for_processing else {}),
        **({} if white is None else {"white": white}),
        **({"volume": True} if volume else {}),
    }


def _are_volumes(records: Sequence[Record], target: Target) -> bool:
    """Whether the rows are volumes.

    Raises:
        DataError: if only some are, or masks are learnt.
    """
    volumes = [record for record in records if record.frame == "all"]
    if volumes and len(volumes) < len(records):
        other = next(record for record in records if record.frame != "all")
        raise DataError(f"{other.path}: is an image, but {volumes[0].path} a volume (frame all); use one kind")
    if volumes and target.kind == "masks":
        raise DataError(f"{volumes[0].path}: is a volume (frame all), but masks are learnt of images; name a frame")
    return bool(volumes)


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
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    warn: Callable[[str], object] = warnings.warn,
) -> Data:
    """The images of a csv or of a folder per class, split by patient according to the table or to the seed.

    Only training images are augmented, differently in each epoch. Warnings report a grey scale or a normalisation that
    does not fit a sample of the training images.

    Args:
        table: csv file, or folder with a subfolder per class.
        labels: what is learnt; by default one of several classes.
        channels: of the images, 1 or 3.
        normalize: "auto" measures mean and standard deviation on a sample of the training images, see `normalize_of`.
        voi, downsample, for_processing, white: how pixels are read, see `ImageDataset`.
        augment: augmentation of the training images.
        skip_bad: read all images first, and leave out unreadable ones.
        fold: (k, n): the k-th of n runs of a cross-validation, from 1; see `folds.draw_folds`.
        chosen: the result of `choose_images`; None reads the table.
        columns: other names of the table's columns, see `columns_named`.
        seed: of splits and augmentation.
        warn: called with each warning.

    Raises:
        DataError: for errors in the table, with file and line; missing files; a patient in two splits.
    """
    if chosen is None:
        how: dict[str, Any] = {"voi": voi, "for_processing": for_processing, "white": white, "columns": columns}
        chosen = choose_images(table, labels=labels, channels=channels, skip_bad=skip_bad, warn=warn, **how)
    read, target = chosen.records, chosen.target
    volume = _are_volumes(read, target)
    preprocessing = _settings(normalize, voi, downsample, for_processing, white, volume)
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
    texts = label_warnings(target, samples_of(train), samples_of(val), Path(table))
    for text in [*texts, *_image_warnings(records, parts[0])]:
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
        counts = ", ".join(f"{count} {name}" for name, count in there.items())
        raise DataError(
            f"{table}: no images are in split train ({counts}); assign some patients to it, or omit the column split"
        )


def _image_warnings(records: Sequence[Record], train: ImageDataset) -> list[str]:
    """Warnings about the images of a table."""
    unknown = sum(not record.patient_known for record in records)
    if not unknown:
        return grey_warnings(train)
    text = f"the patient of {unknown} of {len(records)} images is unknown, so a patient may be in two splits"
    return [text, *grey_warnings(train)]


def _read(
    table: str | Path, labels: Labels, check_files: bool, warn: Callable[[str], object], bad: dict[Path, str]
) -> tuple[list[Record], Target]:
    """The records that have a label of the target, and the target.

    Args:
        bad: is filled with the images whose masks are unusable, and the reasons.

    Raises:
        DataError: for errors in the table.
    """
    if labels.kind == "masks":
        if labels.views is not None:
            raise DataError("--views cannot be used with masks, which belong to single images; omit it")
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
        warn(f"{len(read.records) - len(records)} of {len(read.records)} images have no label and are left out")
    others = "" if labels.names else "; select labels with --label NAME"
    for record in records:
        for name in target.names:
            value = record.labels.get(name, 0)
            if labels.kind == "labels" and value not in (0, 1):
                raise DataError(f"{table}: label_{name} of {record.path.name} must be 1, 0 or empty{others}")
            if math.isinf(value):
                raise DataError(f"{table}: label_{name} of {record.path.name} is {value}; leave it empty if unknown")
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
    """The images of records, prepared according to a checkpoint's ``preprocessing``."""
    return ImageDataset(
        records,
        channels=channels,
        normalize=Normalize.from_dict(preprocessing["normalize"]),
        voi=preprocessing["voi"],
        flip=preprocessing["flip"],
        downsample=preprocessing["downsample"],
        for_processing=preprocessing.get("for_processing", False),
        white=preprocessing.get("white"),
        volume=preprocessing.get("volume", False),
        augment=augment,
        seed=seed,
    )


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
