"""From images to breasts to exams."""

import numpy as np
import pytest
from scipy.special import expit

from gigamorph import DataError
from gigamorph.engine.evaluate.cases import Cases


def images(rows, kind="binary", outputs=("cancer",), **more) -> Cases:
    """Of (patient, exam, side, truth, scores) each."""
    patients, exams, sides, truth, scores = zip(*rows, strict=True)
    return Cases(
        outputs=outputs,
        truth=np.array(truth, float).reshape(len(rows), -1),
        scores=np.array(scores, float).reshape(len(rows), -1),
        names=tuple(f"i{n}" for n in range(len(rows))),
        patients=patients,
        exams=exams,
        sides=sides,
        kind=kind,
        **more,
    )


ROWS = [
    ("p", "e1", "L", 0, 1.0),
    ("p", "e1", "L", 1, -1.0),
    ("p", "e1", "R", 0, 3.0),
    ("p", "e2", "L", 0, 0.0),
    ("q", "", "R", np.nan, 2.0),
    ("", "", "", 1, 4.0),
    ("", "", "", 0, 5.0),
]


def test_a_breast_is_the_mean_probability_of_its_views_and_their_highest_label():
    breasts = images(ROWS).at("breast")
    assert breasts.names == ("p_e1_L", "p_e1_R", "p_e2_L", "q_R", "i5", "i6")
    p = (expit(1) + expit(-1)) / 2
    np.testing.assert_allclose(expit(breasts.scores[:, 0]), [p, *expit([3, 0, 2, 4, 5])], atol=1e-12)
    np.testing.assert_array_equal(breasts.truth[:, 0], [1, 0, 0, np.nan, 1, 0])
    assert breasts.level == "breast" and breasts.clusters[:4] == ("patient p",) * 3 + ("patient q",)
    assert len(set(breasts.clusters)) == 4


def test_an_exam_is_its_highest_breast():
    exams = images(ROWS).at("exam")
    assert exams.names == ("p_e1", "p_e2", "q", "i5", "i6")
    np.testing.assert_allclose(exams.scores[:, 0], [3, 0, 2, 4, 5], atol=1e-12)
    np.testing.assert_array_equal(exams.truth[:, 0], [1, 0, np.nan, 1, 0])
    assert exams.sides == ("L+R", "L", "R", "", "")
    assert exams.labelled().names == ("p_e1", "p_e2", "i5", "i6")
    with pytest.raises(DataError, match="rows are already exams"):
        exams.at("breast")


def test_a_breast_of_several_classes_adds_up_to_one_and_an_exam_is_one_of_its_breasts():
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = [
        ("p", "e", side, np.eye(4)[n], np.log(q / (1 - q))) for n, (side, q) in enumerate(zip("LLR", p, strict=True))
    ]
    cases = images(rows, "classes", tuple("abcd"))
    breasts, exam = cases.at("breast"), cases.at("exam")
    np.testing.assert_allclose(expit(breasts.scores), [p[:2].mean(0), p[2]], atol=1e-12)
    assert breasts.labels.tolist() == [1, 2] and exam.labels.tolist() == [2]
    expected = max((p[:2].mean(0), p[2]), key=lambda q: q @ np.arange(4))
    np.testing.assert_allclose(expit(exam.scores[0]), expected, atol=1e-12)


def test_of_several_labels_each_is_known_or_not():
    rows = [("p", "e", "L", [1, np.nan], [0, 1]), ("p", "e", "L", [0, np.nan], [2, 3]), ("q", "", "L", [0, 1], [0, 0])]
    breasts = images(rows, "labels", ("mass", "calc")).at("breast")
    np.testing.assert_array_equal(breasts.truth, [[1, np.nan], [0, 1]])


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="i1: its score is not a number"):
        images([("p", "", "", 0, 1.0), ("q", "", "", 1, np.nan)])
    with pytest.raises(DataError, match="i0: its score is not a number"):
        images([("p", "", "", 0, np.inf)], probable=False)
