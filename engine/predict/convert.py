"""Converts images of a data set to plain files, by the runner, so that an interrupted run can be resumed.

The files have one grey scale, the chest wall on the left, and no patient data.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..datasets.dataset import open_record
from ..datasets.masks import open_inside
from ..datasets.tables import Box, Finding, Record
from ..datasets.tables.folders import stem_of
from ..datasets.views import MirroredSource
from ..errors import DataError
from ..images.affine import Affine
from ..images.levels import White, require_numbers
from ..images.parallel import available_cpus
from ..images.pixels import ImageSource
from ..images.writers import write_grey
from .decoders import Opened
from .index import RunDatabase
from .job import Job, Result, Unit, texts
from .options import RunOptions, Scores, Summary, Watch
from .rows import Row, Work
from .runner import run

Format = Literal["tiff", "png"]
_SUFFIX = {"tiff": ".tif", "png": ".png"}
CONVERTED = pa.schema(
    [
        *texts("key", "model", "image_path"),
        ("pixels", pa.int64()),
        *texts("name"),
        ("steps", pa.list_(pa.string())),
        ("to_original", pa.list_(pa.float64())),
    ]
)
"""Schema of the parts; steps are the applied operations, to_original the transform to pixels of the source file."""


def convert_images(
    records: Sequence[Record],
    folder: str | Path,
    *,
    file_format: Format = "tiff",
    voi: str = "auto",
    for_processing: bool = False,
    white: White | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> tuple[list[Record], list[str], Summary]:
    """Write every image to `folder`/images, and the masks of its findings to `folder`/masks, see `Conversion`.

    Files keep their names; if several folders have files of the same name, these are named by patient, side and view.
    Repeated rows with the same image and masks are written once.

    Args:
        records: the images.
        folder: of the result.
        file_format, voi, for_processing, white: see `Conversion`.
        options: by default a process per CPU, and no limit on images or masks that cannot be read.
        watch: callbacks.

    Returns:
        The records of written images, with findings in the new coordinates, `extra["source"]` (path of the file
        relative to the common folder) and `extra["steps"]` (applied operations); the reasons of failures; and the
        summary of the run. Records and reasons include those of other shards, as far as known.

    Raises:
        GigamorphError: if `folder` has other content or cannot be written, or too many images failed.
    """
    folder = Path(folder)
    job = _Convert(records, Conversion(folder, file_format, voi, for_processing, white))
    options = options or RunOptions("", max_failures=1.0, workers=available_cpus())
    summary = run(job, records, folder, options, watch)
    return job.records, job.reasons, summary


class _Convert(Job):
    kind, made, schema, named = "data convert", "converted images", CONVERTED, "name"

    def __init__(self, records: Sequence[Record], conversion: Conversion) -> None:
        self._conversion = conversion
        self._wanted = {Row(record).key(""): name for record, name in zip(records, names_of(records), strict=True)}
        paths = [os.path.abspath(record.path) for record in records]
        self._root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        self.records: list[Record] = []
        self.reasons: list[str] = []

    def described(self) -> dict[str, Any]:
        own = self._conversion
        white = "" if own.white is None else str(own.white)
        return {"images": own.file_format, "voi": own.voi, "for_processing": own.for_processing, "white": white}

    def key(self, row: Row, model: str) -> str:
        masks = [str(finding.mask) for finding in row.record.findings if finding.mask is not None]
        return row.key("\0".join(["convert", *masks]))

    def name(self, row: Row) -> str:
        return self._wanted.get(row.key(""), row.stem)

    def pixels(self, row: Row) -> int:
        _, height, width = self._conversion.source(row.record).shape
        return height * width

    def unit(self) -> Unit:
        return self._conversion

    def tables(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Scores:
        own = self._conversion
        self.records = [
            own.converted(
                row.record,
                result["name"],
                result["steps"],
                Affine(*result["to_original"]),
                Path(os.path.relpath(os.path.abspath(row.record.path), self._root)).as_posix(),
            )
            for row, result in index.joined(results)
        ]
        self.reasons = [reason for _, reason in index.failures()]
        return {}


@dataclass(frozen=True)
class Conversion:
    """The unit (`job.Unit`) of conversion to a folder with the sub-folders ``images`` and ``masks`` (of findings).

    Pixels are grey values from 0 black to 65535 white, at native resolution and in the orientation of `open_pixels`.
    TIFF files are tiled, losslessly compressed, and written tile by tile.
    """

    folder: Path
    file_format: Format = "tiff"
    voi: str = "auto"
    for_processing: bool = False
    white: White | None = None

    net = None

    def source(self, record: Record) -> ImageSource:
        """The image to be written."""
        return open_record(record, voi=self.voi, channels=1, for_processing=self.for_processing, white=self.white)

    def target(self, name: str) -> Path:
        """The file of the image with this name."""
        return self.folder / "images" / (name + _SUFFIX[self.file_format])

    def mask(self, name: str, number: int) -> Path:
        """The file of a finding's mask."""
        return self.folder / "masks" / f"{name}_{number}.tif"

    def converted(self, record: Record, name: str, steps: Sequence[str], to_original: Affine, source: str) -> Record:
        """The record of the written image, with its findings in the new coordinates.

        Args:
            record: the record of the original image.
            name: the name of the written image.
            steps, to_original: those of the image in the orientation of `source`.
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
            record, path=self.target(name), findings=findings, extra=extra, frame=None, white=None, chest_wall=side
        )

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        """Write the image and its masks, in the process that reads it; nothing is left to compute.

        Raises:
            DataError: if the image or a mask cannot be read, or a file cannot be written.
        """
        source = self.source(record)
        _write(source, self.target(work.name))
        flips = source.to_original.xx < 0, source.to_original.yy < 0
        for number, finding in enumerate(record.findings):
            if finding.mask is not None:
                _write_mask(finding.mask, self.mask(work.name, number), source, flips)
        _, height, width = source.shape
        result = {
            "key": work.key,
            "model": "",
            "image_path": work.row.name,
            "pixels": height * width,
            "name": work.name,
            "steps": list(source.steps),
            "to_original": [float(value) for value in astuple(source.to_original)],
        }
        return {"image": None, "record": record, "result": result}

    def __call__(self, opened: Opened) -> Result:
        assert opened.item is not None
        return opened.item["result"]


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
