"""A calibration that was measured is kept, and applied to the checkpoint that it was measured on alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from gigamorph.engine.errors import DataError
from gigamorph.engine.evaluate.calibration import slope_and_intercept
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.evaluate import Settings, evaluate
from gigamorph.engine.evaluate.recalibration import read_calibration, write_calibration

FEW = Settings(levels=("image",), resamples=20)


def overconfident(count: int, seed: int, flip: bool = False) -> Cases:
    """Log-odds twice as large as they should be, and half a unit too high."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, count)
    truth = (rng.random(count) < expit(true)).astype(float)
    names = tuple(f"{n}.dcm" for n in range(count))
    return Cases(
        outputs=("1",), truth=truth[:, None], scores=((2 * true + 0.5) * (-1 if flip else 1))[:, None], names=names,
        patients=names, exams=("",) * count, sides=("",) * count, kind="binary",
    )  # fmt: skip


def test_it_makes_probabilities_of_other_images_frequencies(tmp_path):
    cases = overconfident(2000, 0)
    found = evaluate(cases, FEW) | {"split": "val"}
    path = write_calibration(tmp_path, cases, found, "abc")
    assert path == tmp_path / "calibration.json"
    calibration = read_calibration(path, ["0", "1"], "abc")
    assert (calibration.images, calibration.split) == (2000, "val")
    others = overconfident(4000, 1)
    slope, intercept = slope_and_intercept(others.truth[:, 0], calibration(others.scores[:, 0])) or (0, 0)
    assert abs(slope - 1) < 0.15 and abs(intercept) < 0.15
    # The threshold replays to the sensitivity that was measured.
    point = found["levels"]["image"]["outputs"]["1"]["sensitivity_at_specificity"][1]
    called = calibration(cases.scores[:, 0]) >= calibration(calibration.threshold)
    assert called[cases.truth[:, 0] > 0].mean() == pytest.approx(point["value"], abs=1e-12)


def test_where_there_is_none_nothing_is_written(tmp_path):
    worse = overconfident(200, 0, flip=True)
    parted = replace(worse, scores=worse.truth - 0.5)
    for cases, why in ((worse, "rank worse than chance"), (parted, "separate the two classes")):
        with pytest.raises(DataError, match=why):
            write_calibration(tmp_path, cases, evaluate(cases, FEW), "abc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a calibration.json of gigamorph eval"),
        ("nothing", "is not a calibration.json of gigamorph eval"),
        (None, "cannot be read: No such file"),
        (("1", "abd"), "was measured on another checkpoint"),
        (("2", "abc"), "was measured on another checkpoint"),
    ],
)
def test_a_file_that_does_not_belong_is_one_line(tmp_path, content, message):
    path = tmp_path / "calibration.json"
    if isinstance(content, tuple):
        values = {"slope": 1.0, "intercept": 0.0, "threshold": 0.0, "images": 9, "split": None}
        path.write_text(json.dumps({"output": content[0], "sha256": content[1], **values}))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_calibration(path, ["0", "1"], "abc")
    assert "\n" not in str(error.value)
