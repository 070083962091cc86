"""Phantom patients: exams of one or both breasts as image files, masks and a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...datasets.splits import assign_splits
from ...datasets.tables.schema import Finding, Record, write_table
from ...errors import DataError
from ...images.parallel import available_cpus, run_parallel
from .files import stored_box, write_dicom, write_mask, write_tiff
from .image import Kind, PhantomImage

VIEWS = ("CC", "MLO")


def write_phantoms(
    folder: str | Path,
    *,
    patients: int = 60,
    height: int = 1024,
    width: int = 768,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.6, 0.15, 0.25),
    breasts: Literal[1, 2] = 1,
    lesions: Sequence[Kind] = ("cluster",),
    positive: float = 0.5,
    symmetry: float = 0.8,
    file_format: Literal["dicom", "tiff"] = "dicom",
    masks: bool = False,
    slices: int = 0,
    workers: int = 1,
    report: Callable[[int], object] | None = None,
) -> Path:
    """Write phantom patients as image files with a table, and return the path of the csv.

    The folder gets `images/*.dcm` (For Presentation mammograms, 12 bit, as a scanner stores them: right breasts have
    their chest wall on the right) or `images/*.tif`, `masks/*.tif` on request, and `phantoms.csv`. The table has the
    columns of `Record`, with label 1 for breasts with a lesion, `label_KIND`, findings in pixels of the file, and
    cluster: top, bottom, left, right of a cluster as `open_pixels` shows DICOM files, empty without one.

    Args:
        folder: the folder; it is created.
        patients, height, width, seed: the number of patients, the size of the images, and the seed.
        fractions: of the patients, for train, val and test.
        breasts: 1 writes two views (CC, MLO) of one breast; 2 the four views of an exam, with a lesion in one breast.
        lesions: the kinds of lesions, which alternate among the positive patients.
        positive: the share of patients with a lesion.
        symmetry: the correlation of the texture of the two breasts.
        file_format: of the images.
        masks: whether masks of the lesions are written; of images only.
        slices: of tomosynthesis volumes, whose lesions are in a few slices; 0 writes mammograms. For DICOM only.
        workers: the number of processes, or of threads if there are few images.
        report: called with numbers of pixels written.

    Raises:
        DataError: if the folder cannot be written, or the images are too large for the format.
    """
    folder = Path(folder)
    kinds = tuple(dict.fromkeys(lesions))
    if patients < 1 or not kinds or not 0 <= positive <= 1:
        raise DataError(
            "phantoms need at least one patient and one kind of lesion, and a share of positives from 0 to 1"
        )
    if slices and (masks or file_format != "dicom"):
        raise DataError("phantom volumes are DICOM files without masks; leave out slices, or masks and the format")
    images = [image for number in range(patients) for image in _patient(number, seed, breasts, kinds, positive)]
    alike = 1.0 if breasts == 1 else symmetry
    options = _Options(folder, height, width, seed, alike, kinds, file_format, masks, slices)
    try:
        for name in ("images", "masks") if masks else ("images",):
            (folder / name).mkdir(parents=True, exist_ok=True)
        records = _write_all(images, options, workers, report)
        records = assign_splits(records, fractions=fractions, seed=seed)
    except OSError as error:
        reason = f"phantoms cannot be written ({error.strerror or error})"
        raise DataError(f"{folder}: {reason}; name another folder, or free some space") from error
    return write_table(folder / "phantoms.csv", records, ["0", "1"])


@dataclass(frozen=True)
class _Options:
    folder: Path
    height: int
    width: int
    seed: int
    symmetry: float
    kinds: tuple[Kind, ...]
    file_format: str
    masks: bool
    slices: int


@dataclass(frozen=True)
class _Image:
    """The properties of an image of a patient."""

    patient: str
    laterality: str
    view: str
    seed: tuple[int, ...]
    side: tuple[int, ...] | None
    lesions: tuple[Kind, ...]


def _patient(number: int, seed: int, breasts: int, kinds: Sequence[Kind], positive: float) -> list[_Image]:
    before, after = math.floor(number * positive + 1e-9), math.floor((number + 1) * positive + 1e-9)
    lesion: tuple[Kind, ...] = (kinds[before % len(kinds)],) if after > before else ()
    affected = "LR"[int(np.random.default_rng([seed, 1, number]).integers(2))]
    return [
        _Image(
            patient=f"PHANTOM{number:04d}",
            laterality=side,
            view=view,
            seed=(seed, 2, number, view_number),
            side=None if breasts == 1 else (seed, 2, number, view_number, "LR".index(side)),
            lesions=lesion if side == affected else (),
        )
        for side in (affected if breasts == 1 else "LR")
        for view_number, view in enumerate(VIEWS)
    ]


def _write_all(
    images: list[_Image], options: _Options, workers: int, report: Callable[[int], object] | None
) -> list[Record]:
    if len(images) < 2 * workers or workers == 1:
        return [_write(options, image, min(workers, available_cpus()), report) for image in images]
    records: list[Record | None] = [None] * len(images)
    for index, record in run_parallel(functools.partial(_write, options), images, workers=workers):
        if isinstance(record, DataError):
            raise record
        records[index] = record
        if report is not None:
            report(options.height * options.width * max(1, options.slices))
    return [record for record in records if record is not None]


def _write(options: _Options, own: _Image, threads: int = 1, report: Callable[[int], object] | None = None) -> Record:
    image = PhantomImage(
        options.height,
        options.width,
        seed=own.seed,
        side=own.side,
        view=own.view,
        lesions=own.lesions,
        symmetry=options.symmetry,
    )
    name = f"{own.patient}_{own.laterality}_{own.view}"
    given: dict[str, Any] = {"laterality": own.laterality, "threads": threads, "report": report}
    if options.file_format == "dicom":
        path = options.folder / "images" / f"{name}.dcm"
        study = f"{options.seed}.{options.height}.{options.width}"
        write_dicom(path, image, patient=own.patient, study=study, view=own.view, slices=options.slices, **given)
    else:
        path = options.folder / "images" / f"{name}.tif"
        write_tiff(path, image, **given)
    findings = []
    for lesion in image.lesions:
        box = stored_box(lesion.box, options.width, own.laterality)
        finding = Finding(kind=lesion.kind, box=box, pathology="malignant")
        if options.masks:
            mask = options.folder / "masks" / f"{name}_{lesion.kind}.tif"
            write_mask(mask, image, lesion, laterality=own.laterality)
            finding = replace(finding, mask=mask)
        findings.append(finding)
    clusters = [lesion.box for lesion in image.lesions if lesion.kind == "cluster"]
    return Record(
        path=path,
        label=int(bool(image.lesions)),
        patient_id=own.patient,
        laterality=own.laterality,
        view=own.view,
        exam_id=own.patient,
        labels={kind: float(kind in own.lesions) for kind in options.kinds},
        findings=tuple(findings),
        frame="all" if options.slices else None,
        extra={
            "cluster": " ".join(str(side) for side in clusters[0]) if clusters else "",
            **({"slice": str(int(image.depth * options.slices))} if options.slices else {}),
        },
    )
