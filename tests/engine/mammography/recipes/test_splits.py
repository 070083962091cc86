"""Splits of recipes: official ones run as they are, with val drawn from train by patient; others by fractions."""

from collections import Counter

import pytest

from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.mammography.recipes import RECIPES, get_recipe
from gigamorph.engine.mammography.recipes.dvme import DvmeConfig
from gigamorph.engine.mammography.recipes.end2end.config import End2EndConfig
from gigamorph.engine.mammography.recipes.splits import split_records
from gigamorph.engine.train.run import Run


def official(patients=250, test=50):
    """Two images of each patient, the first patients test."""
    splits = ["test"] * test + ["train"] * (patients - test)
    return [Record(f"{i}{view}.png", i % 2, f"p{i}", split) for i, split in enumerate(splits) for view in "ab"]


def patients(records):
    found = {record.patient_id: record.split for record in records}
    assert all(record.split == found[record.patient_id] for record in records)
    return Counter(found.values())


def test_val_is_drawn_from_train_by_patient_and_test_stays(tmp_path):
    """90:10 of train for end2end."""
    said = []
    found = split_records(official(), End2EndConfig(), Run(tmp_path, say=said.append))
    assert patients(found) == {"test": 50, "train": 180, "val": 20}
    assert said == ["the table has no split val: 20 patients of train are moved to val"]
    with pytest.raises(DataError, match=r"^t.csv: patient p0 is in train and test; put"):
        mixed = [*official(), Record("other.png", 0, "p0", "train")]
        split_records(mixed, End2EndConfig(), Run(tmp_path), table="t.csv")
    assert [r.split for r in found if r.split == "test"] == ["test"] * 100 and found[0].split == "test"
    assert found == split_records(official(), End2EndConfig(), Run(tmp_path))
    assert patients(split_records(official(), DvmeConfig(), Run(tmp_path)))["val"] == 36  # 15 of 85
    # Who chooses nothing by val trains on all of train.
    assert split_records(official(), End2EndConfig(), Run(tmp_path), validation=False) == official()


def test_a_split_of_ones_own_is_85_to_15_and_90_to_10(tmp_path):
    records = official(400, 100)
    found = split_records(records, End2EndConfig(split="drawn"), Run(tmp_path))
    assert patients(found) == {"test": 60, "train": 306, "val": 34}
    third = End2EndConfig(split="drawn", fractions=(0.5, 0.25, 0.25))
    assert patients(split_records(records, third, Run(tmp_path))) == {"test": 100, "train": 200, "val": 100}


@pytest.mark.parametrize("split", ["table", "drawn"])
def test_the_seed_of_the_run_draws_the_patients(tmp_path, split):
    """All of a split that is drawn; those of val where the table has none."""
    one, again, other = (
        split_records(official(), End2EndConfig(split=split), Run(tmp_path, seed=n)) for n in (3, 3, 4)
    )
    assert one == again != other


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_the_settings(name):
    config = get_recipe(name).config()
    assert config.split == "table" and sum(config.fractions) == pytest.approx(1)
