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
    """What `gigamorph.engine.datasets.dataset.ImageDataset` offers: records, and items that open their file."""

    records: list[Record]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Data:
    """The images of a run, split by patient.

    ``classes`` names the labels in order; ``preprocessing`` is all that turns a file into what the network sees, and
    how training images are varied. `fit` tells training images that have a ``set_epoch`` which epoch it is. ``target``
    is what is learnt; one of the classes, unless it says otherwise. ``left_out`` has the images that could not be read,
    and why.
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
        """Refuse to train on nothing, without labels, or with a patient in two splits.

        Raises:
            DataError: naming the image or the patient.
        """
        if not len(self.train):
            raise DataError("no training images: give rows of split 'train', or leave the column out to have it made")
        where: dict[str, str] = {}
        what = "image" if self.target.views is None else "exam"
        for name, images in self.parts.items():
            for record in samples_of(images):
                if not self.target.knows(record):
                    raise DataError(f"{record.path}: has no label; training needs one for each {what}")
                first = where.setdefault(record.patient_id, name)
                if first != name:
                    raise DataError(f"patient {record.patient_id} is in both {first} and {name}; split by patient")


def samples_of(images: Images) -> list[Record]:
    """A record for each item: of the image, or of the exam that its views are of."""
    return getattr(images, "samples", images.records)


def tell_epoch(images: Any, epoch: int) -> None:
    """Images that vary from epoch to epoch are told which one it is."""
    tell = getattr(images, "set_epoch", None)
    if tell is not None:
        tell(epoch)
