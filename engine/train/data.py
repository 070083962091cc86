"""The images of a run, split by patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..datasets.tables import Record
from ..errors import DataError
from .target import Target


class Images(Protocol):
    """The interface of `gigamorph.engine.datasets.dataset.ImageDataset`: records, and items that open their file."""

    records: list[Record]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Data:
    """The images of a run, split by patient.

    `fit` calls ``set_epoch`` of the training images in each epoch, if they have such a method.

    Attributes:
        train, val, test: the images of each split.
        classes: names of the labels, in order.
        channels: of the images.
        preprocessing: all settings that turn a file into the network's input, including augmentation.
        target: what is learnt; by default one of the classes.
        left_out: the images that could not be read, with the reasons.
    """

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    channels: int
    preprocessing: dict[str, Any]
    target: Target = field(default=Target(()))
    left_out: Mapping[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.target.names:
            object.__setattr__(self, "target", Target(self.classes))

    @property
    def parts(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val, "test": self.test}

    def require_fit(self) -> None:
        """Refuse data without training images, with a missing label, or with a patient in two splits.

        Raises:
            DataError: naming the image or the patient.
        """
        if not len(self.train):
            raise DataError("no training images: add rows of split 'train', or omit the column to draw splits")
        where: dict[str, str] = {}
        what = "image" if self.target.views is None else "exam"
        for name, images in self.parts.items():
            for record in samples_of(images):
                if not self.target.knows(record):
                    raise DataError(f"{record.path}: has no label; each {what} needs one for training")
                first = where.setdefault(record.patient_id, name)
                if first != name:
                    raise DataError(
                        f"patient {record.patient_id} is in both {first} and {name}; use a split by patient"
                    )


def samples_of(images: Images) -> list[Record]:
    """A record for each item: an image, or an exam with its views."""
    return getattr(images, "samples", images.records)


def set_epoch_of(images: Any, epoch: int) -> None:
    """Set the epoch of images that are augmented differently in each epoch."""
    setter = getattr(images, "set_epoch", None)
    if setter is not None:
        setter(epoch)
