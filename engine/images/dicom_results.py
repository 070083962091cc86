"""Results as DICOM instances in the study of the image that they are of, by highdicom: segmentations.

They belong to their patient: they carry the name and numbers that the image's header has.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from pydicom.valuerep import DA

from ..errors import DataError
from ..versions import OWN
from .dicom_file import DicomFile, read_header
from .dicomweb import Instance, is_dicomweb

MAKER = "gigamorph"
_SCHEME = "99GIGAMORPH"
# Of patient and study, which highdicom copies: type 2 (PS3.3 C.7.1, C.7.2), and files that were stripped lack them.
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)


def source_header(image: str | Path, advice: str) -> Dataset:
    """The header of a DICOM file, or of an image in a DICOMweb store, with all that results repeat of it.

    Args:
        advice: what follows from it, if it is none.

    Raises:
        DataError: if it is no DICOM image, or cannot be had.
    """
    if is_dicomweb(str(image)):
        header = Instance(str(image)).header
    else:
        try:
            with DicomFile(Path(image)) as file:
                header, _ = read_header(file, Path(image))
        except Exception as error:  # pydicom has many
            raise DataError(f"{image}: is no DICOM file, {advice}") from error
    for keyword in MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    if "Modality" not in header:
        header.Modality = "OT"  # highdicom compares that of its images, and writes its own
    for keyword in ("StudyDate", "SeriesDate", "PatientBirthDate"):
        # De-identified files have dates of zeros, which highdicom refuses; a date may be empty.
        if keyword in header and not _is_date(header[keyword].value):
            header[keyword].value = ""
    return header


def own_code(name: str) -> Code:
    """A code for what has none but the name that the model's maker gave it."""
    short = re.fullmatch(r"\w{1,16}", name, re.ASCII) is not None
    value = name if short else hashlib.sha256(name.encode()).hexdigest()[:16]
    return Code(value, _SCHEME, name[:64] or "_")


def segmentation(
    image: str | Path, header: Dataset, pixels: np.ndarray, segments: list[Any], *, content: str, uid: str = ""
) -> Dataset:
    """A DICOM SEG of the size of a single-frame image.

    Args:
        header: see `source_header`.
        pixels: (rows, columns); bool of one segment, float in 0..1 of one fractional segment, or uint8 numbers of
            segments, 0 for none.
        segments: of highdicom, see `segment`.
        content: says what it is.
        uid: of the instance; new by default.

    Raises:
        DataError: if the header lacks what a SEG must repeat.
    """
    import highdicom

    fractional = pixels.dtype.kind == "f"
    with made_of(image, "a DICOM SEG"):
        found = highdicom.seg.Segmentation(
            source_images=[header],
            pixel_array=pixels[None],
            segmentation_type="FRACTIONAL" if fractional else "BINARY",
            segment_descriptions=segments,
            series_instance_uid=generate_uid(entropy_srcs=[uid, "series"]) if uid else generate_uid(),
            series_number=1,
            sop_instance_uid=uid or generate_uid(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=OWN,
            device_serial_number="0",
            content_description=content,
            transfer_syntax_uid=RLELossless if fractional else ExplicitVRLittleEndian,
            omit_empty_frames=False,
        )
    # Of images that are not in a frame of reference (PS3.3 C.7.6.1); highdicom leaves it out.
    found.PatientOrientation = header.get("PatientOrientation") or ""
    return found


def segment(number: int, label: str, category: Code, kind: Code) -> Any:
    """The description of a segment that a network has drawn."""
    import highdicom

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label[:64],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MAKER, version=OWN, family=codes.cid7162.ArtificialIntelligence
        ),
    )


@contextlib.contextmanager
def made_of(image: str | Path, what: str) -> Iterator[None]:
    """That highdicom cannot make a result is an error that names the image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may print what identifies the patient
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{image}: cannot have {what}: {reason}") from error


def _is_date(value: object) -> bool:
    try:
        return bool(DA(str(value)))
    except ValueError:
        return False
