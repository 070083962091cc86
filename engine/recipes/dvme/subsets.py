"""Which images a repeat learns from: few of a large training split, balanced over the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import DataError
from ...train.run import seed_of


def draw_subset(labels: Sequence[int], classes: int, size: int, fold: int, seed: int) -> list[int]:
    """Places of the images of one repeat ("fold").

    Args:
        labels: of the images of the training split.
        size: images to draw, the same number of each class (the first classes get what does not divide), without
            replacement as far as a class has images, which are then taken again (oversampling). 0 takes all images
            once, as they are.
        fold: repeats are drawn independently of each other. The smaller subset is part of the larger one.

    Raises:
        DataError: a class without images, or fewer images to draw than classes.
    """
    truth = np.asarray(labels)
    for number in range(classes):
        if not (truth == number).any():
            raise DataError(f"class {number} has no training images, so a fold cannot be balanced; leave the class out")
    if size == 0:
        return list(range(len(truth)))
    if size < classes:
        raise DataError(f"a subset of {size} images cannot hold {classes} classes; make it {classes} or more")
    found: list[int] = []
    for number in range(classes):
        own = np.flatnonzero(truth == number)
        order = own[np.random.default_rng(seed_of(seed, fold, number)).permutation(len(own))]
        wanted = size // classes + (number < size % classes)
        found += [int(order[i % len(order)]) for i in range(wanted)]
    return found
