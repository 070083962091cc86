"""Converts images of a data set to plain files, by the runner, so that an interrupted run can be resumed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..datasets.convert import Conversion, Format, names_of
from ..datasets.tables import Record
from ..images.affine import Affine
from ..images.levels import White
from ..images.parallel import available_cpus
from .decoders import Opened
from .index import RunDatabase
from .job import Job, Result, Start, Unit, texts
from .options import RunOptions, Scores, Summary, Watch
from .rows import Row, Work
from .runner import run

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
        _, height, width = self._conversion.open(row.record).shape
        return height * width

    def unit(self) -> Unit:
        return ConversionUnit(self._conversion)

    def start(self) -> Start:
        return functools.partial(ConversionUnit, self._conversion)

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


class ConversionUnit:
    """The unit (`job.Unit`) of conversion; all work is done in the process that opens the image."""

    net = None

    def __init__(self, conversion: Conversion, *, device: str = "cpu") -> None:
        self._conversion = conversion

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        source = self._conversion.write(record, work.name)
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
