"""The images of a data set grouped by exam: the views of an exam are one sample."""

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
    """The key of an exam: patient and exam_id; an image without a patient is an exam of its own."""
    own = () if record.patient_known else ("image", str(record.path), str(record.frame))
    return (record.patient_id, record.exam_id or "", *own)


class ExamDataset(Dataset[dict[str, Any]]):
    """Exams of an image data set, in the order of their first image; images in no exam (`unplaced`) are left out.

    An item is dict(views=[PixelSource], image=PixelSource, label=int, index=int, record=Record): `image` is the view
    with the most pixels, and `record` is the record of the exam, see `samples`.

    Attributes:
        records: the records of all images.
        samples: a record per exam: that of the first view, with the highest class of the views and, for each label
            column, the highest known label, or the mean of known numbers. Side and view are empty.

    Args:
        images: the images.
        numbers: whether label columns are numbers, not classes.
        positive: the class that counts as the highest; None for the class with the highest number.
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
        self.samples = [_exam_record([self.records[i] for i in views], numbers, positive) for views in self._exams]

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


def _exam_record(records: Sequence[Record], numbers: bool, positive: int | None) -> Record:
    labels = {}
    for name in dict.fromkeys(name for record in records for name in record.labels):
        known = [record.labels[name] for record in records if not math.isnan(record.labels.get(name, math.nan))]
        if known:
            labels[name] = sum(known) / len(known) if numbers else max(known)
    label = max((record.label for record in records), key=lambda number: (number == positive, number))
    return replace(records[0], label=label, labels=labels, laterality=None, view=None)
