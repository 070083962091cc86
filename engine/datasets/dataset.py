"""Records, or exams of records, as a PyTorch data set of pixel sources: pixels are read when the network needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch.utils.data import Dataset

from ..errors import DataError
from ..images.levels import White
from ..images.open import open_pixels
from ..images.pixels import ImageSource, Normalize, PixelSource
from .augment import Augment, augmented
from .tables import Record
from .unknown_views import unplaced
from .views import DownsampledSource, NormalizedSource


def open_record(
    record: Record,
    *,
    volume: bool = False,
    flip: bool | Literal["auto"] = "auto",
    white: White | None = None,
    **options: Any,
) -> ImageSource:
    """The image or volume of a record, with the frame, white level and side of the table; options as in `open_pixels`.

    Args:
        volume: whether the caller takes volumes; a record without a frame is then opened as one.
        flip: "auto" follows the table's column chest_wall if it has one.
        white: the white level of images without one in the table.
    """
    if record.frame == "all" and not volume:
        raise DataError(f"{record.path}: is a volume (frame all), but images are needed here; name a frame")
    if volume and record.frame not in (None, "all"):
        raise DataError(f"{record.path}: is one frame ({record.frame}), but volumes are needed here; set frame to all")
    if flip == "auto" and record.chest_wall is not None:
        flip = record.chest_wall == "right"
    return open_pixels(
        record.path,
        flip=flip,
        frame="all" if volume else record.frame,
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
        volume: whether the files are volumes, see `open_record`.
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
        volume: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        view: Callable[[PixelSource], PixelSource] | None = None,
    ) -> None:
        self.records = list(records)
        self.normalize, self.voi, self.channels = normalize, voi, channels
        self.flip: bool | Literal["auto"] = flip
        self.for_processing, self.volume = for_processing, volume
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
            volume=self.volume,
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


def exam_of(record: Record) -> tuple[str, ...]:
    """The key of an exam: patient and exam_id; an image without a patient is an exam of its own."""
    own = () if record.patient_known else ("image", str(record.path), str(record.frame))
    return (record.patient_id, record.exam_id or "", *own)


class ExamDataset(Dataset[dict[str, Any]]):
    """Exams of an image data set, in the order of their first image; images in no exam (`unplaced`) are left out.

    An item is dict(views=[PixelSource], image=PixelSource, label=int, index=int, record=Record): `image` is the view
    with the most pixels, and `record` is the record of the exam, see `samples`.

    Attributes:
        records: the records of all images.
        samples: a record per exam: that of the first view, with the highest class of the views and, for each label
            column, the highest known label, or the mean of known numbers. Side and view are empty.

    Args:
        images: the images.
        numbers: whether label columns are numbers, not classes.
        positive: the class that counts as the highest; None for the class with the highest number.
    """

    def __init__(self, images: ImageDataset, *, numbers: bool = False, positive: int | None = None) -> None:
        self._images, self.records = images, images.records
        exams: dict[tuple[str, ...], list[int]] = {}
        patients = [record.patient_id if record.patient_known else "" for record in self.records]
        left_out = set(unplaced(patients, [record.exam_id or "" for record in self.records]))
        for number, record in enumerate(images.records):
            if number in left_out:
                continue
            exams.setdefault(exam_of(record), []).append(number)
        self._exams = list(exams.values())
        self.samples = [_exam_record([self.records[i] for i in views], numbers, positive) for views in self._exams]

    def set_epoch(self, epoch: int) -> None:
        """As `ImageDataset.set_epoch`."""
        self._images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._exams)

    def __getitem__(self, index: int) -> dict[str, Any]:
        views = [self._images[i]["image"] for i in self._exams[index]]
        largest = max(views, key=lambda source: source.shape[-2] * source.shape[-1])
        sample = self.samples[index]
        return {"views": views, "image": largest, "label": sample.label, "index": index, "record": sample}


def _exam_record(records: Sequence[Record], numbers: bool, positive: int | None) -> Record:
    labels = {}
    for name in dict.fromkeys(name for record in records for name in record.labels):
        known = [record.labels[name] for record in records if not math.isnan(record.labels.get(name, math.nan))]
        if known:
            labels[name] = sum(known) / len(known) if numbers else max(known)
    label = max((record.label for record in records), key=lambda number: (number == positive, number))
    return replace(records[0], label=label, labels=labels, laterality=None, view=None)
