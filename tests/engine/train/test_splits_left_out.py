"""Splits of a training that left images out, because nothing is known of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from gigamorph.engine.datasets.splits import assign_splits
from gigamorph.engine.datasets.tables import SPLITS, Finding, Record
from gigamorph.engine.train.mask_target import MaskTarget
from gigamorph.engine.train.record import hash_of, with_splits
from gigamorph.engine.train.target import Target

RECORDS = [
    Record(
        Path(f"/a/{n}.png"),
        -1,
        f"p{n // 2}",
        labels={} if n % 7 == 0 else {"a": float(n % 2)},
        findings=() if n % 7 == 0 else (Finding("", mask=Path(f"/a/m{n}.png")),),
    )
    for n in range(42)
]


@pytest.mark.parametrize(
    "target", [Target(("a",), "labels"), Target(("a",), "labels", views="max"), MaskTarget(("background", "1"))]
)
def test_images_that_were_left_out_have_the_split_of_their_patient(target):
    learnt = assign_splits(target.known(RECORDS), seed=3)
    parts = {name: [record for record in learnt if record.split == name] for name in SPLITS}
    split = {"sha256": hash_of(parts), **{name: len(part) for name, part in parts.items()}}
    trained = {"options": {"seed": 3}, "target": target.to_plain(), "split": split, "classes": ["a"]}
    found = with_splits(RECORDS, trained)
    assert [replace(record, split=None) for record in found] == RECORDS
    split_of = {record.patient_id: record.split for record in learnt}
    assert [record.split for record in found] == [split_of[record.patient_id] for record in RECORDS]
    assert with_splits(RECORDS[2:], trained) == RECORDS[2:]
