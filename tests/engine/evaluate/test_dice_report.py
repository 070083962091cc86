"""The page of an evaluation of masks: what it tells, the images that it draws."""

import re

import imagecodecs
import numpy as np
import pytest
from commands import rows, run
from predicted_masks import CLASSES, write_predicted

from gigamorph.engine.datasets.masks import Classes
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.errors import DataError
from gigamorph.engine.evaluate.dice import evaluate_dice, read_dice
from gigamorph.engine.evaluate.dice_report import picture_of, write_dice_report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_predicted(folder, count=6)
    return folder


def test_the_page_of_a_folder_of_masks(written, tmp_path, capsys):
    given = ["eval", written / "out" / "predictions.csv", "--table", written / "table.csv"]
    assert run(*given, "--out", tmp_path / "out") == 0
    assert "report.html, metrics.json and plots" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    found = rows(written / "out" / "predictions.csv")
    means = [np.mean([float(row["dice_mass"]), float(row["dice_cyst"])]) for row in found[:5]]
    worst = int(np.argmin(means))
    assert f"line {worst + 2}: Dice {means[worst]:.3f}" in page
    assert page.count("data:image/png") == 6 and "prediction has a class: 1." in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json",
        "report.html",
        "dice.png",
        *(f"furthest_{n}.png" for n in range(5)),
    }
    text = re.sub(r"base64,[^\"]*", "", page)
    assert "p0" not in text and str(written) not in text
    assert run(*given[:2], "--overwrite", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 1


def test_patients_count_the_same_in_the_mean_of_patients(tmp_path):
    (tmp_path / "p.csv").write_text(
        "image_path,patient_id,dice_<b>\n"
        + "".join(
            f"{n}.png,{p},{d}\n"
            for n, (p, d) in enumerate(
                [("a", 0.2), ("a", 0.4), ("a", 0.6), ("b", 1.0), ("b", ""), ("c", ""), ("", 0.5)]
            )
        )
    )
    table, _ = read_dice(tmp_path / "p.csv", None)
    found = evaluate_dice(table, resamples=50)
    assert found["dice_<b>"]["value"] == pytest.approx(np.mean([0.2, 0.4, 0.6, 1.0, 0.5]))
    assert found["per_patient"]["dice_<b>"]["value"] == pytest.approx(np.mean([0.4, 1.0, 0.5]))
    assert found["quartiles"]["<b>"] == pytest.approx([0.4, 0.5, 0.6])
    page = write_dice_report(tmp_path / "out", table, found).read_text()
    assert "<td>&lt;b&gt;" in page or ">&lt;b&gt;</td>" in page
    assert "3 patients, 1 without one" in page


def test_a_picture_shows_both_masks_and_where_they_differ(written, tmp_path):
    [record, *_] = read_table(written / "table.csv", labels=False).records
    figure = picture_of(record, written / "out" / "masks" / "0.png", Classes(CLASSES))
    whole, detail = figure.axes
    predicted, mask = (imagecodecs.imread(str(written / place / "0.png")) for place in ("out/masks", "masks"))
    top, bottom, left, right = (int(n) for n in detail.get_title(loc="left").replace(",", "").split() if n.isdigit())
    apart = (predicted != mask) & (mask != 255)
    # The whole mass, of which a strip of 20 pixels above what was predicted, and one below it, are not of both.
    y, x = np.nonzero(mask == 1)
    assert top < y.min() and bottom > y.max() + 20 and left <= x.min() and right > x.max()
    assert apart[top:bottom, left:right].sum() >= 2 * 160 * 20 and bottom - top < 600
    areas = [image.get_array() for image in detail.images[1:]]
    shown = np.max([area[..., 3] > 0 for area in areas], 0)
    assert (shown == (predicted[top:bottom, left:right] > 0)).all()
    assert len(detail.collections) >= 1 and whole.lines
    (tmp_path / "small.png").write_bytes(imagecodecs.png_encode(mask[1:]))
    with pytest.raises(DataError, match="but its image 1100 x 700; correct it"):
        picture_of(record, tmp_path / "small.png", Classes(CLASSES))
