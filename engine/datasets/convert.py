"""Images as the network sees them, written to plain files: one grey scale, chest wall left, no patient data."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import DataError
from ..images.affine import Affine
from ..images.levels import White
from ..images.open import open_pixels
from ..images.parallel import run_parallel
from ..images.pixels import ImageSource
from ..images.writers import whole_or_absent, write_png, write_tiff
from .dataset import open_record
from .tables.schema import Box, Finding, Record

Format = Literal["tiff", "png"]
_SUFFIX = {"tiff": ".tif", "png": ".png"}


@dataclass(frozen=True)
class _Task:
    record: Record
    source: str
    target: Path
    mask_folder: Path
    file_format: Format
    voi: str
    for_processing: bool
    white: White | None

    def __str__(self) -> str:
        return str(self.record.path)


def convert_images(
    records: Sequence[Record],
    folder: str | Path,
    *,
    file_format: Format = "tiff",
    voi: str = "auto",
    for_processing: bool = False,
    white: White | None = None,
    workers: int | None = None,
    on_done: Callable[[], object] | None = None,
) -> tuple[list[Record], list[DataError]]:
    """Write every image to `folder`/images, and the masks of its findings to `folder`/masks.

    A pixel becomes its grey value, from 0 black to 65535 white, at native resolution and in the orientation of
    `open_pixels`; TIFF files are tiled and compressed without loss, and written tile by tile.

    Files keep their names; those of several folders that share one are called after patient, side and view.

    Returns the records of what was written, with their findings in the new coordinates, `extra["source"]`, the path of
    the file below the folder that holds all of them, and `extra["steps"]`, what was done; and an error for each image
    that could not be read, or whose mask could not, which stops nothing.
    """
    folder = Path(folder)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        if any(finding.mask for record in records for finding in record.findings):
            (folder / "masks").mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error
    names = _names(records)
    paths = [Path(os.path.abspath(record.path)) for record in records]
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    tasks = [
        _Task(
            record,
            path.relative_to(root).as_posix(),
            folder / "images" / (name + _SUFFIX[file_format]),
            folder / "masks",
            file_format,
            voi,
            for_processing,
            white,
        )
        for record, path, name in zip(records, paths, names, strict=True)
    ]
    done: list[Record | DataError] = [DataError("")] * len(tasks)
    for number, result in run_parallel(_convert, tasks, workers=workers):
        done[number] = result
        if on_done is not None:
            on_done()
    return [r for r in done if isinstance(r, Record)], [e for e in done if isinstance(e, DataError)]


def _names(records: Sequence[Record]) -> list[str]:
    """A name for each image: that of its file, unless several files share it (TCIA calls every first one 1-1.dcm)."""
    stems = Counter(record.path.stem.lower() for record in records)
    names = []
    for record in records:
        name = record.path.stem
        if stems[name.lower()] > 1:
            parts = (record.patient_id, record.laterality, record.view)
            if record.laterality or record.view:
                name = re.sub(r"[^\w.-]+", "_", "_".join(part for part in parts if part)).strip("._") or name
        names.append(name)
    return _unique(names)


def _unique(names: Sequence[str]) -> list[str]:
    """Names, with -2, -3, ... where they come again."""
    taken: set[str] = set()
    found = []
    for name in names:
        own, number = name, 1
        while own.lower() in taken:
            number += 1
            own = f"{name}-{number}"
        taken.add(own.lower())
        found.append(own)
    return found


def _convert(task: _Task) -> Record:
    source = open_record(task.record, voi=task.voi, channels=1, for_processing=task.for_processing, white=task.white)
    _write(source, task.target, task.file_format, 65535)
    back = source.to_original.inverse()
    findings = []
    for number, finding in enumerate(task.record.findings):
        mask = None
        if finding.mask is not None:
            flips = source.to_original.xx < 0, source.to_original.yy < 0
            mask = task.mask_folder / f"{task.target.stem}_{number}.tif"
            _write_mask(finding.mask, mask, source, flips)
        findings.append(_moved(finding, back, mask))
    extra = {**task.record.extra, "source": task.source, "steps": "; ".join(source.steps)}
    # What is written is on the scale of 16 bits and not to be mirrored again.
    side = "left" if task.record.laterality or task.record.chest_wall else None
    return replace(
        task.record,
        path=task.target,
        findings=tuple(findings),
        extra=extra,
        frame=None,
        white=None,
        chest_wall=side,
    )


def _write(source: ImageSource, target: Path, file_format: Format, white: int) -> None:
    _, height, width = source.shape

    def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        grey = source.read(top, bottom, left, right)[0].numpy()
        return np.rint(np.clip(grey, 0, 1) * np.float64(white)).astype(np.uint16)

    try:
        with whole_or_absent(target) as part:
            if file_format == "png":
                write_png(part, (height, width), read)
            else:
                write_tiff(part, (height, width), np.dtype(np.uint16), read)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error}); free some space") from error


def _write_mask(mask: Path, target: Path, image: ImageSource, flips: tuple[bool, bool]) -> None:
    """The mask turned as its image was; 255 where it is not 0 (of lossy JPEG files, where it is above half)."""
    source = open_pixels(mask, voi="none", flip=False)
    level = 0.5 if source.steps[0].startswith("JPEG") else 0.0
    _, height, width = source.shape
    if source.shape[1:] != image.shape[1:]:
        raise DataError(
            f"{mask}: is {height} x {width}, its image {image.shape[1]} x {image.shape[2]}; correct the mask"
        )

    def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        rows = (height - bottom, height - top) if flips[1] else (top, bottom)
        columns = (width - right, width - left) if flips[0] else (left, right)
        values = source.read(*rows, *columns).amax(0).numpy()
        values = values[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        return np.where(values > level, np.uint8(255), np.uint8(0))

    with whole_or_absent(target) as part:
        write_tiff(part, (height, width), np.dtype(np.uint8), read)


def _moved(finding: Finding, back: Affine, mask: Path | None) -> Finding:
    outline = (
        tuple((float(y), float(x)) for x, y in back.points([(x, y) for y, x in finding.outline]))
        if finding.outline
        else ()
    )
    return replace(finding, box=finding.box and _moved_box(finding.box, back), outline=outline, mask=mask)


def _moved_box(box: Box, back: Affine) -> Box:
    left, top, right, bottom = back.boxes([box[2], box[0], box[3], box[1]])
    return round(float(top)), round(float(bottom)), round(float(left)), round(float(right))
