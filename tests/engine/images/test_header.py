"""Side, view, spacing and flags of a mammogram, from every place where they may stand."""

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import item, picture, sequence
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr._snomed_dict import mapping
from pydicom.sr.codedict import codes

from gigamorph.engine.images import header
from gigamorph.engine.images.dicom import open_dicom
from gigamorph.engine.images.header import read_info

Write = Callable[..., Path]


def coded(code: str, *modifiers: str) -> Sequence:
    return sequence(CodeValue=code, ViewModifierCodeSequence=Sequence(item(CodeValue=each) for each in modifiers))


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"ImageLaterality": "L", "ViewPosition": "MLO"}, ("L", "MLO")),
        ({"Laterality": "R", "ViewPosition": "cc "}, ("R", "CC")),
        ({"ImageLaterality": "R", "Laterality": "L"}, ("R", None)),
        ({"ViewPosition": "ML", "SeriesDescription": "L MLO"}, ("L", "ML")),
        ({"SeriesDescription": "R MLO"}, ("R", "MLO")),
        ({"SeriesDescription": "Right ML"}, ("R", "ML")),
        ({"SeriesDescription": "scan_LCC_2"}, ("L", "CC")),
        ({"SeriesDescription": "MLO - L"}, ("L", "MLO")),
        ({"SeriesDescription": "MLO_L"}, ("L", "MLO")),
        ({"SeriesDescription": "XCCL right"}, ("R", "XCCL")),
        ({"SeriesDescription": "ALL CC views"}, (None, None)),
        ({"ViewPosition": "LCC"}, ("L", "CC")),
        ({"ViewCodeSequence": coded("R-10226")}, (None, "MLO")),
        ({"ViewCodeSequence": coded("399162004")}, (None, "CC")),
        ({"ViewCodeSequence": coded("399260004"), "ViewPosition": ""}, (None, "ML")),
        ({"ViewPosition": "CC", "ViewCodeSequence": coded("399368009")}, (None, "CC")),
        ({"AnatomicRegionSequence": sequence(CodeValue="T-04030")}, ("L", None)),
        (
            {
                "AnatomicRegionSequence": sequence(
                    CodeValue="76752008", AnatomicRegionModifierSequence=sequence(CodeValue="24028007")
                )
            },
            ("R", None),
        ),
        (
            {
                "SharedFunctionalGroupsSequence": sequence(
                    FrameAnatomySequence=sequence(FrameLaterality="R"),
                    XRay3DFrameTypeSequence=sequence(ViewCodeSequence=coded("R-10242")),
                )
            },
            ("R", "CC"),
        ),
        (
            {
                "PerFrameFunctionalGroupsSequence": sequence(
                    FrameAnatomySequence=sequence(
                        FrameLaterality="",
                        AnatomicRegionSequence=sequence(
                            CodeValue="T-04000", AnatomicRegionModifierSequence=sequence(CodeValue="G-A101")
                        ),
                    )
                )
            },
            ("L", None),
        ),
        ({"PatientOrientation": ["A", "FR"]}, ("L", None)),
        ({"PatientOrientation": ["P", "L"]}, ("R", None)),
        ({"PatientOrientation": ["A", "L"]}, (None, None)),
        ({"PatientOrientation": ["P", "L"], "ImageLaterality": "L"}, ("L", None)),
        ({}, (None, None)),
    ],
)
def test_side_and_view(write_dicom: Write, elements: dict[str, Any], expected: tuple[str | None, str | None]) -> None:
    info = read_info(write_dicom(picture(12), **{"PatientOrientation": None, **elements}))
    assert (info.laterality, info.view) == expected


def test_codes_are_those_of_the_standard() -> None:
    older = mapping["SRT"]
    names = {"medio-lateral oblique": "MLO", "cranio-caudal": "CC", "medial-lateral": "ML", "latero-medial": "LM"}
    names |= {"latero-medial oblique": "LMO", "caudo-cranial": "FB", "cranio-caudal exaggerated laterally": "XCCL"}
    names |= {"cranio-caudal exaggerated medially": "XCCM", "superolateral to inferomedial oblique": "SIO"}
    names |= {"inferomedial to superolateral oblique": "ISO", "tissue specimen from breast": "SPECIMEN"}
    assert {getattr(codes.cid4014, name).value for name in codes.cid4014.dir()} <= set(header.VIEW_CODES)
    for name in codes.cid4014.dir():
        code = getattr(codes.cid4014, name)
        assert header.VIEW_CODES[code.value] == names[code.meaning]
    tables = (header.VIEW_CODES, header.SIDE_CODES, header.MODIFIER_CODES)
    for table in tables:  # an older code means what its successor means
        for code, meaning in table.items():
            if "-" in code:
                assert table[older[code]] == meaning, code
    assert header.SIDE_CODES[codes.cid244.Left.value] == "L"
    assert header.SIDE_CODES[codes.cid244.Right.value] == "R"
    for name, meaning in [
        ("SpotCompression", "spot"),
        ("Magnification", "magnification"),
        ("Tangential", "tangential"),
    ]:
        assert header.MODIFIER_CODES[getattr(codes.cid4015, name).value] == meaning
    for name in ("RolledInferior", "RolledLateral", "RolledMedial", "RolledSuperior"):
        assert header.MODIFIER_CODES[getattr(codes.cid4015, name).value] == "rolled"
    assert header.MODIFIER_CODES[codes.cid4015.ImplantDisplaced.value] == "implant displaced"


def test_every_cmmd_header(real_data: Path) -> None:
    """5202 real headers without ViewPosition: side and mirroring by orientation alone, view by code."""
    with gzip.open(real_data / "tables" / "cmmd_headers.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5202
    for row in rows:
        ds = Dataset()
        ds.PatientOrientation = [part.strip("[]' ") for part in row["__PatientOrientation"].split(",")]
        ds.ViewCodeSequence = sequence(CodeValue=row["__CodeValue"])
        side, view = header.side_and_view(ds)
        assert side == row["laterality"]
        assert view == {"cranio-caudal": "CC", "medio-lateral oblique": "MLO"}[row["__CodeMeaning"]]
        assert ds.PatientOrientation[0] == ("A" if side == "L" else "P")


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"ImagerPixelSpacing": [0.07, 0.08]}, (0.07, 0.08)),
        ({"ImagerPixelSpacing": [0.5, 0.5], "PixelSpacing": [0.25, 0.25]}, (0.5, 0.5)),
        (
            {
                "ImagerPixelSpacing": [0.5, 0.5],
                "PixelSpacing": [0.25, 0.25],
                "PixelSpacingCalibrationType": "GEOMETRY",
            },
            (0.25, 0.25),
        ),
        ({"PixelSpacing": [0.1, 0.2]}, (0.1, 0.2)),
        ({"NominalScannedPixelSpacing": [0.05, 0.05]}, (0.05, 0.05)),
        (
            {
                "SharedFunctionalGroupsSequence": sequence(PixelMeasuresSequence=sequence(PixelSpacing=[0.09, 0.09])),
                "PixelSpacing": None,
            },
            (0.09, 0.09),
        ),
        ({"XRay3DAcquisitionSequence": sequence(ImagerPixelSpacing=[0.14, 0.14])}, (0.14, 0.14)),
        ({"ImagerPixelSpacing": [0, 0]}, None),
        ({}, None),
    ],
)
def test_spacing(write_dicom: Write, elements: dict[str, Any], expected: tuple[float, float] | None) -> None:
    assert read_info(write_dicom(picture(12), **elements)).spacing == expected


@pytest.mark.parametrize(("kind", "factor", "expected"), [("", 1.8, 1.8), ("GEOMETRY", 1.8, None), ("", -1, None)])
def test_the_magnification_of_the_spacing(write_dicom: Write, kind: str, factor: float, expected: float | None) -> None:
    """A calibrated spacing is that in the breast already."""
    calibrated = {"PixelSpacingCalibrationType": kind} if kind else {}
    elements = {"ImagerPixelSpacing": [0.1, 0.1], "EstimatedRadiographicMagnificationFactor": factor, **calibrated}
    assert read_info(write_dicom(picture(12), **elements)).magnification == expected


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({}, ()),
        ({"BreastImplantPresent": "YES"}, ("implant",)),
        ({"ViewCodeSequence": coded("399162004", "399209000")}, ("implant", "implant displaced")),
        ({"ViewCodeSequence": coded("R-10242", "R-102D7", "R-102D6")}, ("magnification", "spot")),
        ({"ViewCodeSequence": coded("R-10242", "R-102D3")}, ("rolled",)),
        ({"PaddleDescription": "SPOT COMPRESSION"}, ("spot",)),
        ({"PaddleDescription": "10CM MAG"}, ("magnification",)),
        ({"EstimatedRadiographicMagnificationFactor": "1.8"}, ("magnification",)),
        ({"EstimatedRadiographicMagnificationFactor": "1.07"}, ()),
        ({"SeriesDescription": "L CC spot"}, ("spot",)),
        ({"QualityControlImage": "YES"}, ("phantom",)),
        ({"PatientID": "ACR Phantom"}, ("phantom",)),
        ({"StudyDescription": "QC daily"}, ("phantom",)),
        ({"ImageType": ["DERIVED", "PRIMARY", "STEREO", "LEFT"]}, ("stereo",)),
        ({"SeriesDescription": "L MLO C-View"}, ("synthetic",)),
        ({"SeriesDescription": "R CC S-VIEW"}, ("synthetic",)),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]}, ("synthetic",)),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]}, ("tomosynthesis",)),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.13.1.3"}, ("tomosynthesis",)),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.13.1.4"}, ("projection",)),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "TOMO_PROJ", "RIGHT"]}, ("projection",)),
        ({"ImageType": ["DERIVED", "PRIMARY", "POST_CONTRAST", "SUBTRACTION"]}, ("contrast",)),
        ({"ContrastBolusAgent": "iohexol"}, ("contrast",)),
        ({"PartialView": "YES", "BurnedInAnnotation": "YES"}, ("burned in", "partial")),
        ({"LossyImageCompression": "01"}, ("lossy",)),
    ],
)
def test_flags(write_dicom: Write, elements: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert read_info(write_dicom(picture(12), **elements)).flags == expected


def test_overlay_planes_are_flagged_and_left_out(tmp_path: Path) -> None:
    """Old files keep an overlay in the unused bits of the pixels."""
    ds = Dataset()
    ds.add_new(0x60000010, "US", 37)
    assert header.flags(ds) == ("overlay",)


def test_real_files(real_data: Path) -> None:
    expected = {
        "mg_ge_jpeg_lossless": ("R", "MLO", (0.09409, 0.09409), ()),
        "mg_film_jpeg2000": ("L", "MLO", None, ("lossy",)),
        "mg_film_jpeg_extended_12bit": ("L", "MLO", None, ("lossy",)),
        "dbt_4frames_jpeg2000": ("L", "CC", None, ("tomosynthesis",)),
    }
    for name, (side, view, spacing, flags) in expected.items():
        info = read_info(real_data / "dicom" / f"{name}.dcm")
        assert (info.laterality, info.view, info.flags) == (side, view, flags), name
        assert info.spacing == (spacing and pytest.approx(spacing, abs=1e-5)), name
    assert read_info(real_data / "dicom" / "mg_ge_jpeg_lossless.dcm").magnification == 1


def test_orientation_in_functional_groups(write_dicom: Write) -> None:
    groups = sequence(PatientOrientationInFrameSequence=sequence(PatientOrientation=["P", "L"]))
    path = write_dicom(
        np.stack([picture(12)] * 2), PatientOrientation=None, PerFrameFunctionalGroupsSequence=Sequence([groups[0]] * 2)
    )
    assert read_info(path).orientation == ("P", "L")
    assert open_dicom(path, frame=0).flips() == (True, False)
