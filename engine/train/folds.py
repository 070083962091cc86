"""Cross-validation by patient: several runs on the same table, each validated on different patients."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from ..datasets.tables import Record
from ..errors import DataError
from ..evaluate.read import note_of, write_cases
from ..files import write_json, write_rows
from ..parsing import parse_json
from .data import Data, samples_of
from .metrics import COUNTS, Prediction, as_cases


def draw_folds(records: Sequence[Record], count: int, seed: int) -> list[list[Record]]:
    """The records of each of ``count`` runs, with their splits.

    The seed assigns patients to folds, independently of the order of the records and stratified by class. Run k
    validates on fold k and trains on the others. Rows of the table's split "test" stay there in all runs; its other
    splits are ignored.

    Raises:
        DataError: if there are fewer patients, or fewer images of each class, than folds.
    """
    order = sorted(range(len(records)), key=lambda i: (str(records[i].path), str(records[i].frame or 0).rjust(9)))
    drawn = [i for i in order if records[i].split != "test"]
    patients = [records[i].patient_id for i in drawn]
    patients_left = len(set(patients))
    if patients_left < 2:
        raise DataError(f"{count} folds need at least two patients outside split test; there are {patients_left}")
    if count < 2 or patients_left < count:
        raise DataError(f"cannot make {count} folds of {patients_left} patients; use 2 to {patients_left}")
    labels = [records[i].label for i in drawn]
    kind = StratifiedGroupKFold if len(set(labels)) > 1 else GroupKFold
    fold_of: dict[int, int] = {}
    splitter = kind(count, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a class may have fewer images than folds
            shares = list(splitter.split(np.zeros(len(drawn)), labels, patients))
    except ValueError as error:
        most = max(Counter(labels).values())
        raise DataError(f"cannot make {count} folds because no class has more than {most} images; use fewer") from error
    for number, (_, held) in enumerate(shares):
        fold_of.update((drawn[i], number) for i in held)
    return [
        [
            record if i not in fold_of else replace(record, split="val" if fold_of[i] == number else "train")
            for i, record in enumerate(records)
        ]
        for number in range(count)
    ]


def write_validation(out: Path, predictions: Sequence[Prediction], data: Data) -> None:
    """Write ``val.csv``, the predictions of a run on its validation images, with the table's names of patients.

    ``val.json`` holds the order of the classes, which does not follow from their names.
    """
    known = zip(predictions, samples_of(data.val), strict=True)
    named = [found if record.patient_known else replace(found, patient="") for found, record in known]
    write_cases(out / "val.csv", as_cases(named, data.classes))
    write_json(out / "val.json", {"classes": list(data.classes), "ordered": data.target.kind == "ordinal"}, "val")


def summarise(out: Path, count: int) -> Iterator[str]:
    """Write ``folds.json`` and ``out_of_fold.csv`` of the runs in ``out``; yields lines of a summary.

    Each image in ``out_of_fold.csv`` was predicted by the run that did not train on its patient.
    """
    metrics = [parse_json((out / f"fold{number + 1}" / "metrics.json").read_text()) for number in range(count)]
    found: dict[str, dict[str, float | int]] = {}
    for part in ("val", "test"):
        for name in [key for key in metrics[0].get(part, ()) if key not in COUNTS]:
            values = [one[part][name] for one in metrics if one.get(part, {}).get(name) is not None]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                found[f"{part}_{name}"] = {"mean": float(np.mean(values)), "std": spread, "folds": len(values)}
    rows = [row for number in range(count) for row in _rows(out / f"fold{number + 1}" / "val.csv", number + 1)]
    write_json(out / "folds.json", {"folds": count, **found}, "folds")
    write_rows(out / "out_of_fold.csv", rows, "table")
    if note := note_of(out / "fold1" / "val.csv"):
        write_json(out / "out_of_fold.json", note, "out_of_fold")
    for name, one in found.items():
        yield f"{name}: {one['mean']:.4f} +- {one['std']:.4f} over {one['folds']} folds"
    samples = "exams" if "exam" in rows[0] else "images"
    yield f"{out}/folds.json, out_of_fold.csv ({len(rows)} {samples}); networks in {out}/fold1/best.ckpt ..."


def _rows(path: Path, fold: int) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {**row, "fold": str(fold)}
