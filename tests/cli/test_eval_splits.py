"""Training rows are measured only where they are named, and whatever is fitted is fitted on validation rows alone."""

import csv
import json

import numpy as np
import pytest
from commands import run

from gigamorph import DataError
from gigamorph.engine.evaluate.calibration import slope_and_intercept
from gigamorph.engine.evaluate.evaluate import Settings, evaluate
from gigamorph.engine.evaluate.measures import threshold_at
from gigamorph.engine.evaluate.read import read_cases, read_parts
from gigamorph.engine.evaluate.recalibration import write_calibration

SHIFT = {"train": 20.0, "val": 0.0, "test": 3.0, "": 1.0}
"""Log-odds of each split, by which it shows what was fitted on which rows."""


def written(tmp_path, counts, name="predictions"):
    random = np.random.default_rng(0)
    path = tmp_path / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("image_path patient_id laterality split density label log_odds_0 log_odds_1".split())
        for split, count in counts.items():
            for n in range(count):
                label = n % 2
                z = random.normal() + 1.5 * label + SHIFT[split]
                who = f"{split or 'none'}{n // 2}"
                writer.writerow([f"{split}{n}.png", who, "LR"[n % 2], split, "AB"[n // 2 % 2], label, -z, z])
    path.with_suffix(".json").write_text('{"checkpoint": "best.ckpt", "sha256": "abc", "classes": ["0", "1"]}')
    return path


@pytest.fixture
def predictions(tmp_path):
    return written(tmp_path, {"train": 80, "val": 60, "test": 40})


def measured(predictions, tmp_path, capsys, *options, image=True):
    out = tmp_path / "out"
    level = ["--level", "image"] if image else []
    assert run("eval", predictions, "--out", out, "--resamples", 5, "--overwrite", *level, *options) == 0
    return capsys.readouterr().out.splitlines()[0], json.loads((out / "metrics.json").read_text()), out


@pytest.mark.parametrize(
    ("split", "counts", "told"),
    [
        ("test", {"test": 40}, "measured: 40 rows of split test; left out: 80 of train, 60 of val;"),
        ("all", {"val": 60, "test": 40}, "measured: 60 rows of split val, 40 of test; left out: 80 of train;"),
        ("train", {"train": 80}, "measured: 80 rows of split train; left out: 60 of val, 40 of test;"),
        ("train,val", {"train": 80, "val": 60}, "measured: 80 rows of split train, 60 of val; left out: 40 of test;"),
    ],
)
def test_the_first_line_says_which_rows_count(predictions, tmp_path, capsys, split, counts, told):
    line, found, out = measured(predictions, tmp_path, capsys, "--split", split)
    assert line == f"{told} fitted on 60 rows of split val: thresholds, calibration.json"
    assert found["rows"]["measured"] == counts and found["levels"]["image"]["rows"] == sum(counts.values())
    assert line in (out / "report.html").read_text()


def test_training_rows_are_no_default(tmp_path, capsys):
    path = written(tmp_path, {"train": 8})
    for options in ([], ["--split", "all"]):
        assert run("eval", path, "--out", tmp_path / "out", *options) == 2
        assert "--split train" in capsys.readouterr().err
    assert run("eval", path, "--out", tmp_path / "out", "--split", "tset") == 2
    assert "train, val and test" in capsys.readouterr().err
    unknown = written(tmp_path, {"": 8})
    line, found, _ = measured(unknown, tmp_path, capsys)
    assert line == "measured: 8 rows without a split; nothing is fitted" and found["rows"]["measured"] == {"": 8}


@pytest.mark.parametrize("split", ["test", "train", "all", "val"])
def test_whatever_is_fitted_is_fitted_on_validation_rows(predictions, tmp_path, capsys, split):
    """With --split all, calibration was fitted on training rows too."""
    _, found, out = measured(predictions, tmp_path, capsys, "--split", split, "--by", "density")
    val = read_cases(predictions, split="val")
    calibration = json.loads((out / "calibration.json").read_text())
    slope, intercept = slope_and_intercept(val.truth[:, 0], val.scores[:, 0]) or (0, 0)
    assert (calibration["slope"], calibration["intercept"]) == (slope, intercept)
    assert (calibration["images"], calibration["split"]) == (60, "val")
    limit = threshold_at(val, 0, 0.9)
    assert calibration["threshold"] == limit["log_odds"]
    image = found["levels"]["image"]
    assert image["subgroups"]["density"]["1"]["log_odds"] == limit["log_odds"]
    points = image["outputs"]["1"]["sensitivity_at_specificity"]
    if split == "val":
        assert points[1]["log_odds"] == limit["log_odds"] and "at_threshold" not in image["outputs"]["1"]
    else:
        assert not any("threshold" in point or "log_odds" in point for point in points)
        rows = read_cases(predictions, split=split)
        called = rows.scores[:, 0] >= limit["log_odds"]
        at = image["outputs"]["1"]["at_threshold"]
        assert at["sensitivity"]["value"] == called[rows.truth[:, 0] > 0].mean()
        assert image["outputs"]["1"]["threshold"] == limit | {"from": "split val, specificity 0.9"}


def test_without_validation_rows_nothing_is_fitted(tmp_path, capsys):
    path = written(tmp_path, {"train": 20, "test": 40})
    line, found, out = measured(path, tmp_path, capsys, "--split", "test", "--by", "density")
    assert line == "measured: 40 rows of split test; left out: 20 of train; nothing is fitted"
    image = found["levels"]["image"]
    assert not (out / "calibration.json").exists() and "at_threshold" not in image["outputs"]["1"]
    assert "sensitivity" not in image["subgroups"]["density"]["1"]["rows"][0]
    line, found, _ = measured(path, tmp_path, capsys, "--split", "test", "--threshold", "0.5")  # that was fixed before
    assert "nothing is fitted" in line and "at_threshold" in found["levels"]["image"]["outputs"]["1"]


def test_calibration_of_other_rows_is_refused(predictions, tmp_path):
    images = read_cases(predictions, split="test")
    found = evaluate(images, Settings(levels=("image",), resamples=5))
    with pytest.raises(DataError, match=r"it needs rows of split val only, not of test"):
        write_calibration(tmp_path, images, found, "abc")
    parts = read_parts(predictions, split="test")
    assert len(parts.measured) == 40 and len(parts.validation) == 60
    assert parts.rows == {"measured": {"test": 40}, "left_out": {"train": 80, "val": 60}}
