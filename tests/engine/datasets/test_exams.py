"""Exams: which images are one, and what is known of them together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from gigamorph.engine.datasets.dataset import ExamDataset
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.train.target import Target


class Source:
    def __init__(self, height: int) -> None:
        self.shape = (1, height, 4)


class Images:
    def __init__(self, records: list[Record]) -> None:
        self.records, self.epoch = records, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Source(10 + 7 * index % 5)}


def record(number: int, patient: str, exam: str | None = None, label: int = -1, **further: Any) -> Record:
    return Record(Path(f"{number}.png"), label, patient, exam_id=exam, laterality="L", view="CC", **further)


def test_views_of_an_exam_are_one_sample() -> None:
    images = Images(
        [
            record(0, "p", "1", 0),
            record(1, "q", None, 1),
            record(2, "p", "2", 1),
            record(3, "p", "1", 2),
            record(4, "x", None, 0, patient_known=False),
            record(5, "x", None, 1, patient_known=False),
        ]
    )
    exams = ExamDataset(images)  # type: ignore[arg-type]
    found = [(s.patient_id, s.exam_id, s.label, s.laterality, s.view) for s in exams.samples]
    assert found == [
        ("p", "1", 2, None, None),
        ("q", None, 1, None, None),
        ("p", "2", 1, None, None),
        ("x", None, 0, None, None),  # without a patient nobody knows whose they are
        ("x", None, 1, None, None),
    ]
    item = exams[0]
    assert [view.shape[1] for view in item["views"]] == [10, 11] and item["image"].shape[1] == 11
    assert item["record"] is exams.samples[0] and item["label"] == 2 and exams.records is images.records
    exams.set_epoch(3)
    assert images.epoch == 3 and len(exams) == 5


def test_of_two_classes_the_positive_one_counts() -> None:
    images = Images([record(0, "p", "1", 0), record(1, "p", "1", 1), record(2, "q", "1", 1)])
    assert [one.label for one in ExamDataset(images).samples] == [1, 1]  # type: ignore[arg-type]
    positive = Target(("cancer", "normal")).positive
    assert [one.label for one in ExamDataset(images, positive=positive).samples] == [0, 1]  # type: ignore[arg-type]


def test_labels_are_the_highest_and_numbers_the_mean_of_what_is_known() -> None:
    views = [record(0, "p", labels={"a": 0.0, "b": math.nan}), record(1, "p", labels={"a": 1.0}), record(2, "p")]
    images: Any = Images(views)
    assert ExamDataset(images).samples[0].labels == {"a": 1.0}
    assert ExamDataset(images, numbers=True).samples[0].labels == {"a": 0.5}
    assert torch.utils.data.DataLoader(ExamDataset(images), batch_size=None).dataset[0]["index"] == 0
