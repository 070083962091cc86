"""The page of the demonstration says how sure its figures are."""

import re

import numpy as np

from gigamorph.engine.demo.report import _area
from gigamorph.engine.evaluate.evaluate import Settings
from gigamorph.engine.train.metrics import Prediction


def test_the_area_has_its_interval_over_patients():
    random = np.random.default_rng(0)
    labels = [patient % 2 for patient in range(40)]
    odds = [float(random.normal() + 2 * label) for label in labels]
    made = [
        Prediction(f"{n}.dcm", (-z, z), label, f"P{n}") for n, (z, label) in enumerate(zip(odds, labels, strict=True))
    ]
    found = re.fullmatch(r"(0\.\d{3}) \((0\.\d{3}) to ([01]\.\d{3})\)", _area(made, Settings(("image",), resamples=50)))
    assert found is not None and float(found[2]) < float(found[1]) < float(found[3])
