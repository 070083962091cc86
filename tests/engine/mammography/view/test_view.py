"""Tiles of pyramids, images as they are hung, boxes and maps in their place, beside plain arrays."""

import imagecodecs
import numpy as np
import pytest
import torch

from gigamorph.engine.datasets.tables import Finding, Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.view.evidence import on_shown
from gigamorph.engine.mammography.view.exams import ExamImage, read_exams
from gigamorph.engine.mammography.view.pyramid import TILE, Pyramid
from gigamorph.engine.train.explanation import Explanation


def averaged(image, factor):
    for axis in (0, 1):
        first = np.arange(0, image.shape[axis], factor)
        number = np.minimum(factor, image.shape[axis] - first)  # the last may be fewer
        image = np.add.reduceat(image, first, axis) / np.expand_dims(number, 1 - axis)
    return image


def test_tiles_are_the_image_averaged():
    image = np.random.default_rng(0).integers(0, 256, (2 * TILE + 37, 3 * TILE + 5), np.uint8)
    pyramid = Pyramid(open_pixels(image))
    assert pyramid.levels == 2 and pyramid.tiles(0) == (4, 3) and pyramid.tiles(2) == (1, 1)
    for level in range(3):
        columns, rows = pyramid.tiles(level)
        tiles = [[imagecodecs.png_decode(pyramid.tile(level, c, r)) for c in range(columns)] for r in range(rows)]
        whole = np.block(tiles).astype(float)
        assert np.abs(whole - averaged(image.astype(float), 1 << level)).max() <= (0.51 if level < 2 else 1.01)
    with pytest.raises(IndexError):
        pyramid.tile(0, 4, 0)
    colour = Pyramid(open_pixels(np.zeros((3, 40, 50), np.uint8)))
    assert imagecodecs.png_decode(colour.tile(0, 0, 0)).shape == (40, 50, 3)


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("wall", ["left", "right"])
def test_a_breast_is_hung_with_its_wall_to_the_middle_and_boxes_go_along(tmp_path, side, wall):
    image = np.zeros((60, 80), np.uint8)
    image[:, :40] = 100
    image[10:20, 5:15] = 250
    box = (10, 20, 5, 15)
    if wall == "right":
        image, box = image[:, ::-1].copy(), (10, 20, 65, 75)
    np.save(tmp_path / "a.npy", image)
    record = Record(tmp_path / "a.npy", -1, "p", laterality=side, chest_wall=wall, findings=(Finding("mass", box),))
    view = ExamImage(record, {"1": 0.5})
    shown = view.open()
    pixels = shown.read(0, 60, 0, 80)[0].numpy()
    assert (pixels[30, 0] > pixels[30, 79]) == (side == "L")
    ((left, top, right, bottom, what),) = view.boxes(shown)
    assert what == "mass" and pixels[int(top) : int(bottom), int(left) : int(right)].min() > 0.9
    # A map whose hot cell lies on the box, of the image as the network sees it.
    source = open_pixels(tmp_path / "a.npy", flip=wall == "right")
    values = torch.zeros(6, 8)
    values[1, 1] = 1.0
    heat = on_shown(Explanation(source, values), shown)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    x, y = (column + 0.5) * 80 / heat.shape[1], (row + 0.5) * 60 / heat.shape[0]
    assert left - 5 <= x <= right + 5 and top - 5 <= y <= bottom + 5 and heat.max() > 200


def test_exams_of_a_table_the_worst_first(tmp_path):
    header = "image_path,patient_id,exam_id,laterality,view,split,label,p_0,p_1\n"
    rows = [
        "a.npy,P1,E,L,MLO,test,1,0.4,0.6",
        "b.npy,P1,E,R,CC,test,0,0.9,0.1",
        "c.npy,P2,E,L,CC,test,0,0.1,0.9",
        "d.npy,,,,,val,,0.5,0.5",
        "e.npy,,,,,val,,0.5,0.5",
    ]
    (tmp_path / "predictions.csv").write_text(header + "\n".join(rows) + "\n")
    exams = read_exams(tmp_path)
    assert [len(exam.views) for exam in exams] == [1, 2, 1, 1]
    assert [exam.error for exam in exams] == [pytest.approx(0.9), pytest.approx(0.4), None, None]
    assert [v.record.view for v in exams[1].views] == ["CC", "MLO"]
    assert [exam.name for exam in read_exams(tmp_path, split="test")] == ["P2 E", "P1 E"]
    with pytest.raises(DataError, match="no predictions of split train"):
        read_exams(tmp_path, split="train")
    with pytest.raises(DataError, match=r"holds no predictions\.csv$"):
        read_exams(tmp_path.parent)


@pytest.mark.parametrize(
    ("columns", "label", "truth"),
    [
        ("p_malignant,p_benign", "1", {"malignant": 1, "benign": 0}),
        ("p_benign,p_malignant", "0", {"malignant": 0, "benign": 1}),
        ("p_lobular,p_ductal", "1", {}),
        ("p_lobular,p_ductal", "ductal", {"lobular": 0, "ductal": 1}),
        ("p_b,p_a,p_c", "1", {}),
    ],
)
def test_labels_are_classes_by_their_names(columns, label, truth, tmp_path):
    cells = ",".join(["0.5"] * len(columns.split(",")))
    (tmp_path / "predictions.csv").write_text(f"image_path,label,{columns}\na.npy,{label},{cells}\n")
    assert read_exams(tmp_path)[0].views[0].truth == truth


def test_a_label_that_is_not_a_number_is_refused(tmp_path):
    (tmp_path / "predictions.csv").write_text("image_path,label_a,p_a\na.npy,often,0.5\n")
    with pytest.raises(DataError, match=r"predictions\.csv, line 2: label_a 'often'"):
        read_exams(tmp_path)


def test_a_table_of_other_images_is_refused(tmp_path):
    """Without a word there would be no findings, as if there were none to find."""
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.zeros((40, 30), np.uint8))
    (tmp_path / "predictions.csv").write_text("image_path,patient_id,label,p_0,p_1\na.npy,P1,1,0.4,0.6\n")
    table = tmp_path / "table.csv"
    table.write_text("image_path,label,patient_id\nb.npy,0,P2\n")
    with pytest.raises(DataError, match=r"table\.csv: names none of the images of .*predictions\.csv"):
        read_exams(tmp_path, table=table)
    table.write_text("image_path,label,patient_id\na.npy,1,P1\nb.npy,0,P2\n")
    assert len(read_exams(tmp_path, table=table)) == 1


def test_exams_of_a_cross_validation_are_shown_by_their_images(tmp_path):
    lines = ["image_path,patient_id,exam_id,laterality,view,label"]
    for patient in "pq":
        for view in ("CC", "MLO"):
            np.save(tmp_path / f"{patient}{view}.npy", np.zeros((20, 20), np.uint8))
            lines.append(f"{patient}{view}.npy,{patient},e,L,{view},{int(patient == 'q')}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "out_of_fold.csv").write_text(
        "exam,patient_id,exam_id,laterality,label,log_odds_0,log_odds_1,fold\np_e,p,e,L,0,1.0,-1.0,1\nq_e,q,e,L,1,2.0,-2.0,2\n"
    )
    with pytest.raises(DataError, match=r"out_of_fold\.csv: holds exams without their images; .* --table"):
        read_exams(tmp_path)
    worst, other = read_exams(tmp_path, table=tmp_path / "t.csv")
    assert [view.record.path.name for view in worst.views] == ["qCC.npy", "qMLO.npy"] and len(other.views) == 2
    assert worst.views[0].truth == {"0": 0.0, "1": 1.0} and worst.error == pytest.approx(1 / (1 + np.exp(-2.0)))
