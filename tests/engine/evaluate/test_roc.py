"""Areas under the ROC curve against scikit-learn, pairs counted one by one, and DeLong's published formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from gigamorph.engine.evaluate import roc
from gigamorph.engine.evaluate.bootstrap import Resamples
from gigamorph.engine.evaluate.curves import WeightedCurves


@st.composite
def scored(draw, least=1, classes=2):
    """Labels, with `least` of each class, and scores, with ties or without."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(classes * least, 60))
    labels = np.concatenate([np.repeat(np.arange(classes), least), random.integers(0, classes, n - classes * least)])
    scores = random.normal(size=(n, classes))
    if draw(st.booleans()):
        scores = scores.round()
    return random.permutation(labels), scores


def psi(x, y):
    """1, 1/2, 0 for x >, =, < y, of every pair."""
    return np.heaviside(np.subtract.outer(x, y), 0.5)


def delong_by_pairs(labels, scores):
    """Areas and covariance as printed (DeLong et al., 1988, equations 4 to 6), in sums over all pairs."""
    x = [s[labels == 1] for s in scores]
    y = [s[labels == 0] for s in scores]
    m, n = len(x[0]), len(y[0])
    pairs = [psi(a, b) for a, b in zip(x, y, strict=True)]
    area = [p.sum() / (m * n) for p in pairs]
    covariance = np.zeros((len(scores), len(scores)))
    for r in range(len(scores)):
        for s in range(len(scores)):
            v10 = [pairs[k].sum(1) / n for k in (r, s)]
            v01 = [pairs[k].sum(0) / m for k in (r, s)]
            s10 = sum((v10[0][i] - area[r]) * (v10[1][i] - area[s]) for i in range(m)) / (m - 1)
            s01 = sum((v01[0][j] - area[r]) * (v01[1][j] - area[s]) for j in range(n)) / (n - 1)
            covariance[r, s] = s10 / m + s01 / n
    return np.array(area), covariance


@given(scored())
def test_area_is_scikit_learns_and_the_share_of_ordered_pairs(case):
    labels, scores = case[0], case[1][:, 1]
    area = roc.auc(labels, scores)
    assert area == pytest.approx(roc_auc_score(labels, scores), rel=0, abs=1e-12)
    assert area == pytest.approx(psi(scores[labels == 1], scores[labels == 0]).mean(), rel=0, abs=1e-12)


@given(scored(), st.integers(0, 100))
def test_weighted_area_is_scikit_learns(case, seed):
    labels, scores = case[0], case[1][:, 1]
    weights = np.random.default_rng(seed).uniform(0.1, 3, (3, len(labels)))
    found = WeightedCurves(labels, scores)(weights).auc()
    expected = [roc_auc_score(labels, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@given(scored(classes=4))
def test_macro_area_is_scikit_learns(case):
    labels, scores = case
    p = expit(scores) / expit(scores).sum(1, keepdims=True)
    expected = roc_auc_score(labels, p, multi_class="ovr", average="macro")
    assert roc.macro_auc(labels, p) == pytest.approx(expected, rel=0, abs=1e-12)


def test_macro_area_leaves_out_classes_that_do_not_occur_and_takes_the_second_of_two_columns():
    scores = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    assert roc.macro_auc([0, 1, 1], scores) == 1.0
    assert roc.macro_auc([2, 2, 2], scores) is None
    assert roc.macro_auc([0, 1, 1], np.array([[9, 0.1], [9, 0.2], [9, 0.3]])) == 1.0


def test_label_wise_area_takes_each_label_from_the_rows_that_know_it():
    truth = np.array([[1, 0, 1], [0, 1, 1], [np.nan, 1, 1], [1, 0, 1]], float)
    scores = np.array([[0.9, 0.6, 1], [0.1, 0.5, 2], [0.0, 0.7, 3], [0.2, 0.1, 4]])
    mean, areas = roc.labelwise_auc(truth, scores)
    assert areas == [1.0, 0.75, None] and mean == 0.875


@given(scored(least=2, classes=2))
def test_delong_is_the_published_formula(case):
    labels, scores = case
    area, covariance = roc.delong(labels, list(scores.T))
    expected_area, expected = delong_by_pairs(labels, list(scores.T))
    np.testing.assert_allclose(area, expected_area, rtol=0, atol=1e-12)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12)


def test_delong_agrees_with_the_bootstrap_of_independent_rows():
    random = np.random.default_rng(0)
    labels = (np.arange(600) % 3 == 0).astype(int)
    first = random.normal(size=600) + labels
    second = first + random.normal(size=600)
    _, covariance = roc.delong(labels, [first, second])
    drawn = []
    for scores in (first, second):
        curve = WeightedCurves(labels, scores)
        resamples = Resamples([str(i) for i in range(600)], 4000, seed=1)
        drawn.append(resamples.values(lambda w, curve=curve: {"auc": curve(w).auc()})["auc"])
    np.testing.assert_allclose(np.sqrt(np.diag(np.cov(drawn))), np.sqrt(np.diag(covariance)), rtol=0.05)
    assert np.corrcoef(drawn)[0, 1] == pytest.approx(covariance[0, 1] / np.sqrt(np.prod(np.diag(covariance))), abs=0.05)


def intervals_of(labels, scores):
    """DeLong's interval for each row of scores, without the area by scikit-learn, which takes most of the time."""
    found = []
    for row in scores:
        [area], [[variance]] = roc.delong(labels, [row])
        found.append(roc.interval_of(float(area), float(np.sqrt(variance)) or None))
    assert found[:20] == [pytest.approx(roc.delong_interval(labels, row), abs=1e-12) for row in scores[:20]]
    return found


def test_delongs_interval_covers_the_true_area():
    random = np.random.default_rng(1)
    labels = np.repeat([0, 1], [80, 40])
    true = norm.cdf(1 / np.sqrt(2))  # of normal scores one standard deviation apart
    intervals = intervals_of(labels, random.normal(size=(1000, 120)) + labels)
    covered = np.mean([low <= true <= high for low, high in intervals])
    assert 0.925 < covered < 0.97


def test_delongs_interval_is_too_narrow_for_few_cases_of_a_high_area():
    """As docs/evaluation.md says."""
    random = np.random.default_rng(1)
    labels = np.repeat([0, 1], 20)
    true = norm.cdf(2 / np.sqrt(2))
    intervals = intervals_of(labels, random.normal(size=(1000, 40)) + 2 * labels)
    covered = np.mean([low <= true <= high for low, high in filter(None, intervals)])
    assert 0.85 < covered < 0.91


def test_paired_test_is_the_difference_over_its_deviation():
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, 200)
    first, second = random.normal(size=200) + labels, random.normal(size=200) + 2 * labels
    area, covariance = delong_by_pairs(labels, [first, second])
    z = (area[1] - area[0]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = roc.paired_delong(labels, first, second)
    assert found.z == pytest.approx(z, abs=1e-10) and found.p == pytest.approx(2 * norm.cdf(-abs(z)), rel=1e-9)
    assert found.interval[0] < found.difference < found.interval[1] and found.p < 0.01


def test_paired_test_holds_its_level_where_the_two_are_equally_good():
    random = np.random.default_rng(3)
    labels = np.repeat([0, 1], [60, 40])
    p = []
    for _ in range(1000):
        shared = random.normal(size=100) + labels
        p.append(roc.paired_delong(labels, shared + random.normal(size=100), shared + random.normal(size=100)).p)
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.075


def test_equal_rankings_have_no_p_value():
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([1.0, 3, 2, 2, 5])
    found = roc.paired_delong(labels, scores, 3 * scores + 1)
    assert found.difference == 0 and found.p is None and found.interval is None
    assert roc.delong_interval([0, 0, 1, 1], [1, 2, 3, 4]) is None  # perfect: the variance is 0
    with pytest.raises(ValueError, match="two positives and two negatives, not 1 and 4"):
        roc.delong([1, 0, 0, 0, 0], [np.arange(5)])


def test_infinite_scores_keep_their_order():
    assert roc.auc([0, 1, 0, 1], [-np.inf, np.inf, 0, 1]) == 1.0
    assert roc.auc([0, 1, 0, 1], [np.inf, np.inf, 0, 1]) == 0.625
