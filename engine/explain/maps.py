"""Explanation maps of an output, equal to untiled maps, and their peaks."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from scipy import ndimage

from ..accelerate import Accelerated
from ..images.pixels import PixelSource
from ..train.explanation import Explanation, explain_class, explain_gradient


def activation_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Class activation map: the contribution of each cell of the last map before pooling to the log-odds of a class.

    See `explain_class`. It takes two tiled inference passes.

    Args:
        net: its output is (1, classes).
        source: the image.
        output: index of the class.

    Raises:
        GigamorphError: see `Accelerated.evidence`.
    """
    net.eval()
    return explain_class(net, source, output)[0]


def gradient_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Saliency of every pixel: the maximum over channels of the absolute gradient of the log-odds of a class.

    It follows Simonyan et al., 2014, with log-odds instead of the logit. It takes a tiled forward and backward. The
    image and its gradient are in host memory, together 8 bytes per value in float32; maps of the network are not.

    Args:
        net: its output is (1, classes).
        source: the image.
        output: index of the class.

    Raises:
        GigamorphError: if the output does not exist.
    """
    return explain_gradient(net, source, output)[0]


class Mark(NamedTuple):
    """A position in pixels of the stored file, with the value of the map."""

    row: float
    column: float
    score: float


def find_marks(found: Explanation, count: int = 10) -> list[Mark]:
    """The highest positive peaks of a map, no two in neighbouring cells, by decreasing score.

    A peak is a cell, or a connected group of equal cells, without higher neighbours; the mark is its centre. Scores are
    values of the map. Those of a class activation map are contributions to the log-odds, comparable between images.
    """
    values = found.values.double().cpu().numpy()
    highest = ndimage.maximum_filter(values, size=3, mode="constant", cval=-np.inf)
    is_peak = (values == highest) & (values > 0)
    peaks, number = cast(tuple[np.ndarray, int], ndimage.label(is_peak, structure=np.ones((3, 3))))
    if not number:
        return []
    labels = np.arange(1, number + 1)
    scores = ndimage.maximum(values, peaks, labels)
    middles = np.array(ndimage.center_of_mass(peaks > 0, peaks, labels)) + 0.5
    best = np.argsort(-scores, kind="stable")[:count]
    points = found.points(middles[best][:, ::-1])
    return [Mark(float(y), float(x), float(score)) for (x, y), score in zip(points, scores[best], strict=True)]
