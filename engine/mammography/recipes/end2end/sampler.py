"""Sampling of patches of lesions and of background (Shen et al., 2019).

It follows the published rules with three differences: background must not overlap *any* lesion of an image, instead
of only the first; every image has its own random numbers; and the patch of a lesion's centroid needs no option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ....errors import DataError
from .config import CLASSES, Sampling

Mask = NDArray[np.bool_]
_TRIES = 1000  # consecutive failures before the rule is relaxed


@dataclass(frozen=True)
class Lesion:
    """One lesion of an image."""

    mask: Mask
    """(height, width)."""
    label: int
    """Index into `CLASSES`, 1 to 4."""


@dataclass(frozen=True)
class Patch:
    """A square of an image, which may extend beyond it."""

    top: int
    left: int
    label: int
    cutoff: float
    """The required overlap: as configured, or lower if that was not found; 0 for a centroid's."""


def breast_box(image: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the largest part (height, width) brighter than 5 % of the maximum."""
    parts, count = ndimage.label(image > 0.05 * image.max())  # pyright: ignore[reportGeneralTypeIssues]
    if not count:
        return 0, image.shape[0], 0, image.shape[1]
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(parts)[largest - 1]
    return rows.start, rows.stop, columns.start, columns.stop


def sample(
    box: tuple[int, int, int, int], lesions: Sequence[Lesion], sampling: Sampling, rng: np.random.Generator
) -> list[Patch]:
    """Sample the patches of an image: those of each lesion in order, then background.

    Args:
        box: of the breast, see `breast_box`; it contains the centres of background patches.
        lesions: their masks have one shape.

    Raises:
        DataError: a lesion's mask is empty.
    """
    tables = [_Overlap(lesion.mask, sampling.side) for lesion in lesions]
    patches = []
    for lesion, table in zip(lesions, tables, strict=True):
        rows, columns = np.nonzero(lesion.mask)
        if not len(rows):
            raise DataError(f"the mask of a lesion ({CLASSES[lesion.label]}) is empty; remove the finding")
        if sampling.per_lesion == 1:
            centre = round(rows.mean()), round(columns.mean())
            patches.append(_patch_around(centre, sampling.side, lesion.label, 0.0))
            continue
        found, failures, cutoff = 0, 0, sampling.positive
        while found < sampling.per_lesion:
            centre = int(rng.integers(rows.min(), rows.max() + 1)), int(rng.integers(columns.min(), columns.max() + 1))
            patch = _patch_around(centre, sampling.side, lesion.label, cutoff)
            if table.share(patch) > cutoff:
                patches.append(patch)
                found, failures = found + 1, 0
                continue
            failures += 1
            if failures == _TRIES:
                cutoff, failures = max(cutoff - 0.05, 0.0), 0
    found, failures = 0, 0
    while found < sampling.background and failures < _TRIES:  # a breast with many lesions may have less background
        centre = int(rng.integers(box[0], box[1])), int(rng.integers(box[2], box[3]))
        patch = _patch_around(centre, sampling.side, 0, sampling.negative)
        if all(table.share(patch) <= sampling.negative for table in tables):
            patches.append(patch)
            found, failures = found + 1, 0
        else:
            failures += 1
    return patches


def _patch_around(centre: tuple[int, int], side: int, label: int, cutoff: float) -> Patch:
    return Patch(centre[0] - side // 2, centre[1] - side // 2, label, cutoff)


class _Overlap:
    """The share of a lesion in a patch: sums of the mask over rectangles from a table of partial sums."""

    def __init__(self, mask: Mask, side: int) -> None:
        self._sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
        self._sums[1:, 1:] = mask.cumsum(0).cumsum(1)
        self._side = side

    def share(self, patch: Patch) -> float:
        """Return the overlap as a share of the lesion or of the patch, whichever is larger."""
        height, width = self._sums.shape[0] - 1, self._sums.shape[1] - 1
        top, bottom = (min(max(v, 0), height) for v in (patch.top, patch.top + self._side))
        left, right = (min(max(v, 0), width) for v in (patch.left, patch.left + self._side))
        s = self._sums
        common = int(s[bottom, right] - s[top, right] - s[bottom, left] + s[top, left])
        return common / min(int(s[-1, -1]), self._side**2) if s[-1, -1] else 0.0
