"""Exams of several views: the breast that an exam is of, and what a place in a view adds to it."""

import numpy as np
import pytest
from scipy.special import expit, logit

from gigamorph.engine.explain.exams import HEADER, View, combined
from gigamorph.engine.explain.maps import Mark
from gigamorph.engine.train.metrics import Prediction

NAMES = ("benign", "malignant", "normal")


def view(image, side, probabilities, which, adds=1.0):
    own = Prediction(image, tuple(logit(probabilities)), None, "p", side, exam="e")
    return View(own, "p", which, Mark(1.0, 2.0, adds))


def row(views, classes, which=None):
    return dict(zip(HEADER[1:], combined(views, classes, which), strict=True))


def slope(views, breast, column):
    """By how much the breast's log-odds rise with those of its first view."""
    rises = []
    for step in (-1e-5, 1e-5):
        z = [v.prediction.log_odds[column] for v in views if v.prediction.laterality == breast]
        z[0] += step
        rises.append(logit(expit(z).mean()))
    return (rises[1] - rises[0]) / 2e-5


@pytest.mark.parametrize("which", [None, 0, 1, 2])
def test_of_three_classes_the_breast_is_the_one_that_the_exam_is(which):
    """The class explained may be higher in the other breast, whose views are not those of the exam's log-odds."""
    views = [
        view("a", "L", (0.1, 0.2, 0.7), 2 if which is None else which, 3.0),
        view("b", "L", (0.3, 0.1, 0.6), 2 if which is None else which, 0.1),
        view("c", "R", (0.9, 0.05, 0.05), 0 if which is None else which),
        view("d", "R", (0.2, 0.7, 0.1), 0 if which is None else which),
    ]
    found, number = row(views, NAMES, which), 2 if which is None else which
    mean = np.mean([expit(one.prediction.log_odds) for one in views[:2]], 0)
    assert found["laterality"] == "L" and found["class"] == NAMES[number]
    assert float(found["probability"]) == pytest.approx(mean[number], rel=1e-5)
    assert found["image_path"] == "a"
    assert float(found["adds"]) == pytest.approx(3.0 * slope(views, "L", number), rel=1e-5)


def test_the_positive_class_chooses_the_breast_whatever_its_number():
    views = [view("a", "L", (0.9, 0.1), 1), view("b", "R", (0.2, 0.8), 1)]
    found = row(views, ("cancer", "normal"), 1)
    assert found["laterality"] == "L" and float(found["probability"]) == pytest.approx(0.1)
    found = row(views, ("cancer", "normal"))
    assert found["laterality"] == "L" and float(found["probability"]) == pytest.approx(0.9)
    assert found["class"] == "cancer"


def test_frames_of_one_file_whose_side_is_not_known_stand_for_themselves():
    """They have the same path; the exam is that of the higher one, not of both."""
    views = [view("a", "", (0.6, 0.4), 1, adds=3.0), view("a", "", (0.1, 0.9), 1, adds=0.5)]
    found = row(views, ("normal", "cancer"))
    assert found["views"] == 1 and float(found["adds"]) == pytest.approx(0.5)
