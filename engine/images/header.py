"""Image data in DICOM headers, without the pixels; the headers of many files.

Side, view and spacing of mammograms may each be in an element of its own, as a code of SNOMED CT or its predecessor
SNOMED RT, in the functional groups of a multi-frame file, or only in a description. The first one found counts, in this
order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from ..errors import DataError
from .dicom_file import DicomFile, read_header, without_validation
from .parallel import run_parallel
from .rawfile import library_errors

UNDECLARED = "not declared"  # the photometric interpretation of a header without one
# Mammography, breast projections, digital X-ray.
_FOR_PROCESSING = {"1.2.840.10008.5.1.4.1.1.1.2.1", "1.2.840.10008.5.1.4.1.1.13.1.5", "1.2.840.10008.5.1.4.1.1.1.1.1"}

# PS3.16 CID 4014, SNOMED CT and SNOMED RT.
VIEW_CODES = {
    **dict.fromkeys(("399162004", "R-10242"), "CC"),
    **dict.fromkeys(("399368009", "R-10226"), "MLO"),
    **dict.fromkeys(("399260004", "R-10224"), "ML"),
    **dict.fromkeys(("399352003", "R-10228"), "LM"),
    **dict.fromkeys(("399099002", "R-10230"), "LMO"),
    **dict.fromkeys(("399196006", "R-10244"), "FB"),
    **dict.fromkeys(("399192008", "R-1024A"), "XCCL"),
    **dict.fromkeys(("399101009", "R-1024B"), "XCCM"),
    **dict.fromkeys(("399265009", "R-102CF"), "XCC"),
    **dict.fromkeys(("399188001", "R-102D0"), "SIO"),
    **dict.fromkeys(("441555000", "R-40AAA"), "ISO"),
    **dict.fromkeys(("127457009", "G-8310"), "SPECIMEN"),
}
VIEWS = {*VIEW_CODES.values(), "AT"}
# CID 244, and the left or right breast as anatomy.
SIDE_CODES = {
    **dict.fromkeys(("7771000", "G-A101", "80248007", "T-04030"), "L"),
    **dict.fromkeys(("24028007", "G-A100", "73056007", "T-04020"), "R"),
}
# CID 4015: the modifiers that change what a view shows.
MODIFIER_CODES = {
    **dict.fromkeys(("399163009", "R-102D6"), "magnification"),
    **dict.fromkeys(("399055006", "R-102D7"), "spot"),
    **dict.fromkeys(("399209000", "R-102D5"), "implant displaced"),
    **dict.fromkeys(("399161006", "R-102D2"), "cleavage"),
    **dict.fromkeys(("399110001", "R-102C2"), "tangential"),
    **dict.fromkeys(("399197002", "R-102D3", "399226006", "R-102D4"), "rolled"),
    **dict.fromkeys(("414493004", "R-102CA", "415670009", "R-102C9"), "rolled"),
    **dict.fromkeys(("399011000", "R-102D1"), "axillary tail"),
    **dict.fromkeys(("441752004",), "anterior compression"),
}
TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"
_PROJECTIONS = {"1.2.840.10008.5.1.4.1.1.13.1.4", "1.2.840.10008.5.1.4.1.1.13.1.5"}

_VIEW_WORD = "(CC|MLO|ML|LMO|LM|XCCL|XCCM|XCC)"
_SIDE_WORD = "(L|R|LEFT|RIGHT)"
_SIDE_FIRST = re.compile(rf"(?<![A-Z]){_SIDE_WORD}[ _-]?{_VIEW_WORD}(?![A-Z])")
_VIEW_FIRST = re.compile(rf"(?<![A-Z]){_VIEW_WORD}[ _-]+{_SIDE_WORD}(?![A-Z])")
_SYNTHETIC = re.compile(r"\b(C[- ]?VIEW|S[- ]?VIEW|V[- ]?PREVIEW|INSIGHT ?2D|SYNTHE\w*|GENERATED[_ ]2D)\b")
_PHANTOM = re.compile(r"\b(PHANTOM|QC|FLAT ?FIELD)\b")
_CONTRAST = re.compile(r"CESM|CEDM|CONTRAST|LOW_ENERGY|HIGH_ENERGY|RECOMBINED|SUBTRACTION")


@dataclass(frozen=True)
class DicomInfo:
    """Image data in a DICOM header; None for missing data.

    The printed form omits data that identify the patient, so that logs do not contain them by accident.
    """

    rows: int
    columns: int
    frames: int
    bits_stored: int
    transfer_syntax: str
    modality: str | None
    patient_id: str | None = field(repr=False)
    study_uid: str | None = field(repr=False)
    laterality: str | None
    """L or R."""
    view: str | None
    """CC, MLO, ML, ... as in ViewPosition."""
    orientation: tuple[str, str] | None
    """The directions of rows and columns, as in PatientOrientation: ("A", "F") is anterior to the right, feet below."""
    spacing: tuple[float, float] | None
    """Millimetres between rows and between columns, at the detector unless the file is calibrated."""
    photometric: str
    for_processing: bool
    """Raw detector values, not meant for display."""
    flags: tuple[str, ...]
    """Differences from a standard view, sorted: "implant", "spot", "magnification", "phantom", "stereo",
    "synthetic", "tomosynthesis", "projection", "contrast", "partial", "burned in", "lossy", "overlay", and view
    modifiers ("rolled", "tangential", "cleavage", "implant displaced", ...)."""
    magnification: float | None
    """The magnification at the detector: `spacing` divided by it is millimetres in the breast. None if it is unknown,
    or if `spacing` is calibrated."""
    manufacturer: str | None
    matrix: tuple[int, int] | None
    """Rows and columns of the whole slide, if the frames are its tiles."""

    @property
    def is_mammogram(self) -> bool:
        """Whether the image is a mammogram: modality MG, or a mammographic view."""
        return self.modality == "MG" or self.view in VIEWS


def read_info(path: str | Path) -> DicomInfo:
    """The header of a DICOM file, without its pixels; `DataError` if it is missing, damaged or not an image."""
    path = Path(path)
    with DicomFile(path) as file, without_validation():
        return describe(read_header(file, path)[0], path)


def describe(ds: Dataset, path: Path) -> DicomInfo:
    """The data of a parsed header; `DataError` for invalid elements."""
    # pydicom converts elements on access.
    with library_errors(f"{path}: malformed DICOM header", "correct it or fetch it again"):
        laterality, view = side_and_view(ds)
        sop_class = str(ds.get("SOPClassUID", ""))
        matrix = ds.get("TotalPixelMatrixRows"), ds.get("TotalPixelMatrixColumns")
        info = DicomInfo(
            rows=int(ds.Rows),
            columns=int(ds.Columns),
            frames=int(ds.get("NumberOfFrames") or 1),
            bits_stored=int(ds.BitsStored),
            transfer_syntax=str(ds.file_meta.TransferSyntaxUID),
            modality=_text(ds.get("Modality")),
            patient_id=_text(ds.get("PatientID")),
            study_uid=_text(ds.get("StudyInstanceUID")),
            laterality=laterality,
            view=view,
            orientation=orientation(ds),
            spacing=spacing(ds),
            photometric=_text(ds.get("PhotometricInterpretation")) or UNDECLARED,
            for_processing=sop_class in _FOR_PROCESSING or text(ds.get("PresentationIntentType")) == "FOR PROCESSING",
            flags=flags(ds),
            magnification=magnification(ds) if at_detector(ds) else None,
            manufacturer=_text(ds.get("Manufacturer")),
            matrix=(int(matrix[0]), int(matrix[1])) if all(matrix) else None,  # pyright: ignore[reportArgumentType]
        )
    if info.rows < 1 or info.columns < 1 or info.frames < 1:
        raise DataError(f"{path}: damaged header ({info.frames} frames of {info.rows} x {info.columns} pixels)")
    return info


def _text(value: Any) -> str | None:
    """The value as text in one line; None if it is empty."""
    return " ".join(str(value).split()) or None if value is not None else None


def read_headers(paths: Sequence[Path]) -> list[DicomInfo | DataError]:
    """`read_info` of each file, in the order of `paths`; the error for a file that cannot be read."""
    found = dict(run_parallel(read_info, paths, chunk=64))
    return [found[number] for number in range(len(paths))]


def text(value: Any) -> str:
    """The value in one line and capitals; empty for None."""
    return " ".join(str(value).split()).upper() if value is not None else ""


def _data_sets(ds: Dataset) -> Iterator[Dataset]:
    """The data set, the items of its shared functional groups, and those of the first frame."""
    yield ds
    per_frame = list(ds.get("PerFrameFunctionalGroupsSequence") or [])[:1]
    for group in [*(ds.get("SharedFunctionalGroupsSequence") or []), *per_frame]:
        for element in group:
            if element.VR == "SQ" and element.value:
                yield element.value[0]


def _codes(item: Dataset, *path: str) -> Iterator[str]:
    """The code values in the items of a sequence, or of a nested sequence."""
    for inner in item.get(path[0]) or []:
        if len(path) > 1:
            yield from _codes(inner, *path[1:])
        else:
            yield str(inner.get("CodeValue") or "").strip()


def side_and_view(ds: Dataset) -> tuple[str | None, str | None]:
    """L or R, and the view as in ViewPosition; None if unknown."""
    items = list(_data_sets(ds))
    side = _own_side(items)
    position = text(ds.get("ViewPosition"))
    view = position if position in VIEWS else None
    codes = [VIEW_CODES[code] for item in items for code in _codes(item, "ViewCodeSequence") if code in VIEW_CODES]
    view = view or next(iter(codes), None)
    for words in (position, text(ds.get("SeriesDescription")), text(ds.get("ProtocolName"))):
        first, last = _SIDE_FIRST.search(words), _VIEW_FIRST.search(words)
        found = (first[1], first[2]) if first else (last[2], last[1]) if last else None
        if found:
            side, view = side or found[0][0], view or found[1]
    return side or _side_by_orientation(ds), view or position or None


def _own_side(items: list[Dataset]) -> str | None:
    for keyword in ("ImageLaterality", "Laterality", "FrameLaterality"):
        for item in items:
            if text(item.get(keyword)) in ("L", "R"):
                return text(item.get(keyword))
    for path in (("AnatomicRegionSequence", "AnatomicRegionModifierSequence"), ("AnatomicRegionSequence",)):
        for item in items:
            for code in _codes(item, *path):
                if code in SIDE_CODES:
                    return SIDE_CODES[code]
    return None


def orientation(ds: Dataset) -> tuple[str, str] | None:
    """The directions of rows and columns: PatientOrientation, maybe in the functional groups of a multi-frame file."""
    for item in _data_sets(ds):
        inner = item.get("PatientOrientationInFrameSequence")
        value = item.get("PatientOrientation") or (inner[0].get("PatientOrientation") if inner else None)
        if value and not isinstance(value, str) and len(value) == 2 and all(value):
            return text(value[0]), text(value[1])
    return None


def _side_by_orientation(ds: Dataset) -> str | None:
    """The side by the standard display: a left breast has anterior right and its medial side below, a right one the
    opposite; None for other orientations."""
    row, column = orientation(ds) or ("", "")
    if row == "A" and column in ("R", "FR"):
        return "L"
    return "R" if row == "P" and column in ("L", "FL") else None


def spacing(ds: Dataset) -> tuple[float, float] | None:
    """Millimetres between rows and between columns: calibrated or of a reconstruction, otherwise at the detector."""
    if at_detector(ds) and ds.get("ImagerPixelSpacing"):
        keywords = ("ImagerPixelSpacing", "PixelSpacing", "NominalScannedPixelSpacing")
    else:
        keywords = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    items = list(_data_sets(ds)) + list(ds.get("XRay3DAcquisitionSequence") or [])[:1]
    for keyword in keywords:
        for item in items:
            value = item.get(keyword)
            if value and not isinstance(value, str) and len(value) == 2:
                pair = float(value[0]), float(value[1])
                if all(math.isfinite(side) and side > 0 for side in pair):
                    return pair
    return None


def at_detector(ds: Dataset) -> bool:
    """Whether `spacing` is that at the detector, where the breast is magnified."""
    return not ds.get("PixelSpacingCalibrationType")


def magnification(ds: Dataset) -> float | None:
    """EstimatedRadiographicMagnificationFactor: 1 to 1.1 for contact views, at least 1.5 on a magnification table."""
    for item in (ds, *(ds.get("XRay3DAcquisitionSequence") or [])):
        value = item.get("EstimatedRadiographicMagnificationFactor")
        if value not in (None, "") and float(value) > 0:
            return float(value)
    return None


def flags(ds: Dataset) -> tuple[str, ...]:
    """Differences from a standard view of a breast, sorted: "implant", "spot", "phantom", ..."""
    items = list(_data_sets(ds))
    kinds = [text(value) for value in _values(ds.get("ImageType"))]
    words = " ".join(text(ds.get(key)) for key in ("SeriesDescription", "ProtocolName", "ViewPosition"))
    paddles = " ".join(
        text(item.get("PaddleDescription")) for item in (*items, *(ds.get("XRay3DAcquisitionSequence") or []))
    )
    studied = " ".join(
        text(ds.get(key)) for key in ("BodyPartExamined", "StudyDescription", "PatientID", "PatientName")
    )
    modifiers = {
        MODIFIER_CODES.get(code)
        for item in items
        for code in _codes(item, "ViewCodeSequence", "ViewModifierCodeSequence")
    }
    sop_class = str(ds.get("SOPClassUID", ""))
    synthetic = bool(_SYNTHETIC.search(" ".join([words, *kinds])))
    projection = sop_class in _PROJECTIONS or any(kind in ("TOMO_PROJ", "TOMO_PROJECTION") for kind in kinds)
    tomosynthesis = sop_class == TOMOSYNTHESIS or "TOMOSYNTHESIS" in kinds
    found = {
        "implant": text(ds.get("BreastImplantPresent")) == "YES" or "implant displaced" in modifiers,
        "spot": "SPOT" in paddles or bool(re.search(r"\bSPOT\b", words)),
        "magnification": bool(re.search(r"\bMAG\b|MAGNIF", f"{words} {paddles}")) or (magnification(ds) or 1) >= 1.3,
        "phantom": text(ds.get("QualityControlImage")) == "YES" or bool(_PHANTOM.search(f"{words} {studied}")),
        "stereo": any(kind.startswith("STEREO") for kind in kinds),
        "synthetic": synthetic,
        "tomosynthesis": tomosynthesis and not synthetic and not projection,
        "projection": projection,
        "contrast": bool(_CONTRAST.search(" ".join(kinds)) or ds.get("ContrastBolusAgent")),
        "partial": text(ds.get("PartialView")) == "YES",
        "burned in": text(ds.get("BurnedInAnnotation")) == "YES",
        "lossy": text(ds.get("LossyImageCompression")) == "01",
        "overlay": any(0x60000000 <= int(tag) < 0x61000000 for tag in ds.keys()),  # noqa: SIM118 (not a dict)
    }
    return tuple(sorted({name for name, is_so in found.items() if is_so} | {name for name in modifiers if name}))


def _values(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
