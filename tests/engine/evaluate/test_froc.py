"""Free-response ROC of marks that can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigamorph import DataError
from gigamorph.engine.evaluate import froc
from gigamorph.engine.evaluate.froc import Marked


def image(patient, boxes, marks) -> Marked:
    """`marks`: (row, column, score)."""
    marks = np.array(marks, float).reshape(-1, 3)
    return Marked(patient, np.array(boxes, float).reshape(-1, 4), marks[:, :2], marks[:, 2])


IMAGES = [
    # Two lesions; one is hit twice, the other once; one false mark.
    image("a", [(0, 10, 0, 10), (20, 30, 20, 30)], [(5, 5, 0.9), (9, 9, 0.3), (25, 25, 0.5), (15, 15, 0.7)]),
    # No lesion, two marks.
    image("b", [], [(1, 1, 0.6), (2, 2, 0.2)]),
    # A lesion that nothing finds: its end is excluded.
    image("c", [(0, 10, 0, 10)], [(10, 5, 0.8)]),
    image("d", [], []),
]


def test_curve_by_hand():
    false, sensitivity = froc.curve(froc.events(IMAGES))
    # thresholds:               none  0.9  0.8  0.7  0.6  0.5  0.2
    assert (false[0] * 4).tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert (sensitivity[0] * 3).tolist() == pytest.approx([0, 1, 1, 1, 1, 2, 2])


def test_measure_by_hand():
    found = froc.measure(IMAGES, count=200)
    assert (found["images"], found["images_with_lesions"], found["lesions"], found["marks"]) == (4, 2, 3, 7)
    values = {row["false_marks_per_image"]: row["value"] for row in found["sensitivity"]}
    third = pytest.approx(1 / 3)
    assert values == {
        0.125: third,
        0.25: third,
        0.5: third,
        1: pytest.approx(2 / 3),
        2: pytest.approx(2 / 3),
        4: pytest.approx(2 / 3),
        8: pytest.approx(2 / 3),
    }
    assert found["mean_sensitivity"]["value"] == pytest.approx((3 * 1 / 3 + 4 * 2 / 3) / 7)


def test_a_mark_in_two_boxes_finds_both_and_ties_happen_at_once():
    one = froc.events([image("a", [(0, 10, 0, 10), (5, 15, 5, 15)], [(7, 7, 1.0), (50, 50, 1.0)])])
    false, sensitivity = froc.curve(one)
    assert false[0].tolist() == [0, 1] and sensitivity[0].tolist() == [0, 1]


@given(st.integers(0, 10000))
def test_curve_is_the_count_at_each_threshold(seed):
    random = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        corner = random.integers(0, 20, (random.integers(0, 3), 2))
        sides = corner + random.integers(1, 12, corner.shape)
        boxes = np.stack([corner[:, 0], sides[:, 0], corner[:, 1], sides[:, 1]], 1)
        marks = random.integers(0, 25, (random.integers(0, 8), 3))
        images.append(image("p", boxes, marks))
    lesions = sum(len(one.boxes) for one in images)
    false, sensitivity = froc.curve(froc.events(images))
    at = dict(zip(np.round(false[0] * 6).astype(int).tolist(), sensitivity[0], strict=True))  # the last of each
    for threshold in np.unique(np.concatenate([one.scores for one in images])):
        hits = alarms = 0
        for one in images:
            shown = one.scores >= threshold
            inside = np.array([[b[0] <= r < b[1] and b[2] <= c < b[3] for b in one.boxes] for r, c in one.places])
            inside = inside.reshape(len(one.places), len(one.boxes))
            hits += inside[shown].any(0).sum()
            alarms += (~inside[shown].any(1)).sum()
        if lesions:
            assert hits / lesions <= at[alarms] + 1e-12
            points = np.isclose(false[0] * 6, alarms) & np.isclose(sensitivity[0] * lesions, hits)
            assert points.any()


def test_weights_are_images_written_several_times():
    times = np.array([2, 0, 3, 1])
    false, sensitivity = froc.curve(froc.events(IMAGES), times[None].astype(float))
    many = [one for one, n in zip(IMAGES, times, strict=True) for _ in range(n)]
    expected_false, expected = froc.curve(froc.events(many))
    for rate in froc.RATES:
        assert froc.sensitivity_at(false, sensitivity, rate) == froc.sensitivity_at(expected_false, expected, rate)


def test_without_lesions_it_says_so():
    assert "no image" in froc.measure([IMAGES[1]])["undefined"]
    found = froc.measure([image("a", [(0, 5, 0, 5)], [])], count=10)
    assert found["mean_sensitivity"]["value"] == 0


def test_any_rates_and_the_overlap_of_boxes():
    boxes = np.array([[0.0, 10, 0, 10], [0, 10, 5, 15], [0, 10, 9, 19], [50, 60, 50, 60]])  # overlap 1, 1/3, 1/19, 0
    places = boxes.reshape(-1, 2, 2).mean(2)
    one = Marked("a", np.array([[0.0, 10, 0, 10]]), places, np.array([1.0, 2, 3, 4]), boxes)
    assert one.hits(1 / 3).tolist() == [[True, True, False, False]]
    assert one.hits(0.01).tolist() == [[True, True, True, False]]
    assert one.hits().tolist() == [[True, False, False, False]]  # the middle of the second is on the end, excluded
    found = froc.measure([one], rates=(0.0, 1, 3.5), iou=0.05, count=5)
    assert [row["value"] for row in found["sensitivity"]] == [0, 1, 1] and found["iou"] == 0.05
    assert found["mean_sensitivity"]["value"] == pytest.approx(2 / 3)
    assert "of one patient" in found["mean_sensitivity"]["why"] and found["mean_sensitivity"]["bootstrap"] is None


def test_rates_and_overlaps_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="must be at least 0, not -1"):
        froc.measure(IMAGES, rates=(-1,))
    for iou in (0, 1.5, float("nan")):
        with pytest.raises(DataError, match="above 0 and at most 1"):
            froc.measure(IMAGES, iou=iou)
    with pytest.raises(DataError, match="needs marks with boxes"):
        froc.measure(IMAGES, iou=0.2)
