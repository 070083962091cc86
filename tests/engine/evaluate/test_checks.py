"""What is no label and no score is refused by every function that takes them, and never counted as something."""

import numpy as np
import pytest

from gigamorph import DataError
from gigamorph.engine.evaluate import calibration, curves, measures, readers, roc
from gigamorph.engine.evaluate.froc import Marked

LABELS, SCORES = [0, 1, 0, 1, 1], [0.1, 0.9, 0.4, 0.6, 0.3]
OF_BOTH = {
    "auc": roc.auc,
    "partial_auc": lambda labels, scores: roc.partial_auc(labels, scores, 0.9),
    "delong": lambda labels, scores: roc.delong(labels, [SCORES, scores]),
    "delong_interval": roc.delong_interval,
    "paired_delong": lambda labels, scores: roc.paired_delong(labels, SCORES, scores),
    "macro_auc": lambda labels, scores: roc.macro_auc(labels, np.stack([scores, scores], 1)),
    "reliability": calibration.reliability,
    "slope_and_intercept": calibration.slope_and_intercept,
    "in_the_large": calibration.in_the_large,
    "curves": curves.WeightedCurves,
    "readers": lambda labels, scores: readers.reader_study(labels, np.array([[SCORES, scores]])),
}


def with_second(values, value):
    return [values[0], value, *values[2:]]


@pytest.mark.parametrize("name", OF_BOTH)
def test_nan_and_what_is_no_label_are_refused(name):
    measure = OF_BOTH[name]
    measure(LABELS, SCORES)
    with pytest.raises(DataError, match="not a number"):
        measure(LABELS, with_second(SCORES, np.nan))
    with pytest.raises(DataError, match="not a number"):
        measure(with_second(LABELS, np.nan), SCORES)
    for wrong in (-1, 2, 0.5):  # -1 stands for "not known" in many tables
        with pytest.raises(DataError, match="labels: row 1 is"):
            measure(with_second(LABELS, wrong), SCORES)
    if name not in ("macro_auc", "readers"):
        with pytest.raises(DataError, match="shape"):
            measure(LABELS, SCORES[:-1])


def test_labels_of_a_table_may_be_unknown_but_scores_not():
    truth, scores = np.array([[1, 0], [0, np.nan], [np.nan, 1]], float), np.zeros((3, 2))
    assert roc.labelwise_auc(truth, scores)[1] == [0.5, 0.5]
    with pytest.raises(DataError, match="scores: row 2 is not a number"):
        roc.labelwise_auc(truth, [[0, 0], [0, 0], [0, np.nan]])


def test_classes_are_whole_numbers_that_there_are():
    for wrong in (-1, 3, 0.5):
        with pytest.raises(DataError, match="classes must be from 0 to 2"):
            measures.quadratic_kappa([0, wrong, 2], [0, 1, 2], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": [[np.nan, 1]]}, "must be finite"),
        ({"scores": [np.nan]}, "must have a score"),
        ({"scores": [1, 2]}, "must have a score"),
        ({"boxes": [[5, 5, 0, 9]]}, "a box is empty"),
        ({"outlines": [[9, 0, 0, 9]]}, "a box is empty"),
    ],
)
def test_marks_and_lesions_are_numbers(change, message):
    values = {"boxes": [[0, 9, 0, 9]], "places": [[1, 1]], "scores": [1]} | change
    with pytest.raises(DataError, match=message):
        Marked("patient p", **{name: np.array(value, float) for name, value in values.items()})


@pytest.mark.parametrize(
    "measure",
    [
        lambda: roc.macro_auc([0, 1], [0.1, 0.2]),
        lambda: roc.labelwise_auc([0, 1], [0.1, 0.2]),
        lambda: roc.labelwise_auc([[0], [1]], [[0.1, 0.3], [0.2, 0.2]]),
        lambda: measures.quadratic_kappa([1, 2], [1], 3),
        lambda: calibration.reliability([], []),
    ],
)
def test_what_does_not_fit_and_no_rows_at_all_are_refused(measure):
    with pytest.raises(DataError, match=r"have shape|no rows"):
        measure()
