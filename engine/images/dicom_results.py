"""Results as DICOM instances in the study of their image, by highdicom: segmentations.

They contain the patient's name and identifiers from the image's header.
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

from ..errors import DataError, GigamorphError
from ..versions import OWN
from .dicom_file import DicomFile, read_header
from .dicomweb import Instance, is_dicomweb

MAKER = "gigamorph"
_SCHEME = "99GIGAMORPH"
# Type 2 elements of patient and study (PS3.3 C.7.1, C.7.2), which highdicom copies and de-identified files lack.
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)


def source_header(image: str | Path, advice: str) -> Dataset:
    """The header of a DICOM file, or of an image in a DICOMweb store, with all elements that results copy.

    Args:
        image: the path or URL.
        advice: the end of the error message for other images.

    Raises:
        DataError: if it is not a DICOM image, or cannot be read.
    """
    if is_dicomweb(str(image)):
        header = Instance(str(image)).header
    else:
        try:
            with DicomFile(Path(image)) as file:
                header, _ = read_header(file, Path(image))
        except Exception as error:  # pydicom raises errors of many kinds
            raise DataError(f"{image}: is not a DICOM file, {advice}") from error
    for keyword in MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    if "Modality" not in header:
        header.Modality = "OT"  # highdicom compares the modality of the images, and writes its own
    for keyword in ("StudyDate", "SeriesDate", "PatientBirthDate"):
        # De-identified files have dates of zeros, which highdicom refuses; empty dates are valid.
        if keyword in header and not _is_date(header[keyword].value):
            header[keyword].value = ""
    return header


def own_code(name: str) -> Code:
    """A private code for a name of the model's author that has no standard code."""
    short = re.fullmatch(r"\w{1,16}", name, re.ASCII) is not None
    value = name if short else hashlib.sha256(name.encode()).hexdigest()[:16]
    return Code(value, _SCHEME, name[:64] or "_")


def segmentation(
    image: str | Path, header: Dataset, pixels: np.ndarray, segments: list[Any], *, content: str, uid: str = ""
) -> Dataset:
    """A DICOM SEG with the size of a single-frame image.

    Args:
        image: the path or URL of the image, for messages.
        header: see `source_header`.
        pixels: (rows, columns); bool for one segment, float in 0..1 for one fractional segment, or uint8 numbers of
            segments, 0 for none.
        segments: the segments of highdicom, see `segment`.
        content: the content description.
        uid: the UID of the instance; new by default.

    Raises:
        DataError: if the header lacks elements that a SEG requires.
    """
    import highdicom

    fractional = pixels.dtype.kind == "f"
    with highdicom_errors(image, "a DICOM SEG"):
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
    # Required for images without a frame of reference (PS3.3 C.7.6.1), but highdicom omits it.
    found.PatientOrientation = header.get("PatientOrientation") or ""
    return found


def segment(number: int, label: str, category: Code, kind: Code) -> Any:
    """The description of a segment that a network predicted."""
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
def highdicom_errors(image: str | Path, what: str) -> Iterator[None]:
    """Context that turns errors of highdicom into a `DataError` that names the image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings may contain the patient's identity
        try:
            yield
        except GigamorphError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{image}: {what} cannot be created: {reason}") from error


def _is_date(value: object) -> bool:
    try:
        return bool(DA(str(value)))
    except ValueError:
        return False
