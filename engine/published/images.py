"""Images as a published network takes them: brought to its size, by its own statistics, then normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.dataset import ImageDataset
from ..datasets.tables import Record
from ..images.affine import Affine
from ..images.derived import DerivedSource
from ..images.pixels import Normalize, PixelSource, check_region
from ..models.folder import Preprocessing

_ROWS = 256  # of an image that are read at a time for its statistics
_LEAST = 1e-5  # of an image's spread, so that an even one is no division by zero


class PreparedSource(DerivedSource):
    """An image of grey values on top of which a network's preprocessing stands.

    One that is brought to another size is held whole, in that size; of others what is asked for is read.
    """

    def __init__(self, source: PixelSource, preprocessing: Preprocessing) -> None:
        super().__init__(source, *(preprocessing.size or ()))
        self.preprocessing, self.added = preprocessing, _steps(preprocessing)
        self._canvas = _canvas(*source.shape[1:], preprocessing)
        if preprocessing.size is not None:
            top, left, _, _, y, x = self._canvas
            self.back = Affine(xx=x, x0=-left * x, yy=y, y0=-top * y)
        self._whole: Tensor | None = None
        self._normalize: Normalize | None = None

    @property
    def normalize(self) -> Normalize:
        """Of this image; by its own statistics where the network wants that."""
        if self._normalize is None:
            self._normalize = self._own()
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
        """Bilinear between the middles of pixels, without a filter, as OpenCV's and PyTorch's default."""
        _, height, width = self.source.shape
        grey = self.source.read(0, height, 0, width)
        top, left, inner_height, inner_width, _, _ = self._canvas
        out = torch.zeros(self.shape)
        part = F.interpolate(grey[None], (inner_height, inner_width), mode="bilinear", align_corners=False)[0]
        out[:, top : top + inner_height, left : left + inner_width] = part
        return out

    def _own(self) -> Normalize:
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
            return Normalize((mean,), (max(np.sqrt(max(squares / count - mean**2, 0.0)), _LEAST),))
        spread = max(high - low, _LEAST)
        return Normalize(tuple(low + m * spread for m in wanted.mean), tuple(s * spread for s in wanted.std))


def _steps(wanted: Preprocessing) -> tuple[str, ...]:
    """What is applied, in order."""
    found = []
    if wanted.size is not None:
        found.append(f"brought to {wanted.size[0]} x {wanted.size[1]} ({wanted.fit})")
    if wanted.per_image is not None:
        found.append(f"{wanted.per_image} of the image itself")
    return (*found, *(wanted.normalize.steps if wanted.per_image != "standard" else ()))


def _canvas(height: int, width: int, wanted: Preprocessing) -> tuple[int, int, int, int, float, float]:
    """Where an image lies in its new size: top, left, height, width, and source pixels per pixel (down, across)."""
    if wanted.size is None:
        return 0, 0, height, width, 1.0, 1.0
    new_height, new_width = wanted.size
    if wanted.fit == "pad":
        scale = min(new_height / height, new_width / width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        inner_height, inner_width = new_height, new_width
        aspect = new_height / new_width
        if wanted.fit == "widen" and height / width > aspect:
            inner_width = max(1, round(new_width * width / round(height / aspect)))
    top, left = (new_height - inner_height) // 2, (new_width - inner_width) // 2
    return top, left, inner_height, inner_width, height / inner_height, width / inner_width


class PublishedImages:
    """Records as images of grey values, opened one by one; an item is as `ImageDataset` has it.

    Args:
        preprocessing: what the network takes; None leaves grey values to each member of an ensemble.
        like: channels and grey scale of those.
    """

    def __init__(self, records: Sequence[Record], preprocessing: Preprocessing | None, like: Preprocessing) -> None:
        streams = preprocessing is not None and preprocessing.streams
        self.data = ImageDataset(
            records, channels=like.channels, voi=like.voi, normalize=like.normalize if streams else None
        )
        self.records = self.data.records
        self._preprocessing = None if streams else preprocessing

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        if self._preprocessing is not None:
            item["image"] = PreparedSource(item["image"], self._preprocessing)
        return item
