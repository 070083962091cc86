"""Images prepared for a published network: resized, scaled by their own statistics, then normalised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.dataset import ImageDataset
from ..datasets.tables import Record
from ..images.affine import Affine
from ..images.pixels import DerivedSource, Normalize, PixelSource, check_region
from ..models.folder import Preprocessing

Box = tuple[int, int, int, int]
_ROWS = 256  # read at a time for an image's statistics
_MIN_SPREAD = 1e-5  # minimal spread of an image, to avoid a division by zero


class PreparedSource(DerivedSource):
    """An image of grey values with a network's preprocessing.

    An image that is resized is stored whole, in the new size; otherwise only the requested region is read.
    """

    def __init__(self, source: PixelSource, preprocessing: Preprocessing) -> None:
        super().__init__(source, *(preprocessing.size or ()))
        self.preprocessing, self.added = preprocessing, _steps(preprocessing)
        height, width = source.shape[-2:]
        self._side_columns, self._box, back = _placed(height, width, preprocessing)
        self.back = None if preprocessing.size is None else back
        self._whole: Tensor | None = None
        self._normalize: Normalize | None = None

    @property
    def normalize(self) -> Normalize:
        """The normalisation of this image, by its own statistics if the network needs that."""
        if self._normalize is None:
            self._normalize = self._image_normalize()
        return self._normalize

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        grey = self._grey(top, bottom, left, right)
        for channel, (mean, std) in enumerate(zip(*self.normalize.per_channel(self.shape[0]), strict=True)):
            grey[channel].sub_(mean).div_(std)
        return grey

    def _grey(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        if self.preprocessing.size is None:
            return self.source.read(top, bottom, left, right)
        if self._whole is None:
            self._whole = self._resized()
        return self._whole[:, top:bottom, left:right].clone()

    def _resized(self) -> Tensor:
        """Resize bilinearly between pixel centres without antialiasing, as OpenCV and PyTorch do by default."""
        _, height, width = self.source.shape
        part, (top, left, rows, columns) = self.source.read(0, height, 0, width)[None], self._box
        if self._side_columns != (0, 0):  # after the rows, to save memory: the axes are resized one after the other
            part = F.pad(_bilinear(part, rows, width), self._side_columns)
        out = torch.zeros(self.shape)
        out[:, top : top + rows, left : left + columns] = _bilinear(part, rows, columns)[0]
        return out

    def _image_normalize(self) -> Normalize:
        wanted = self.preprocessing
        if wanted.per_image is None:
            return wanted.normalize
        _, height, width = self.shape
        low, high, total, squares = np.inf, -np.inf, 0.0, 0.0
        for top in range(0, height, _ROWS):
            strip = self._grey(top, min(top + _ROWS, height), 0, width).double()
            low, high = min(low, float(strip.min())), max(high, float(strip.max()))
            total, squares = total + float(strip.sum()), squares + float(strip.square().sum())
        count = self.shape[0] * height * width
        if wanted.per_image == "standard":
            mean = total / count
            return Normalize((mean,), (max(np.sqrt(max(squares / count - mean**2, 0.0)), _MIN_SPREAD),))
        spread = max(high - low, _MIN_SPREAD)
        return Normalize(tuple(low + m * spread for m in wanted.mean), tuple(s * spread for s in wanted.std))


def _steps(wanted: Preprocessing) -> tuple[str, ...]:
    """Return the steps of the preprocessing in order."""
    found = []
    if wanted.size is not None:
        found.append(f"resized to {wanted.size[0]} x {wanted.size[1]} ({wanted.fit})")
    if wanted.per_image is not None:
        found.append(f"{wanted.per_image} of the image")
    return (*found, *(wanted.normalize.steps if wanted.per_image != "standard" else ()))


def _bilinear(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)


def _placed(height: int, width: int, wanted: Preprocessing) -> tuple[tuple[int, int], Box, Affine]:
    """Return where an image is in its new size.

    Returns:
        Black columns left and right that widen the image before it is resized; the region (top, left, height, width) to
        which it is resized; and the map from the new size to the image.
    """
    new_height, new_width = wanted.size or (height, width)
    inner_height, inner_width, missing = new_height, new_width, 0
    if wanted.fit == "pad":
        scale = min(new_height / height, new_width / width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    elif wanted.fit == "widen":
        missing = max(0, round(height / (new_height / new_width)) - width)
    top, left = (new_height - inner_height) // 2, (new_width - inner_width) // 2
    before, down, across = missing // 2, height / inner_height, (width + missing) / inner_width
    back = Affine(xx=across, x0=-left * across - before, yy=down, y0=-top * down)
    return (before, missing - before), (top, left, inner_height, inner_width), back


def published_images(
    records: Sequence[Record], preprocessing: Preprocessing | None, like: Preprocessing
) -> ImageDataset:
    """Return the images of records, prepared for a network.

    Args:
        preprocessing: that of the network; None leaves it to each member of an ensemble.
        like: provides the channels and grey scale.
    """
    if preprocessing is not None and preprocessing.streams:
        return ImageDataset(records, channels=like.channels, voi=like.voi, normalize=like.normalize)
    view = None if preprocessing is None else partial(PreparedSource, preprocessing=preprocessing)
    return ImageDataset(records, channels=like.channels, voi=like.voi, view=view)
