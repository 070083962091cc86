"""Records as a PyTorch data set of pixel sources: no pixel is read before the network asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ..pixels import Normalize, PixelSource, open_pixels
from .tables import Record
from .views import DownsampledSource, MirroredSource


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of a table; an item is dict(image=PixelSource, label=int, index=int, record=Record).

    normalize, voi, flip, channels: as in `pixels.open_pixels`.
    downsample: average factor x factor pixels, to compare with low resolution; 1 keeps every pixel.
    mirror: augment; left-right and up-down are each mirrored with probability 1/2, drawn from (seed, epoch, index), so
    that a resumed run sees the same images. Call `set_epoch` at the start of every epoch.

    A file is opened when its item is asked for, and closed with the source. `DataError` names a file that is unusable.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        normalize: Normalize | None = None,
        voi: str = "auto",
        flip: bool | Literal["auto"] = "auto",
        channels: int | None = None,
        downsample: int = 1,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        self.records = list(records)
        self.normalize, self.voi, self.channels = normalize, voi, channels
        self.flip: bool | Literal["auto"] = flip
        self.downsample, self.mirror, self.seed = downsample, mirror, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw new mirrorings; before the data loader starts its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        source: PixelSource = open_pixels(
            record.path,
            normalize=self.normalize,
            voi=self.voi,
            flip=self.flip,
            channels=self.channels,
            frame=record.frame,
        )
        if self.downsample != 1:
            source = DownsampledSource(source, self.downsample)
        if self.mirror:
            left_right, up_down = np.random.default_rng([self.seed, self.epoch, index % len(self)]).random(2) < 0.5
            if left_right or up_down:
                source = MirroredSource(source, left_right=bool(left_right), up_down=bool(up_down))
        return {"image": source, "label": record.label, "index": index, "record": record}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items as a batch: image and record are lists, label and index int64 tensors (N,)."""
    return {
        "image": [item["image"] for item in items],
        "label": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
        "record": [item["record"] for item in items],
    }
