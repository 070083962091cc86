"""Conversion of network inputs to plain files: one grey scale, chest wall on the left, no patient data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import DataError
from ..images.affine import Affine
from ..images.levels import White, require_numbers
from ..images.pixels import ImageSource
from ..images.writers import write_grey
from .dataset import open_record
from .masks import open_inside
from .tables.folders import stem_of
from .tables.schema import Box, Finding, Record
from .views import MirroredSource

Format = Literal["tiff", "png"]
_SUFFIX = {"tiff": ".tif", "png": ".png"}


@dataclass(frozen=True)
class Conversion:
    """A conversion of images to a folder with the sub-folders ``images`` and ``masks`` (of findings).

    Pixels are grey values from 0 black to 65535 white, at native resolution and in the orientation of `open_pixels`.
    TIFF files are tiled, losslessly compressed, and written tile by tile.
    """

    folder: Path
    file_format: Format = "tiff"
    voi: str = "auto"
    for_processing: bool = False
    white: White | None = None

    def open(self, record: Record) -> ImageSource:
        """The image to be written."""
        return open_record(record, voi=self.voi, channels=1, for_processing=self.for_processing, white=self.white)

    def target(self, name: str) -> Path:
        """The file of the image with this name."""
        return self.folder / "images" / (name + _SUFFIX[self.file_format])

    def mask(self, name: str, number: int) -> Path:
        """The file of a finding's mask."""
        return self.folder / "masks" / f"{name}_{number}.tif"

    def write(self, record: Record, name: str) -> ImageSource:
        """Write an image and its masks, and return the opened image.

        Raises:
            DataError: if the image or a mask cannot be read, or a file cannot be written.
        """
        source = self.open(record)
        target = self.target(name)
        _write(source, target)
        flips = source.to_original.xx < 0, source.to_original.yy < 0
        for number, finding in enumerate(record.findings):
            if finding.mask is not None:
                _write_mask(finding.mask, self.mask(name, number), source, flips)
        return source

    def converted(self, record: Record, name: str, steps: Sequence[str], to_original: Affine, source: str) -> Record:
        """The record of the written image, with its findings in the new coordinates.

        Args:
            record: the record of the original image.
            name: the name of the written image.
            steps, to_original: those of the image that `write` returned.
            source: the origin of the image, for `extra`.
        """
        back = to_original.inverse()
        findings = tuple(
            _moved(finding, back, None if finding.mask is None else self.mask(name, number))
            for number, finding in enumerate(record.findings)
        )
        # The written image has the full 16-bit scale and must not be mirrored again.
        side = "left" if record.laterality or record.chest_wall else None
        extra = {**record.extra, "source": source, "steps": "; ".join(steps)}
        return replace(
            record,
            path=self.target(name),
            findings=findings,
            extra=extra,
            frame=None,
            white=None,
            chest_wall=side,
        )


def names_of(records: Sequence[Record]) -> list[str]:
    """A name for each image: the name of its file, unless several files share it (TCIA's files are all 1-1.dcm).

    Such images are named by patient, side and view, which need not be unique.
    """
    stems = Counter(stem_of(record.path).lower() for record in records)
    names = []
    for record in records:
        name = stem_of(record.path)
        if stems[name.lower()] > 1:
            parts = (record.patient_id, record.laterality, record.view)
            if record.laterality or record.view:
                name = re.sub(r"[^\w.-]+", "_", "_".join(part for part in parts if part)).strip("._") or name
        names.append(name)
    return names


def _write(source: ImageSource, target: Path) -> None:
    _, height, width = source.shape

    def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        grey = source.read(top, bottom, left, right)[0]
        require_numbers(grey, f"{source.name}: ")
        return np.rint(np.clip(grey.numpy(), 0, 1) * np.float64(65535)).astype(np.uint16)

    write_grey(target, (height, width), np.uint16, read)


def _write_mask(mask: Path, target: Path, image: ImageSource, flips: tuple[bool, bool]) -> None:
    """Write the mask, flipped like its image: 255 where it is not 0 (above half of white for lossy JPEG)."""
    source, level = open_inside(mask)
    _, height, width = source.shape
    if source.shape[1:] != image.shape[1:]:
        raise DataError(f"{mask}: is {height} x {width}, but its image {image.shape[1]} x {image.shape[2]}; correct it")

    mirrored = MirroredSource(source, left_right=flips[0], up_down=flips[1])

    def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        values = mirrored.read(top, bottom, left, right).amax(0).numpy()
        return np.where(values > level, np.uint8(255), np.uint8(0))

    write_grey(target, (height, width), np.uint8, read)


def _moved(finding: Finding, back: Affine, mask: Path | None) -> Finding:
    outline = (
        tuple((float(y), float(x)) for x, y in back.points([(x, y) for y, x in finding.outline]))
        if finding.outline
        else ()
    )
    return replace(finding, box=finding.box and _moved_box(finding.box, back), outline=outline, mask=mask)


def _moved_box(box: Box, back: Affine) -> Box | None:
    """The box in new coordinates, clipped at the upper and left border; None if it lies beyond."""
    left, top, right, bottom = (round(float(side)) for side in back.boxes([box[2], box[0], box[3], box[1]]))
    top, left = max(top, 0), max(left, 0)
    return (top, bottom, left, right) if top < bottom and left < right else None
