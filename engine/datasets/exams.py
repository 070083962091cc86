"""The images of a data set by exams: the views of each are one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from .dataset import ImageDataset
from .tables import Record
from .unknown_views import unplaced


def exam_of(record: Record) -> tuple[str, ...]:
    """What tells exams apart: patient and exam_id; an image without a patient is one by itself."""
    own = () if record.patient_known else ("image", str(record.path), str(record.frame))
    return (record.patient_id, record.exam_id or "", *own)


class ExamDataset(Dataset[dict[str, Any]]):
    """Exams of a data set of images, in the order of their first image; without images that are in none (`unplaced`).

    An item is dict(views=[PixelSource], image=PixelSource, label=int, index=int, record=Record), where image is the
    view with the most pixels, and the record that of the exam, see `samples`.

    Attributes:
        records: of all images.
        samples: of the exams: the first view's record, with the highest class of the views; of labels the highest that
            is known of each; of numbers the mean of what is known. Side and view are empty.

    Args:
        positive: the class that is the highest; None takes that of the highest number.
    """

    def __init__(self, images: ImageDataset, *, numbers: bool = False, positive: int | None = None) -> None:
        self._images, self.records = images, images.records
        exams: dict[tuple[str, ...], list[int]] = {}
        patients = [record.patient_id if record.patient_known else "" for record in self.records]
        left_out = set(unplaced(patients, [record.exam_id or "" for record in self.records]))
        for number, record in enumerate(images.records):
            if number in left_out:
                continue
            exams.setdefault(exam_of(record), []).append(number)
        self._exams = list(exams.values())
        self.samples = [_together([self.records[i] for i in views], numbers, positive) for views in self._exams]

    def set_epoch(self, epoch: int) -> None:
        """As `ImageDataset.set_epoch`."""
        self._images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._exams)

    def __getitem__(self, index: int) -> dict[str, Any]:
        views = [self._images[i]["image"] for i in self._exams[index]]
        largest = max(views, key=lambda source: source.shape[-2] * source.shape[-1])
        sample = self.samples[index]
        return {"views": views, "image": largest, "label": sample.label, "index": index, "record": sample}


def _together(records: Sequence[Record], numbers: bool, positive: int | None) -> Record:
    labels = {}
    for name in dict.fromkeys(name for record in records for name in record.labels):
        known = [record.labels[name] for record in records if not math.isnan(record.labels.get(name, math.nan))]
        if known:
            labels[name] = sum(known) / len(known) if numbers else max(known)
    label = max((record.label for record in records), key=lambda number: (number == positive, number))
    return replace(records[0], label=label, labels=labels, laterality=None, view=None)
