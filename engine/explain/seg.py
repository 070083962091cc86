"""A map as DICOM SEG on the image that it explains, through highdicom.

A SEG belongs to its patient: it carries the name and numbers that the image's header has.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from pydicom.valuerep import DA

from ..errors import DataError
from ..files import write_atomically
from ..train.explanation import Explanation

Kind = Literal["fractional", "binary"]
REGION = 0.5
"""Share of the drawn map's maximum from which on a pixel belongs to the region of a binary SEG."""
_STRIP = 512


def write_segmentation(found: Explanation, image: str | Path, path: str | Path, *, label: str, kind: Kind) -> None:
    """Write the relative map (`Explanation.relative`) of a DICOM image as a SEG of its size, one segment.

    Args:
        image: the DICOM file that the map is of, of a single frame.
        label: of the segment.
        kind: "fractional" has 255 where the drawn map is 1 (which is no probability of a lesion); "binary" has the
            region of at least half of its maximum, which every viewer shows, or nothing where the class is less
            probable than not.

    Raises:
        DataError: if highdicom is missing, the image is no DICOM file of one frame, or its header lacks what a SEG
            must repeat.
    """
    try:
        import highdicom
    except ImportError as error:
        raise DataError("DICOM SEG needs highdicom: pip install highdicom") from error
    header = _header(Path(image), found.size)
    shown = found.relative()
    heat = _whole(shown)
    fractional = kind == "fractional"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may print what identifies the patient
        try:
            described = highdicom.seg.SegmentDescription(
                segment_number=1,
                segment_label=label[:64],
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
                segmented_property_type=codes.SCT.Lesion,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                    name="gigamorph", version=version("gigamorph"), family=codes.cid7162.ArtificialIntelligence
                ),
            )
            seg = highdicom.seg.Segmentation(
                source_images=[header],
                pixel_array=heat[None] if fractional else _region(heat, shown)[None],
                segmentation_type=kind.upper(),
                segment_descriptions=[described],
                series_instance_uid=generate_uid(),
                series_number=1,
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="gigamorph",
                manufacturer_model_name="gigamorph",
                software_versions=version("gigamorph"),
                device_serial_number="0",
                content_description="Relative evidence of a network",
                transfer_syntax_uid=RLELossless if fractional else ExplicitVRLittleEndian,
                omit_empty_frames=False,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{image}: cannot have a DICOM SEG: {reason}; write png or tif") from error
        write_atomically(path, lambda p: seg.save_as(p), "DICOM SEG")


# Of patient and study, which highdicom copies: type 2 (PS3.3 C.7.1, C.7.2), and files that were stripped lack them.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)


def _header(image: Path, size: tuple[int, int]) -> Dataset:
    try:
        header = dcmread(image, stop_before_pixels=True)
    except Exception as error:  # pydicom has many
        raise DataError(f"{image}: is no DICOM file, so that it cannot have a DICOM SEG; write png or tif") from error
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1 or (header.Rows, header.Columns) != size:
        raise DataError(f"{image}: has {frames} frames; a DICOM SEG is of one; write png or tif")
    for keyword in _MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    for keyword in ("StudyDate", "SeriesDate", "PatientBirthDate"):
        # De-identified files have dates of zeros, which highdicom refuses; a date may be empty.
        if keyword in header and not _is_date(header[keyword].value):
            header[keyword].value = ""
    return header


def _is_date(value: object) -> bool:
    try:
        return bool(DA(str(value)))
    except ValueError:
        return False


def _region(heat: np.ndarray, shown: Explanation) -> np.ndarray:
    called = shown.log_odds is None or shown.log_odds >= 0
    return (heat >= REGION * float(shown.values.max())) & (heat > 0) & called


def _whole(found: Explanation) -> np.ndarray:
    height, width = found.size
    heat = np.empty((height, width), np.float32)
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        heat[top:bottom] = found.read(top, bottom, 0, width)
    return heat.clip(0, 1, out=heat)
