"""Predictions of images and breasts, and the areas that a run is followed by."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.datasets.views import DownsampledSource
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.train.classify import prediction
from gigamorph.engine.train.inputs import check_names
from gigamorph.engine.train.metrics import Prediction, as_cases, auc_of, per_breast, per_exam, scores


def predicted(image, probability, *more) -> Prediction:
    z = float(logit(probability))
    return Prediction(image, (-z, z), *more)


def test_the_header_is_read_whatever_was_made_of_the_image(write_dicom):
    path = write_dicom(np.zeros((8, 6), np.uint16), ImageLaterality="L", ViewPosition="CC")
    source = open_pixels(path)
    for image in (source, DownsampledSource(source, 2)):
        found = prediction({"image": image, "record": Record(path, -1, str(path))}, torch.zeros(2))
        assert (found.patient, found.laterality, found.view) == ("P1", "L", "CC")


def test_breast_is_the_mean_of_its_views():
    rows = [
        predicted("a", 0.2, 0, "p1", "L", "CC"),
        predicted("b", 0.4, 1, "p1", "L", "MLO"),
        predicted("c", 0.9, 1, "p1", "R", "CC"),
        predicted("d", 0.5, None, "", "", ""),
        predicted("e", 0.6, None, "", "", ""),
    ]
    breasts = per_breast(rows, ["0", "1"])
    assert [(b.image, b.label, b.view) for b in breasts] == [
        ("p1_L", 1, "CC+MLO"),
        ("p1_R", 1, "CC"),
        ("d", None, ""),
        ("e", None, ""),
    ]
    assert breasts[0].probabilities == pytest.approx((0.7, 0.3))
    assert scores(rows, ["0", "1"]) == {"images": 3, "auc_image": 1.0, "breasts": 2, "auc_breast": None}
    assert scores([], ["0", "1"])["auc_image"] is None


def test_exams_of_a_patient_are_apart():
    rows = [predicted("a", 0.2, 0, "p", "L", "CC", "e1"), predicted("b", 0.4, 1, "p", "L", "CC", "e2")]
    assert [(b.image, b.exam, b.label) for b in per_breast(rows, ["0", "1"])] == [
        ("p_e1_L", "e1", 0),
        ("p_e2_L", "e2", 1),
    ]


def test_sure_predictions_keep_their_order():
    sure = [Prediction(str(z), (-z, z), int(z > 45), f"p{z}", "L") for z in (40.0, 50.0, 44.0, 60.0)]
    assert {p.probabilities[1] for p in sure} == {1.0}
    found = scores(sure, ["0", "1"])
    assert found["auc_image"] == found["auc_breast"] == 1.0


def test_of_three_classes_the_area_is_the_mean_and_the_breast_adds_up_to_one():
    rows = [
        Prediction("a", tuple(logit([0.8, 0.1, 0.1])), 0, "p", "L"),
        Prediction("b", tuple(logit([0.2, 0.7, 0.1])), 1, "p", "L"),
        Prediction("c", tuple(logit([0.4, 0.3, 0.3])), 2, "q", "L"),
    ]
    assert auc_of(rows) == 1.0 and auc_of(rows[:1]) is None
    breast = per_breast(rows, ["x", "y", "z"])[0]
    assert breast.probabilities == pytest.approx((0.5, 0.4, 0.1)) and breast.label == 1
    assert expit(as_cases(rows, ("x", "y", "z")).at("exam").scores[0]) == pytest.approx([0.5, 0.4, 0.1])


def test_the_error_of_numbers_is_the_mean_over_numbers_however_many_images_have_each():
    truths = (0.0, 4.0), (0.0, np.nan)
    rows = [Prediction(str(t), (1.0, 0.0), exclusive=False, numbers=True, truth=t) for t in truths]
    assert scores(rows, ["a", "b"])["mae_image"] == 2.5


def test_the_positive_class_is_so_by_its_name():
    """Sorted names number normal 1, which was taken for the positive class."""
    found = [Prediction("a.png", (1.0, -1.0), label=0), Prediction("b.png", (-2.0, 2.0), label=1)]
    cases = as_cases(found, ("cancer", "normal"))
    assert cases.outputs == ("cancer",)
    assert cases.truth[:, 0].tolist() == [1, 0] and cases.scores[:, 0].tolist() == [1, -2]
    warned = []
    check_names("t.csv", ["cancer", "normal"], "classes", warned.append)
    assert not warned


def test_the_positive_class_decides_of_breasts_and_exams_whatever_its_number():
    """The exam of a sure cancer was the highest probability of "normal" among its breasts, and labelled so."""
    sides = [("a", 3.0, "L"), ("b", 2.0, "L"), ("c", -3.0, "R"), ("d", -2.0, "R")]
    second = [Prediction(i, (-z, z), int(i == "a"), "p", s, exam="e") for i, z, s in sides]
    first = [replace(one, log_odds=one.log_odds[::-1], label=1 - (one.label or 0)) for one in second]
    unlabelled = [replace(one, label=None) for one in first]
    for grouped in (per_breast, per_exam):
        wanted = grouped(second, ["normal", "cancer"])
        assert [one.label for one in wanted] == [1, 0][: len(wanted)]
        found = grouped(first, ["cancer", "normal"])
        assert [(one.log_odds[::-1], 1 - one.label) for one in found] == [(one.log_odds, one.label) for one in wanted]
        assert {one.label for one in grouped(unlabelled, ["cancer", "normal"])} == {None}
    [exam] = per_exam(first, ["cancer", "normal"])
    assert exam.probabilities[0] == pytest.approx(expit([3.0, 2.0]).mean()) and exam.label == 0
    assert scores(first, ["cancer", "normal"]) == scores(second, ["normal", "cancer"])


def test_the_order_of_three_names_is_reported():
    warned: list[str] = []
    check_names("t.csv", ["0", "1", "2"], "classes", warned.append)
    assert not warned
    check_names("t.csv", ["benign", "cancer", "normal"], "classes", warned.append)
    assert warned[0].startswith("the assumed order is benign < cancer < normal; breasts and exams have the highest")
