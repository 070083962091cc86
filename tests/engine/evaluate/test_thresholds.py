"""A threshold that is told does again what is told of it, from metrics.json, from the page and from the command."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.evaluate import Settings, evaluate
from gigamorph.engine.evaluate.measures import short_threshold as threshold
from gigamorph.engine.evaluate.report import _threshold


def cases_of(labels, scores, **more) -> Cases:
    n = len(labels)
    names = tuple(f"i{k}" for k in range(n))
    truth, columns = np.array(labels, float)[:, None], np.array(scores, float)[:, None]
    return Cases(("cancer",), truth, columns, names, names, ("",) * n, ("",) * n, **more)


SCORES = {
    "ordinary": lambda random, n: random.normal(size=n) * 2,
    "nearly equal": lambda random, n: 0.3 + random.normal(size=n) * 1e-9,
    "all probabilities 1": lambda random, n: 40 + random.normal(size=n),
    "large both ways": lambda random, n: random.normal(size=n) * 200,
    "of probabilities with six digits": lambda random, n: np.log(p := random.uniform(size=n).round(6)) - np.log1p(-p),
    "ends": lambda random, n: random.choice([-np.inf, np.inf, -40.0, 40.0, 0.0], n),
}


@pytest.mark.parametrize("kind", SCORES)
@settings(max_examples=5)
@given(seed=st.integers(0, 10000))
def test_told_thresholds_replay(kind, seed):
    random = np.random.default_rng(seed)
    labels = random.permutation([0, 0, 0, 1, 1, 1, *random.integers(0, 2, 20)])
    with np.errstate(divide="ignore"):
        cases = cases_of(labels, SCORES[kind](random, len(labels)))
    options = Settings(levels=("image",), rates=(0.5, 0.9), resamples=1)
    found = evaluate(cases, options)["levels"]["image"]["outputs"]["cancer"]
    for told, points in (
        ("sensitivity", found["sensitivity_at_specificity"]),
        ("specificity", found["specificity_at_sensitivity"]),
    ):
        for point in points:
            if _threshold(point) == "above all scores":
                assert point["value"] == (0 if told == "sensitivity" else 1)
                continue
            name, _, number = _threshold(point).rpartition("=")  # as the command takes it
            again = replace(options, **{name or "threshold": float(number)})
            at = evaluate(cases, again)["levels"]["image"]["outputs"]["cancer"]["at_threshold"]
            assert at[told]["value"] == point["value"], (point, told)


def test_thresholds_have_few_digits_and_never_lie_above_their_score():
    assert threshold(30.0, 7.0, probable=False) == {"threshold": 30.0}
    assert threshold(0.123456789, 0.1, probable=False) == {"threshold": 0.1234}
    assert threshold(0.123456789, 0.12345, probable=False) == {"threshold": 0.123456}
    assert threshold(-1.23456, None, probable=False) == {"threshold": -1.235}
    assert threshold(None, 1.0, probable=True) == {"threshold": None, "log_odds": None}
    assert threshold(41.0, 40.0, probable=True) == {"threshold": None, "log_odds": 41.0}  # both probabilities are 1
    assert threshold(np.inf, 3.0, probable=True) == {"threshold": 1.0, "log_odds": 4.0}
    assert threshold(np.inf, 40.0, probable=True) == {"threshold": None, "log_odds": 41.0}
    assert threshold(-np.inf, None, probable=True) == {"threshold": 0.0, "log_odds": None}
