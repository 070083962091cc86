"""Every measure against scikit-learn where it has it, else against its definition, on random rows with ties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import beta
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)

from gigamorph import DataError
from gigamorph.engine.evaluate import curves, measures, roc
from gigamorph.engine.evaluate.bootstrap import Resamples
from gigamorph.engine.evaluate.cases import Cases


def binary(labels, scores, patients=None, **more) -> Cases:
    n = len(labels)
    return Cases(
        outputs=("cancer",),
        truth=np.asarray(labels, float)[:, None],
        scores=np.asarray(scores, float)[:, None],
        names=tuple(f"image{i}" for i in range(n)),
        patients=tuple(patients or [f"p{i}" for i in range(n)]),
        exams=("",) * n,
        sides=("",) * n,
        **more,
    )


@st.composite
def rows(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(4, 60))
    labels = np.concatenate([[0, 0, 1, 1], random.integers(0, 2, n - 4)])
    z = random.normal(size=n) * draw(st.sampled_from([0.5, 2, 8]))
    return random.permutation(labels), z.round(1) if draw(st.booleans()) else z


@given(rows(), st.integers(0, 100))
def test_weighted_curves_are_scikit_learns(case, seed):
    labels, z = case
    weights = np.random.default_rng(seed).uniform(0.1, 3, (2, len(z)))
    found = curves.WeightedCurves(labels, z)(weights)
    expected = [average_precision_score(labels, z, sample_weight=w) for w in weights]
    np.testing.assert_allclose(found.average_precision(), expected, rtol=0, atol=1e-12)
    for rate in (0.0, 0.5, 0.9, 1.0):
        for row, w in enumerate(weights):
            fpr, tpr, _ = roc_curve(labels, z, sample_weight=w, drop_intermediate=False)
            sensitivity = tpr[1 - fpr >= rate - 1e-9].max()
            specificity = (1 - fpr)[tpr >= rate - 1e-9].max()
            assert found.sensitivity_at(rate)[row] == pytest.approx(sensitivity, rel=0, abs=1e-12)
            assert found.specificity_at(rate)[row] == pytest.approx(specificity, rel=0, abs=1e-12)
    grid = np.linspace(0, 1, 7)
    fpr, tpr, _ = roc_curve(labels, z, sample_weight=weights[0], drop_intermediate=False)
    at = found.rates(grid)[0]
    inner = [k for k, g in enumerate(grid) if not np.isclose(fpr, g).any()]  # at a step both ends are on the curve
    np.testing.assert_allclose(at[inner], np.interp(grid, fpr, tpr)[inner], rtol=0, atol=1e-12)


@given(rows())
def test_all_measures_of_an_output(case):
    labels, z = case
    cases = binary(labels, z)
    found = measures.measure_output(cases, 0, Resamples(cases.clusters, 20), (0.8, 0.95))
    assert found["positives"] == labels.sum() and found["negatives"] == (labels == 0).sum()
    p = expit(z)
    assert found["average_precision"]["value"] == pytest.approx(average_precision_score(labels, z), rel=0, abs=1e-12)
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(labels, p), rel=0, abs=1e-12)
    for point in (*found["sensitivity_at_specificity"], *found["specificity_at_sensitivity"]):
        called = z >= (np.inf if point["threshold"] is None else point["log_odds"])
        sensitivity, specificity = called[labels == 1].mean(), (~called)[labels == 0].mean()
        both = (sensitivity, specificity)
        value, fixed = both if point in found["sensitivity_at_specificity"] else both[::-1]
        assert point["value"] == pytest.approx(value) and fixed >= point["at"] - 1e-12


def pf1(labels, p):
    labels, p = np.asarray(labels, float), np.asarray(p, float)
    return measures.weighted_pf1(labels, p, labels * p, np.ones((1, len(p))))[0]


@given(rows(), st.integers(0, 100))
def test_resampled_values_are_those_of_repeated_rows(case, seed):
    """A weight of three is the row written three times."""
    labels, z = case
    times = np.random.default_rng(seed).integers(0, 4, len(z))
    if len(set(np.repeat(labels, times))) < 2:
        return
    many, scores = np.repeat(labels, times), np.repeat(z, times)
    drawn = curves.WeightedCurves(labels, z)(times[None].astype(float))
    assert drawn.average_precision()[0] == pytest.approx(average_precision_score(many, scores), abs=1e-12)
    weights = times[None].astype(float)
    found = measures.weighted_pf1(labels, expit(z), labels * expit(z), weights)[0]
    assert found == pytest.approx(pf1(many, expit(scores)), abs=1e-12)


def test_pf1_of_hard_calls_is_f1_and_of_the_competitions_code():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 50)
    called = random.integers(0, 2, 50)
    assert pf1(labels, called) == pytest.approx(f1_score(labels, called), abs=1e-12)
    p = random.uniform(size=50)
    # As the RSNA competition prints it.
    y_true_count = ctp = cfp = 0.0
    for label, prediction in zip(labels, p, strict=True):
        if label:
            y_true_count += 1
            ctp += prediction
        else:
            cfp += prediction
    c_precision, c_recall = ctp / (ctp + cfp), ctp / y_true_count
    expected = 2 * (c_precision * c_recall) / (c_precision + c_recall)
    assert pf1(labels, p) == pytest.approx(expected, abs=1e-12)
    assert pf1([1, 0], [0.0, 0.0]) == 0 and np.isnan(pf1([0, 0], [0.5, 0.1]))


@given(st.integers(0, 10000), st.integers(2, 5))
def test_quadratic_kappa_is_scikit_learns_with_weights_too(seed, classes):
    random = np.random.default_rng(seed)
    labels, predicted = random.integers(0, classes, (2, 30))
    times = random.integers(0, 3, (2, 30)).astype(float)
    expected = cohen_kappa_score(labels, predicted, weights="quadratic")
    assert measures.quadratic_kappa(labels, predicted, classes) == pytest.approx(expected, rel=0, abs=1e-12)
    found = measures.Confusion(labels, predicted, classes).kappa(times)
    expected = [cohen_kappa_score(labels, predicted, weights="quadratic", sample_weight=w) for w in times]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_classes_are_measured_by_kappa_and_the_mean_of_their_areas():
    labels = np.array([0, 1, 2, 2, 1, 0])
    cases = Cases(
        outputs=("a", "b", "c"),
        truth=np.eye(3)[labels],
        scores=np.eye(3)[[0, 1, 2, 1, 1, 0]] * 4 - 2,
        names=tuple("uvwxyz"),
        patients=tuple("uvwxyz"),
        exams=("",) * 6,
        sides=("",) * 6,
        kind="classes",
    )
    resamples = Resamples(cases.clusters, 50)
    found = measures.measure_classes(cases, resamples)
    assert found["confusion"] == [[2, 0, 0], [0, 2, 0], [0, 1, 1]]
    assert found["kappa"]["value"] == pytest.approx(cohen_kappa_score(labels, cases.predicted, weights="quadratic"))
    mean = measures.measure_mean(cases, resamples)
    assert mean["value"] == pytest.approx((1 + 0.875 + 0.75) / 3) and mean["left_out"] == []


def test_one_class_is_said_and_nothing_is_made_up():
    cases = binary([1, 1, 1], [0, 1, 2])
    found = measures.measure_output(cases, 0, Resamples(cases.clusters, 10), (0.9,))
    assert found["undefined"] == "one class only: all 3 images are positive" and "auc" not in found


def test_scores_that_only_rank_have_no_calibration():
    cases = binary([0, 1, 0, 1], [3, 900, 5, 4], probable=False)
    found = measures.measure_output(cases, 0, Resamples(cases.clusters, 10), (0.5,))
    assert found["auc"]["value"] == 0.75 and not {"brier", "ece", "pf1", "calibration"} & set(found)
    assert found["sensitivity_at_specificity"][0]["threshold"] == 4.0


def test_kappa_of_one_class_is_not_defined():
    assert measures.quadratic_kappa([1, 1], [1, 1], 3) is None
    assert measures.quadratic_kappa([1, 1], [0, 1], 3) == 0  # as much as chance


@given(rows(), st.sampled_from([0.0, 0.3, 0.8, 0.95]))
def test_partial_areas_are_scikit_learns(case, least):
    labels, z = case
    found = roc.partial_auc(labels, z, least)
    expected = roc_auc_score(labels, z, max_fpr=1 - least) if least else roc_auc_score(labels, z)
    assert found.standardised == pytest.approx(expected, rel=0, abs=1e-12)
    width = 1 - least
    worst = width**2 / 2
    assert found.raw == pytest.approx((2 * found.standardised - 1) * (width - worst) + worst, abs=1e-12)
    # The same with classes and signs turned is the area over sensitivities.
    turned = roc.partial_auc(1 - labels, -z, least)
    assert vars(roc.partial_auc(labels, z, least, "sensitivity")) == pytest.approx(vars(turned), abs=1e-12)


@given(rows(), st.integers(0, 100))
def test_weighted_partial_areas_are_those_of_repeated_rows(case, seed):
    labels, z = case
    times = np.random.default_rng(seed).integers(0, 4, len(z))
    many, scores = np.repeat(labels, times), np.repeat(z, times)
    if len(set(many)) < 2:
        return
    curves_ = curves.WeightedCurves(labels, z)(times[None].astype(float))
    for least in (0.2, 0.9):
        assert curves_.partial_area(least)[0] == pytest.approx(roc.partial_auc(many, scores, least).raw, abs=1e-12)
        over = roc.partial_auc(many, scores, least, "sensitivity").raw
        assert curves_.mirrored.partial_area(least)[0] == pytest.approx(over, abs=1e-12)


def test_partial_areas_need_a_range_and_two_classes():
    assert roc.partial_auc([1, 1], [0, 1], 0.9) is None
    with pytest.raises(DataError, match="from 0 to below 1, not 1"):
        roc.partial_auc([0, 1], [0, 1], 1)


@pytest.mark.parametrize(
    ("scores", "why"),
    [([0, 0, 1, 1], "perfect"), ([2, 2, 2, 2], "scores are equal"), ([1, 1, 0, 0], "every positive ranks below")],
)
def test_why_delong_has_no_variance(scores, why):
    cases = binary([0, 0, 1, 1], scores)
    found = measures.measure_output(cases, 0, Resamples(cases.clusters, 20), (0.9,))
    assert why in found["auc"]["delong_why"]


def test_a_share_that_no_resample_changes_has_an_exact_interval_of_patients():
    labels, z = [0] * 30 + [1] * 10, [-1.0] * 30 + [1.0] * 10
    cases = binary(labels, z, [f"p{i // 2}" for i in range(40)])  # two rows each
    found = measures.measure_output(cases, 0, Resamples(cases.clusters, 50), (0.9,), threshold=0.0)
    assert found["auc"]["bootstrap"] is None and found["auc"]["delong"] is None
    assert "same in every resample" in found["auc"]["why"] and "ranking is perfect" in found["auc"]["delong_why"]
    told = found["at_threshold"]["sensitivity"]
    assert told["value"] == 1 and told["bootstrap"] is None
    assert told["exact"] == pytest.approx([beta.ppf(0.025, 5, 1), 1])  # five patients of five
    assert found["at_threshold"]["specificity"]["exact"] == pytest.approx([beta.ppf(0.025, 15, 1), 1])
    assert "exact" not in found["at_threshold"]["called"]


def test_measures_have_standard_errors():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 300)
    cases = binary(labels, random.normal(size=300) + labels)
    found = measures.measure_output(cases, 0, Resamples(cases.clusters, 400), (0.8,), threshold=0.5)
    area = found["auc"]
    _, [[variance]] = roc.delong(labels, [cases.scores[:, 0]])
    assert area["delong_standard_error"] == pytest.approx(np.sqrt(variance))
    assert area["standard_error"] == pytest.approx(np.sqrt(variance), rel=0.12)
    every = [
        area,
        *(found[name] for name in ("average_precision", "pf1", "brier", "ece")),
        *found["sensitivity_at_specificity"],
        *found["specificity_at_sensitivity"],
        *found["at_threshold"].values(),
        *found["partial_auc"],
        *(part["raw"] for part in found["partial_auc"]),
    ]
    for one in every:
        low, high = one["bootstrap"]
        assert 0 < one["standard_error"] < high - low < 6 * one["standard_error"]
