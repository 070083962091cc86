"""Resampled patients: the spread that it finds is the spread that there is."""

import numpy as np
import pytest

from gigamorph.engine.evaluate.bootstrap import Resamples


def mean_of(values):
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def test_rows_of_a_patient_come_together():
    clusters = ["b", "a", "b", "c", "b"]
    resamples = Resamples(clusters, 300)
    weights = np.concatenate(list(resamples.weights()))
    assert weights.shape == (300, 5)
    assert (weights[:, [0]] == weights[:, [2, 4]]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()  # three patients are drawn
    masked = np.concatenate(list(resamples.weights(np.array([True, False, True, False, False]))))
    assert (masked == weights[:, [0, 2]]).all()


def test_the_spread_of_a_mean_is_that_of_the_patients_not_of_the_rows():
    random = np.random.default_rng(0)
    of_patient = random.normal(size=200)
    values = np.repeat(of_patient, 4)  # four views that say the same
    clusters = [f"p{i}" for i in range(200) for _ in range(4)]
    together = Resamples(clusters, 2000).values(mean_of(values))["mean"].std()
    apart = Resamples([str(i) for i in range(800)], 2000).values(mean_of(values))["mean"].std()
    assert together == pytest.approx(of_patient.std() / np.sqrt(200), rel=0.06)
    assert apart == pytest.approx(together / 2, rel=0.06)  # too sure by the root of four


def test_intervals_of_clustered_rows_cover_the_truth():
    random = np.random.default_rng(1)
    covered = {True: 0, False: 0}
    for _ in range(200):
        values = np.repeat(random.normal(size=40), 4) + 0.3 * random.normal(size=160)
        for clustered in covered:
            names = [str(i // 4 if clustered else i) for i in range(160)]
            low, high = Resamples(names, 300).spreads(mean_of(values))["mean"].interval
            covered[clustered] += low <= 0 <= high
    assert covered[True] >= 180 and covered[False] <= 160


def test_the_seed_decides_and_nothing_else():
    clusters = [str(i) for i in range(30)]
    values = np.arange(30.0)
    one, two, other = (Resamples(clusters, 50, seed).spreads(mean_of(values))["mean"].interval for seed in (3, 3, 4))
    assert one == two != other


def test_an_interval_needs_nine_in_ten_resamples():
    values = np.arange(100.0)
    resamples = Resamples(["a", "b"], 100)
    spread = resamples.spread(values)
    assert spread.interval == pytest.approx((2.475, 96.525)) and spread.error == values.std(ddof=1)
    values[:10] = np.nan
    assert resamples.spread(values).interval is not None
    values[10] = np.nan
    assert resamples.spread(values).interval is None and "too few patients" in resamples.spread(values).why


@pytest.mark.parametrize(
    ("clusters", "values", "why"),
    [
        (["p"] * 50, np.linspace(0, 1, 50), "all rows are of one patient"),
        (["p", "q"] * 25, np.ones(50), "the same in every resample"),
        (["p", "q"] * 25, np.repeat(0.1, 50), "the same in every resample"),  # but for rounding
    ],
)
def test_an_interval_of_width_0_is_none(clusters, values, why):
    spread = Resamples(clusters, 100).spreads(mean_of(values))["mean"]
    assert spread.interval is None and spread.error is None and why in spread.why
    assert spread.listed() == {"bootstrap": None, "standard_error": None, "why": spread.why}


def test_the_standard_error_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    spread = Resamples([str(i) for i in range(400)], 2000).spreads(mean_of(values))["mean"]
    assert spread.error == pytest.approx(values.std() / 20, rel=0.05)


def test_rows_may_be_asked_for_in_any_order():
    resamples = Resamples([str(i % 7) for i in range(20)], 30)
    order = np.random.default_rng(0).permutation(20)
    every, sorted_ = (np.concatenate(list(resamples.weights(rows))) for rows in (None, order))
    assert (every[:, order] == sorted_).all()
