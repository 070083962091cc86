"""What a table cannot be learnt for is said when it is read, and not after the training."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.train.folds import draw_folds
from gigamorph.engine.train.inputs import Labels, training_data


def test_a_number_that_is_infinite_is_named(tmp_path):
    rows = ["image_path,patient_id,split,label_size"]
    for number, split in enumerate(("train", "train", "val")):
        imagecodecs.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8), number, np.uint8))
        rows.append(f"{number}.png,p{number},{split},{'inf' if split == 'val' else number}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"t.csv: label_size of 2.png is inf; leave it empty if not known"):
        training_data(tmp_path / "t.csv", labels=Labels("numbers"))


def test_folds_of_a_table_of_test_images_are_one_line():
    records = [Record(Path(f"{n}.png"), n % 2, f"p{n}", split="test") for n in range(4)]
    with pytest.raises(DataError, match="2 folds need two patients at least that are not in split test; there are 0"):
        draw_folds(records, 2, 0)


@pytest.mark.parametrize("normalize", [None, "auto"])
def test_a_table_without_training_images_says_so(tmp_path, normalize):
    rows = ["image_path,patient_id,label,split"]
    for number in range(4):
        imagecodecs.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8), number, np.uint8))
        rows.append(f"{number}.png,p{number},{number % 2},test")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"t.csv: no images are in split train \(4 test\); give it to some patients"):
        training_data(tmp_path / "t.csv", normalize=normalize)


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        (("train", "val", "train", "val"), "patient p0 is in train and val"),
        (("train", "", "", "val"), "2 of 4 rows have no split"),
    ],
)
def test_wrong_splits_name_their_table(tmp_path, splits, told):
    rows = ["image_path,patient_id,label,split"]
    for number, split in enumerate(splits):
        imagecodecs.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8), number, np.uint8))
        rows.append(f"{number}.png,p{number // 2},{number % 2},{split}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=rf"t\.csv: {told}"):
        training_data(tmp_path / "t.csv")
