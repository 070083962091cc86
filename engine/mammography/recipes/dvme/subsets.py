"""Training images of a repeat: a small subset of a large training split, balanced over the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....errors import DataError
from ....train.run import seed_of


def draw_subset(labels: Sequence[int], classes: int, size: int, fold: int, seed: int) -> list[int]:
    """Return the indices of the images of one repeat ("fold").

    Args:
        labels: of the images of the training split.
        size: number of images to draw, equal per class (the first classes get the remainder), without replacement.
            Classes with too few images repeat them (oversampling). 0 returns all images once.
        fold: number of the repeat; repeats are independent. A smaller subset is part of a larger one.

    Raises:
        DataError: a class has no images, or size is smaller than the number of classes.
    """
    truth = np.asarray(labels)
    for number in range(classes):
        if not (truth == number).any():
            raise DataError(f"class {number} has no training images, so a fold cannot be balanced; remove the class")
    if size == 0:
        return list(range(len(truth)))
    if size < classes:
        raise DataError(f"a subset of {size} images is too small for {classes} classes; use {classes} or more")
    found: list[int] = []
    for number in range(classes):
        own = np.flatnonzero(truth == number)
        order = own[np.random.default_rng(seed_of(seed, fold, number)).permutation(len(own))]
        wanted = size // classes + (number < size % classes)
        found += [int(order[i % len(order)]) for i in range(wanted)]
    return found
