"""DICOM SEG, read back by highdicom and pydicom, on phantoms and on real mammograms."""

from dataclasses import replace

import highdicom
import numpy as np
import pydicom
import pytest
import torch

from gigamorph import DataError
from gigamorph.engine.explain.maps import Explanation
from gigamorph.engine.explain.write import REGION, write_segmentation
from gigamorph.engine.images.dicom_results import MAY_BE_EMPTY
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import as_stored
from gigamorph.engine.mammography.phantom import write_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return sorted(
        (write_phantoms(tmp_path_factory.mktemp("p"), patients=2, height=200, width=152).parent / "images").iterdir()
    )


def explained(path) -> Explanation:
    source = open_pixels(path)
    values = torch.zeros(source.shape[1] // 8, source.shape[2] // 8)
    values[5:8, 2:4], values[6, 3] = 1.0, 2.0
    return Explanation(source, values)


def check(path, tmp_path, kind) -> pydicom.Dataset:
    """Write a SEG of an image and compare it with the map; returns it as pydicom reads it."""
    found = explained(path)
    out = tmp_path / "map.seg.dcm"
    write_segmentation(found, path, out, label="malignant", kind=kind)
    seg = highdicom.seg.segread(out)
    source = pydicom.dcmread(path, stop_before_pixels=True)
    frame = seg.get_pixels_by_source_instance(
        [source.SOPInstanceUID], combine_segments=False, rescale_fractional=True, ignore_spatial_locations=True
    )[0, ..., 0]
    heat = found.relative().read(0, source.Rows, 0, source.Columns)
    assert frame.shape == (source.Rows, source.Columns) and heat.max() > 0.9
    if kind == "fractional":
        np.testing.assert_allclose(frame, heat, atol=0.5 / 255 + 1e-6)
    else:
        np.testing.assert_array_equal(frame, heat >= REGION)
    assert seg.get_segment_description(1).segment_label == "malignant"
    assert seg.PatientOrientation == source.get("PatientOrientation", "")  # dciodvfy of dicom3tools demands it
    # Where the chest wall is on the right in the file, so is the map's left.
    mirrored = found.source.to_original.xx < 0
    columns = np.flatnonzero(frame.max(0) > 0.5)
    assert (columns.mean() > source.Columns / 2) == mirrored
    return pydicom.dcmread(out)


@pytest.mark.parametrize("kind", ["fractional", "binary"])
@pytest.mark.parametrize("number", [0, 2])
def test_phantoms(phantoms, tmp_path, kind, number):
    seg = check(phantoms[number], tmp_path, kind)
    source = pydicom.dcmread(phantoms[number], stop_before_pixels=True)
    assert (seg.PatientID, seg.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    assert seg.Modality == "SEG" and seg.SegmentationType == kind.upper()
    assert seg.pixel_array.shape[-2:] == (200, 152)
    assert (
        seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mg_ge_jpeg_lossless.dcm", "fractional"),
        pytest.param("mg_film_jpeg_extended_12bit.dcm", "binary", marks=pytest.mark.slow),
    ],
)
def test_real_mammograms(real_data, tmp_path, name, kind):
    check(real_data / "dicom" / name, tmp_path, kind)


def test_what_cannot_have_one_is_said_in_a_line(real_data, phantoms, tmp_path):
    source = open_pixels(np.random.default_rng(0).random((40, 30), np.float32))
    found = Explanation(source, torch.rand(10, 10))
    np.save(tmp_path / "a.npy", np.zeros((40, 30)))
    with pytest.raises(DataError, match=r"a\.npy: is not a DICOM file"):
        write_segmentation(found, tmp_path / "a.npy", tmp_path / "s.dcm", label="x", kind="binary")
    stack = real_data / "dicom" / "dbt_4frames_jpeg2000.dcm"
    slices = Explanation(open_pixels(stack, frame=1), torch.rand(10, 10))
    with pytest.raises(DataError, match="has 4 frames; a DICOM SEG needs one"):
        write_segmentation(slices, stack, tmp_path / "s.dcm", label="x", kind="binary")
    ds = pydicom.dcmread(phantoms[0])
    del ds.StudyInstanceUID
    ds.save_as(tmp_path / "b.dcm")
    with pytest.raises(DataError, match=r"b\.dcm: a DICOM SEG cannot be created: .*; write png or tif") as error:
        write_segmentation(
            explained(tmp_path / "b.dcm"), tmp_path / "b.dcm", tmp_path / "s.dcm", label="x", kind="binary"
        )
    assert "\n" not in str(error.value) and not (tmp_path / "s.dcm").exists()


@pytest.mark.parametrize(("log_odds", "empty"), [(-2.0, True), (2.0, False)])
def test_a_binary_segment_of_what_the_network_does_not_call_is_empty(phantoms, tmp_path, log_odds, empty):
    found = replace(explained(phantoms[0]), log_odds=log_odds)
    write_segmentation(found, phantoms[0], tmp_path / "s.dcm", label="x", kind="binary")
    assert (pydicom.dcmread(tmp_path / "s.dcm").pixel_array.max() == 0) == empty


def test_a_map_without_evidence_is_an_empty_segment(phantoms, tmp_path):
    source = open_pixels(phantoms[0])
    nothing = Explanation(source, -torch.ones(20, 20))
    write_segmentation(nothing, phantoms[0], tmp_path / "s.dcm", label="x", kind="binary")
    assert pydicom.dcmread(tmp_path / "s.dcm").pixel_array.max() == 0
    assert as_stored(source).shape == (1, 200, 152)


def test_a_file_that_was_stripped_of_its_patient(phantoms, tmp_path):
    """Tools that remove names remove elements that a SEG must have, if only empty."""
    ds = pydicom.dcmread(phantoms[0])
    for keyword in (*MAY_BE_EMPTY, "Modality"):
        if keyword in ds:
            delattr(ds, keyword)
    ds.save_as(tmp_path / "x.dcm")
    seg = check(tmp_path / "x.dcm", tmp_path, "binary")
    assert seg.PatientBirthDate == ""
