"""Calibration against its definitions, simulated truths and scikit-learn's bins."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from gigamorph.engine.evaluate import calibration


def expected_error(labels, p):
    return calibration.Binned(labels, p).expected_error(np.ones((1, len(p))))[0]


@given(st.integers(0, 10000))
def test_expected_error_is_the_sum_over_the_bins(seed):
    random = np.random.default_rng(seed)
    p = np.concatenate([random.uniform(size=60), [0.0, 1.0]])
    labels = random.integers(0, 2, 62)
    expected, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        inside = (p >= low) & ((p < high) | (high == 1))
        if inside.any():
            expected += inside.mean() * abs(labels[inside].mean() - p[inside].mean())
    assert expected_error(labels, p) == pytest.approx(expected, abs=1e-12)
    times = random.integers(1, 4, 62)
    weighted = calibration.Binned(labels, p).expected_error(times[None].astype(float))[0]
    assert weighted == pytest.approx(expected_error(np.repeat(labels, times), np.repeat(p, times)))


def test_reliability_is_scikit_learns_quantile_curve():
    random = np.random.default_rng(0)
    p = random.uniform(size=500)
    labels = (random.uniform(size=500) < p).astype(int)
    found = calibration.reliability(labels, p)
    frequency, probability = calibration_curve(labels, p, n_bins=10, strategy="quantile")
    np.testing.assert_allclose(found.frequency, frequency, atol=1e-12)
    np.testing.assert_allclose(found.probability, probability, atol=1e-12)
    assert found.rows.tolist() == [50] * 10
    wilson = binomtest(round(frequency[3] * 50), 50).proportion_ci(method="wilson")
    assert (found.low[3], found.high[3]) == pytest.approx(tuple(wilson))


def test_equal_probabilities_stay_together():
    found = calibration.reliability([0, 1, 0, 1, 1], [0.3, 0.3, 0.3, 0.3, 0.9])
    assert found.probability.tolist() == pytest.approx([0.3, 0.9]) and found.rows.tolist() == [4, 1]


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -0.7), (2.0, 1.5)])
def test_slope_and_intercept_are_those_that_the_rows_were_drawn_with(slope, intercept):
    random = np.random.default_rng(4)
    z = random.normal(size=40000) * 2
    labels = random.uniform(size=40000) < expit(intercept + slope * z)
    found = calibration.slope_and_intercept(labels, z)
    assert found == pytest.approx((slope, intercept), abs=0.06)
    # The maximum of the likelihood: its gradient is 0, whatever the scale of the scores.
    left = expit(found[1] + found[0] * z) - labels
    assert abs(left.mean()) < 1e-6 and abs((left * z).mean()) < 1e-5
    assert calibration.slope_and_intercept(labels, z * 1000)[0] == pytest.approx(found[0] / 1000, rel=1e-4)


def test_in_the_large_makes_the_mean_probability_the_frequency():
    random = np.random.default_rng(5)
    z = random.normal(size=300) * 3
    labels = random.uniform(size=300) < 0.1
    shift = calibration.in_the_large(labels, z)
    assert expit(z + shift).mean() == pytest.approx(labels.mean(), abs=1e-9)


def test_what_has_no_finite_slope_has_none():
    assert calibration.slope_and_intercept([0, 0, 1, 1], [1, 2, 3, 4]) is None  # parted
    assert calibration.slope_and_intercept([0, 0, 1, 1], [4, 3, 2, 1]) is None
    assert calibration.slope_and_intercept([0, 1, 0, 1], [1, 1, 1, 1]) is None
    assert calibration.slope_and_intercept([0, 1, 0, 1], [1, np.inf, 2, 0]) is None
    assert calibration.in_the_large([1, 1], [0, 1]) is None
