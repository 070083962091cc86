"""What a table cannot be learnt for is said when it is read, and not after the training."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from gigamorph.engine.datasets.tables import Record, label_columns
from gigamorph.engine.errors import DataError
from gigamorph.engine.train.folds import draw_folds
from gigamorph.engine.train.inputs import Labels, training_data


def test_a_number_that_is_infinite_is_named(tmp_path):
    rows = ["image_path,patient_id,split,label_size"]
    for number, split in enumerate(("train", "train", "val")):
        imagecodecs.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8), number, np.uint8))
        rows.append(f"{number}.png,p{number},{split},{'inf' if split == 'val' else number}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"t.csv, line 4: label_size 'inf' is not finite; leave it empty if"):
        training_data(tmp_path / "t.csv", labels=Labels("numbers"))


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ("finding", (), "has no column label_NAME; it has image_path, patient_id, split, finding"),
        ("label_size", ("mass",), "has no column label_mass; it has image_path, patient_id, split, label_size"),
        ("label_empty", (), "column label_empty is empty; fill in the known labels"),
        ("label_size,label_empty", ("empty",), "column label_empty is empty; fill in the known labels"),
    ],
)
def test_labels_without_a_column_are_told_the_columns(tmp_path, columns, names, message):
    table = tmp_path / "t.csv"
    values = ",".join("" if name == "label_empty" else "1" for name in columns.split(","))
    rows = [f"{number}.png,p{number},{split},{values}" for number, split in enumerate(("train", "val"))]
    table.write_text("\n".join([f"image_path,patient_id,split,{columns}", *rows, ""]))
    with pytest.raises(DataError) as told:
        training_data(table, labels=Labels("labels", names), skip_bad=True)
    assert str(told.value) == f"{table}: {message}"


def test_labels_of_a_folder_are_refused_with_how_to_make_a_table(tmp_path):
    with pytest.raises(DataError) as told:
        label_columns(tmp_path, [])
    assert str(told.value) == (
        f"{tmp_path}: a folder has no column label_NAME; make a table of it: gigamorph data index"
    )


def test_folds_of_a_table_of_test_images_are_one_line():
    records = [Record(Path(f"{n}.png"), n % 2, f"p{n}", split="test") for n in range(4)]
    with pytest.raises(DataError, match="2 folds need at least two patients outside split test; there are 0"):
        draw_folds(records, 2, 0)


@pytest.mark.parametrize("normalize", [None, "auto"])
def test_a_table_without_training_images_says_so(tmp_path, normalize):
    rows = ["image_path,patient_id,label,split"]
    for number in range(4):
        imagecodecs.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8), number, np.uint8))
        rows.append(f"{number}.png,p{number},{number % 2},test")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"t.csv: no images are in split train \(4 test\); assign some patients to it"):
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
