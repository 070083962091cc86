"""The page of the demonstration says how sure its figures are."""

import re

import numpy as np

from gigamorph.engine.evaluate.evaluate import Settings
from gigamorph.engine.evaluate.report import format_value, no_interval
from gigamorph.engine.mammography.demo.report import _auc
from gigamorph.engine.train.metrics import Prediction


def test_the_area_has_its_interval_over_patients():
    random = np.random.default_rng(0)
    labels = [patient % 2 for patient in range(40)]
    odds = [float(random.normal() + 2 * label) for label in labels]
    made = [
        Prediction(f"{n}.dcm", (-z, z), label, f"P{n}") for n, (z, label) in enumerate(zip(odds, labels, strict=True))
    ]
    area = _auc(made, Settings(("image",), resamples=50))
    found = re.fullmatch(r"(0\.\d{3}) \((0\.\d{3}) to ([01]\.\d{3})\)", format_value(area))
    assert found is not None and float(found[2]) < float(found[1]) < float(found[3])


def test_a_perfect_ranking_has_no_interval_but_a_reason():
    made = [Prediction(f"{n}.dcm", (-z, z), n % 2, f"P{n}") for n, z in enumerate([-1.0, 1.0, -2.0, 2.0] * 8)]
    area = _auc(made, Settings(("image",), resamples=50))
    assert format_value(area) == "1.000" and "the same in every resample" in no_interval(area)
