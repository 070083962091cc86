"""Predicted numbers against numpy's and the papers' formulas."""

import numpy as np
import pytest

from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.evaluate import Settings
from gigamorph.engine.evaluate.numbers import evaluate_numbers, numbers_headline, statistics, write_numbers_report


def drawn(place: float = 0.0, rows: int = 50):
    random = np.random.default_rng(0)
    truth = random.normal(size=rows)
    return truth + place, truth + place + random.normal(0.2, 0.5, rows)


@pytest.mark.parametrize("place", [0, 1e4, 1e8])
def test_measures_are_the_formulas_wherever_the_numbers_lie(place):
    truth, predicted = drawn(place)
    weights = np.random.default_rng(1).integers(0, 3, (4, len(truth))).astype(float)
    found = statistics(truth, predicted, weights)
    for number, of in enumerate(weights.astype(int)):
        true, told = np.repeat(truth, of), np.repeat(predicted, of)
        error, together = told - true, np.cov(true, told, bias=True)
        expected = {
            "mae": np.abs(error).mean(),
            "rmse": np.sqrt((error**2).mean()),
            "bias": error.mean(),
            "low": error.mean() - 1.96 * error.std(ddof=1),
            "high": error.mean() + 1.96 * error.std(ddof=1),
            "r2": 1 - (error**2).sum() / ((true - true.mean()) ** 2).sum(),
            "pearson": np.corrcoef(true, told)[0, 1],
            "concordance": 2 * together[0, 1] / (np.trace(together) + error.mean() ** 2),
        }
        assert {name: found[name][number] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_what_numbers_that_are_all_the_same_do_not_define():
    """0.1 is no binary fraction: the mean of ten of them is not it, and they are not the numbers' variation."""
    _, predicted = drawn(rows=10)
    same = np.full(10, 0.1)
    some = np.array([[1.0] * 10, [3.0, 0, 0, 1, 0, 2, 0, 0, 1, 0]])
    assert all(np.isnan(statistics(same, predicted, some)[name]).all() for name in ("r2", "pearson"))
    assert np.isnan(statistics(predicted, same, some)["pearson"]).all()
    nearly = np.append(np.full(9, 0.1), 7.3)
    without = np.append(np.ones(9), 0)[None]
    assert np.isnan(statistics(nearly, predicted, without)["r2"]).all()


def numbers(truth, predicted) -> Cases:
    rows = len(truth)
    return Cases(
        outputs=("age",),
        truth=np.asarray(truth, float)[:, None],
        scores=np.asarray(predicted, float)[:, None],
        names=tuple(f"i{n}" for n in range(rows)),
        patients=tuple(f"p{n}" for n in range(rows)),
        exams=("",) * rows,
        sides=("",) * rows,
        kind="numbers",
        probable=False,
    )


@pytest.mark.parametrize("rows", [1, 10])
def test_a_measure_that_is_not_defined_says_so_and_has_no_interval(rows, tmp_path):
    images = numbers(np.full(rows, 0.1), np.arange(rows))
    found = evaluate_numbers(images, Settings(resamples=50))
    for name in ("r2", "pearson"):
        measured = found["levels"]["image"]["outputs"]["age"][name]
        assert measured["value"] is None and measured["bootstrap"] is None and "are all the same" in measured["why"]
    assert "r not defined: one row, or numbers that are all the same" in numbers_headline(found)[0]
    assert "not defined" in write_numbers_report(tmp_path, images, found).read_text()
