"""Pixels of each class in a predicted mask, in the table's, and in both."""

import numpy as np

from gigamorph.engine.predict.masks import ArrayMask, _pixel_counts


def test_pixels_that_the_table_ignores_count_in_the_area_alone():
    found, own = (ArrayMask(np.array([[row]], np.uint8)) for row in ([0, 1, 1, 1], [0, 1, 0, 255]))
    area, counts = _pixel_counts(found, own, 2)
    assert counts is not None
    assert area.tolist() == [1, 3] and counts.tolist() == [[1, 1], [1, 2], [2, 1]]
