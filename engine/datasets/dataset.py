"""Records as a PyTorch data set of pixel sources: pixels are read when the network needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch.utils.data import Dataset

from ..images.levels import White
from ..images.open import open_pixels
from ..images.pixels import ImageSource, Normalize, PixelSource
from .augment import Augment, augmented
from .tables import Record
from .views import DownsampledSource, NormalizedSource


def open_record(
    record: Record, *, flip: bool | Literal["auto"] = "auto", white: White | None = None, **options: Any
) -> ImageSource:
    """The image of a record, with the frame, white level and side of the table; other options as in `open_pixels`.

    Args:
        flip: "auto" follows the table's column chest_wall if it has one.
        white: the white level of images without one in the table.
    """
    if flip == "auto" and record.chest_wall is not None:
        flip = record.chest_wall == "right"
    return open_pixels(
        record.path,
        flip=flip,
        frame=record.frame,
        white=white if record.white is None else record.white,
        laterality=record.laterality,
        **options,
    )


def with_white(records: Sequence[Record], white: White | None) -> list[Record]:
    """The records, with this white level for those that have none; None changes nothing."""
    return [replace(one, white=white) if one.white is None else one for one in records]


def grey_of(images: object) -> dict[str, Any]:
    """The options of `open_record` for grey values that images of a data set use; empty for other images."""
    if not isinstance(images, ImageDataset):
        return {}
    return {"voi": images.voi, "white": images.white, "for_processing": images.for_processing}


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of a table; an item is dict(image=PixelSource, label=int, index=int, record=Record).

    A file is opened when its item is requested and closed with the source. A `DataError` names an unusable file.

    Args:
        records: the images.
        normalize, voi, flip, channels, for_processing, white: as in `open_record`.
        downsample: averages factor x factor pixels, to compare with low resolution; 1 keeps every pixel.
        augment: random variations, drawn from (seed, epoch, index), so that a resumed run sees the same images. Call
            `set_epoch` at the start of every epoch.
        view: a last step that each image passes through.
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
        for_processing: bool = False,
        white: White | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        view: Callable[[PixelSource], PixelSource] | None = None,
    ) -> None:
        self.records = list(records)
        self.normalize, self.voi, self.channels = normalize, voi, channels
        self.flip: bool | Literal["auto"] = flip
        self.for_processing = for_processing
        self.white: White | None = white
        self.downsample, self.augment, self.seed = downsample, augment, seed
        self.epoch, self.view = 0, view

    def set_epoch(self, epoch: int) -> None:
        """Select the random variations of an epoch; call it before the data loader starts its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def opened(self, record: Record, normalize: Normalize | None) -> ImageSource:
        """An image of this data set prepared for the network, before downsampling and augmentation."""
        return open_record(
            record,
            normalize=normalize,
            voi=self.voi,
            flip=self.flip,
            channels=self.channels,
            for_processing=self.for_processing,
            white=self.white,
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        source: PixelSource = self.opened(record, None if self.augment else self.normalize)
        if self.downsample != 1:
            source = DownsampledSource(source, self.downsample)
        if self.augment:
            source = augmented(source, self.augment, seed=self.seed, epoch=self.epoch, index=index % len(self))
            source = NormalizedSource(source, self.normalize or Normalize())
        if self.view is not None:
            source = self.view(source)
        return {"image": source, "label": record.label, "index": index, "record": record}
