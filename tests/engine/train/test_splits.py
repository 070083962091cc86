"""What a checkpoint's hash of the split says of images."""

from dataclasses import replace
from pathlib import Path

import pytest

from gigamorph.engine.datasets.splits import assign_splits
from gigamorph.engine.datasets.tables import SPLITS, Finding, Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.train.folds import draw_folds
from gigamorph.engine.train.mask_target import MaskTarget
from gigamorph.engine.train.record import hash_of, hash_of_truth, with_splits

RECORDS = [Record(Path(f"/a/{n // 2}/{n}.dcm"), n // 2 % 2, f"p{n // 2}") for n in range(60)]


def trained(seed: int) -> dict:
    """What a checkpoint says of a training on these records."""
    drawn = assign_splits(RECORDS, seed=seed)
    parts = {name: [record for record in drawn if record.split == name] for name in SPLITS}
    return {"options": {"seed": seed}, "split": {"sha256": hash_of(parts), **{k: len(v) for k, v in parts.items()}}}


def test_the_splits_of_the_trainings_own_table_are_drawn_again():
    moved = [replace(record, path=Path("/elsewhere") / record.path.relative_to("/a")) for record in RECORDS]
    found = with_splits(moved, trained(3))
    assert [record.split for record in found] == [record.split for record in assign_splits(RECORDS, seed=3)]
    assert [record.path for record in found] == [record.path for record in moved]


def test_of_other_images_it_is_what_their_table_says():
    for some in (RECORDS[:-1], [replace(RECORDS[0], label=-1), *RECORDS[1:]], []):
        assert with_splits(some, trained(3)) == some
    given = [replace(record, split="test") for record in RECORDS[:4]]
    assert with_splits(given, trained(3)) == given
    mixed = [*given, RECORDS[5]]
    assert with_splits(mixed, trained(3)) == mixed
    assert with_splits(given, {"recipe": "morphhr"}) == given


def test_the_splits_of_a_fold_are_its_own():
    """Not those of the table, by which images that it learnt from would count as its validation."""
    table = [
        replace(record, split="test" if n < 6 else "val" if n < 12 else "train") for n, record in enumerate(RECORDS)
    ]
    for drawn in draw_folds(table, 3, 5):
        parts = {name: [record for record in drawn if record.split == name] for name in SPLITS}
        told = {"sha256": hash_of(parts), **{name: len(part) for name, part in parts.items()}}
        found = with_splits(table, {"options": {"seed": 5}, "split": told})
        assert [record.split for record in found] == [record.split for record in drawn]


def test_folds_of_classes_with_too_few_images_are_one_line():
    few = [Record(Path(f"/a/{n}.dcm"), n % 2, f"p{n}") for n in range(4)]
    with pytest.raises(DataError, match="cannot make 3 folds because no class has more than 2 images"):
        draw_folds(few, 3, 0)


def test_masks_that_are_mended_are_another_truth_and_those_that_moved_are_not(tmp_path):
    def hashed(folder, content):
        (tmp_path / folder).mkdir(exist_ok=True)
        mask = tmp_path / folder / "m.png"
        mask.write_bytes(content)
        return hash_of_truth({"train": [replace(RECORDS[0], findings=(Finding(mask=mask),))]}, MaskTarget(("0", "1")))

    assert hashed("here", b"1") == hashed("there", b"1") != hashed("here", b"2")
