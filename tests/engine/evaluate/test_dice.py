"""Mean Dice of predicted masks, with intervals over patients."""

import json

import numpy as np
import pytest
from commands import run

from gigamorph.engine.errors import DataError
from gigamorph.engine.evaluate.dice import dice_headline, evaluate_dice, read_dice


@pytest.fixture
def table(tmp_path):
    """12 images of 6 patients; of every third image the second class is not defined."""
    random = np.random.default_rng(0)
    lines = ["image_path,patient_id,split,dice_mass,dice_cyst"]
    for n in range(12):
        cyst = "" if n % 3 == 0 else repr(float(random.uniform()))
        lines.append(f"{n}.png,p{n // 2},{'test' if n < 10 else 'val'},{random.uniform()!r},{cyst}")
    path = tmp_path / "predictions.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def values(table):
    cells = [line.split(",")[3:] for line in table.read_text().splitlines()[1:11]]
    return np.array([[float(one) if one else np.nan for one in row] for row in cells])


def test_means_and_intervals_are_those_of_patients_drawn_again(table):
    found = evaluate_dice(read_dice(table, "test")[0], resamples=4000)
    each = values(table)
    means = np.nanmean(each, 0)
    assert [found["dice_mass"]["value"], found["dice_cyst"]["value"]] == pytest.approx(means)
    assert found["dice"]["value"] == pytest.approx(means.mean()) and found["images"] == {"mass": 10, "cyst": 6}
    random = np.random.default_rng(5)
    drawn = [each.reshape(5, 2, 2)[random.integers(0, 5, 5)].reshape(10, 2)[:, 0].mean() for _ in range(4000)]
    assert found["dice_mass"]["bootstrap"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert found["patients"] == 5
    assert dice_headline(found)[1].endswith(", 6 images")


def test_a_class_that_no_image_has_is_not_defined(table):
    """That is another thing than an interval that there is none of."""
    table.write_text("image_path,patient_id,dice_mass,dice_cyst\n0.png,p,0.5,\n1.png,q,0.6,\n")
    found = evaluate_dice(read_dice(table, None)[0], resamples=50)
    assert found["dice_cyst"]["value"] is None and found["dice_cyst"]["bootstrap"] is None
    assert dice_headline(found)[1].startswith("cyst: Dice not defined: no image has the class")


def test_bad_tables_are_refused_in_one_line(table):
    with pytest.raises(DataError, match="several splits"):
        read_dice(table, None)
    table.write_text("image_path,dice_mass\n0.png,1.5\n")
    with pytest.raises(DataError, match=r"line 2: dice_mass '1\.5' must be a number from 0 to 1"):
        evaluate_dice(read_dice(table, None)[0])
    table.write_text("image_path,dice_mass\n0.png,\n")
    with pytest.raises(DataError, match="no image has a Dice"):
        evaluate_dice(read_dice(table, None)[0])
    table.write_text("image_path,p_1\n0.png,0.5\n")
    assert read_dice(table, None) is None


def test_eval_of_masks(table, tmp_path, capsys):
    assert run("eval", table, "--split", "test", "--out", tmp_path / "out") == 0
    assert "mass: Dice 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["kind"] == "masks"
    assert run("eval", table, "--split", "test", "--by", "split", "--out", tmp_path / "more") == 2
    assert "predicted masks accept only" in " ".join(capsys.readouterr().err.replace("│", " ").split())
