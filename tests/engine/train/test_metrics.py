import numpy as np
import pytest

from gigamorph.engine.train.metrics import Prediction, auc, per_breast, scores


def two(p):
    return np.array([[1 - v, v] for v in p])


def test_auc_counts_pairs_and_takes_values_outside_the_unit_interval():
    assert auc([0, 0, 1, 1], two([0.1, 0.4, 0.35, 0.8])) == 0.75
    # A sigmoid in float32, as torchmetrics applies it, makes these three equal.
    assert auc([0, 0, 1], two([20.0, 25.0, 30.0])) == 1.0


def test_auc_resolves_differences_below_float32():
    assert auc([0, 1], two([0.5, 0.5 + 1e-12])) == 1.0


def test_auc_of_one_class_is_none_and_of_three_is_the_mean_over_the_classes():
    assert auc([1, 1], two([0.2, 0.3])) is None
    p = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]])
    assert auc([0, 1, 2, 1], p) == pytest.approx((1 + 1 + 1) / 3)
    assert auc([0, 1, 1, 1], p) == pytest.approx(1.0)  # class 2 absent: mean over 0 and 1


def test_breast_is_the_mean_of_its_views():
    rows = [
        Prediction("a", (0.8, 0.2), 0, "p1", "L", "CC"),
        Prediction("b", (0.6, 0.4), 1, "p1", "L", "MLO"),
        Prediction("c", (0.1, 0.9), 1, "p1", "R", "CC"),
        Prediction("d", (0.5, 0.5), None, "", "", ""),
        Prediction("e", (0.4, 0.6), None, "", "", ""),
    ]
    breasts = per_breast(rows)
    assert [(b.image, b.label, b.view) for b in breasts] == [
        ("p1_L", 1, "CC+MLO"), ("p1_R", 1, "CC"), ("d", None, ""), ("e", None, "")
    ]  # fmt: skip
    assert breasts[0].probabilities == pytest.approx((0.7, 0.3))
    assert scores(rows) == {"images": 3, "auc_image": 1.0, "breasts": 2, "auc_breast": None}
    assert scores([])["auc_image"] is None
