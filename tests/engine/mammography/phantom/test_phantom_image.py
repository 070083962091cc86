"""Phantoms by region: the same pixels whatever the tile, lesions where they are said to be, breasts that mirror."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from gigamorph.engine.datasets.tables import Record, read_table
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.mammography.phantom import LESIONS, PhantomImage, write_phantoms
from gigamorph.engine.mammography.phantom import files as phantom_files
from gigamorph.engine.mammography.phantom.files import write_dicom, write_tiff
from gigamorph.engine.mammography.phantom.image import normals, power_law

HEIGHT, WIDTH = 300, 251
IMAGE = PhantomImage(HEIGHT, WIDTH, seed=5, side=6, view="MLO", lesions=LESIONS, symmetry=0.7)
WHOLE = IMAGE.read(0, HEIGHT, 0, WIDTH)


def whole(path: Path, **options: object) -> np.ndarray:
    source = open_pixels(path, **options)  # pyright: ignore[reportArgumentType]
    return source.read(0, source.shape[1], 0, source.shape[2])[0].numpy()


@settings(deadline=None)
@given(rows=st.tuples(*[st.integers(0, HEIGHT)] * 2), columns=st.tuples(*[st.integers(0, WIDTH)] * 2))
def test_any_region_has_the_pixels_of_the_whole(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    (top, bottom), (left, right) = sorted(rows), sorted(columns)
    region = IMAGE.read(top, bottom, left, right)
    assert region.dtype == np.uint16
    np.testing.assert_array_equal(region, WHOLE[top:bottom, left:right])
    for lesion in IMAGE.lesions:
        mask = IMAGE.mask(lesion, 0, HEIGHT, 0, WIDTH)
        np.testing.assert_array_equal(IMAGE.mask(lesion, top, bottom, left, right), mask[top:bottom, left:right])


def test_a_corner_of_a_terapixel() -> None:
    image = PhantomImage(2**20, 2**20, seed=1)
    middle = 2**19
    region = image.read(middle, middle + 64, 1000, 1064)
    np.testing.assert_array_equal(image.read(middle + 5, middle + 6, 1007, 1050), region[5:6, 7:50])
    assert 500 < region.mean() < 3000
    assert region.std() > 5
    assert image.read(0, 64, 2**20 - 64, 2**20).max() == 0  # air


def test_noise_is_white_and_nearly_normal() -> None:
    noise = normals(3, -40, 984, 7, 1031).astype(np.float64)
    assert abs(noise.mean()) < 0.005
    assert noise.var() == pytest.approx(1, abs=0.01)
    assert (noise**4).mean() == pytest.approx(3 - 1.2 / 4, abs=0.03)  # of four uniform numbers
    for other in (noise[1:, :] * noise[:-1, :], noise[:, 1:] * noise[:, :-1], noise * normals(4, -40, 984, 7, 1031)):
        assert abs(other.mean()) < 0.005


def test_texture_falls_as_the_cube_of_frequency() -> None:
    fields = [power_law((key, 0), 1.0, 64, (0, 1024, 0, 1024)).astype(np.float64) for key in range(4)]
    assert np.mean([np.square(field).mean() for field in fields]) == pytest.approx(1, abs=0.2)
    window = np.hanning(1024)[:, None] * np.hanning(1024)
    power = np.mean([np.abs(np.fft.fft2(field * window)) ** 2 for field in fields], 0)
    frequency = np.hypot(np.fft.fftfreq(1024)[:, None], np.fft.fftfreq(1024))
    band = (frequency > 0.01) & (frequency < 0.12)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert slope == pytest.approx(-3, abs=0.4)


def test_symmetry_is_the_correlation_of_the_texture() -> None:
    for symmetry in (0.0, 0.6, 1.0):
        pairs = [
            [power_law((key, side), symmetry, 32, (0, 512, 0, 512)).ravel() for side in (100 + key, 200 + key)]
            for key in range(6)
        ]
        left, right = (np.concatenate(fields) for fields in zip(*pairs, strict=True))
        assert np.corrcoef(left, right)[0, 1] == pytest.approx(symmetry**2, abs=0.1)


def test_breasts_of_a_woman_differ_in_noise_and_lesions_only_where_symmetry_is_1() -> None:
    left, right = (PhantomImage(512, 400, seed=3, side=(3, side), symmetry=1.0) for side in (0, 1))
    a, b = (image.read(0, 512, 0, 400).astype(np.int64) for image in (left, right))
    np.testing.assert_array_equal(a == 0, b == 0)  # the same outline
    assert left.normal_masses == right.normal_masses
    inside = a > 0
    # Clusters, blurred, are in both, and in different places.
    assert np.median(np.abs(a - b)[inside]) < 25
    assert np.corrcoef(a[inside], b[inside])[0, 1] > 0.97


@pytest.mark.parametrize("kind", LESIONS)
def test_a_lesion_brightens_its_mask_and_nothing_far_from_it(kind: str) -> None:
    for seed in range(4):
        plain = PhantomImage(1024, 800, seed=seed, lesions=())
        image = PhantomImage(1024, 800, seed=seed, lesions=(kind,))  # pyright: ignore[reportArgumentType]
        [lesion] = image.lesions
        assert lesion.kind == kind
        mask = image.mask(lesion, 0, 1024, 0, 800) > 0
        top, bottom, left, right = lesion.box
        rows, columns = np.nonzero(mask)
        assert top <= rows.min() and rows.max() < bottom and left <= columns.min() and columns.max() < right
        added = image.read(0, 1024, 0, 800).astype(np.int64) - plain.read(0, 1024, 0, 800)
        if kind == "cluster":  # as bright in total as its blurred twin
            assert (added[mask] > 300).sum() >= 8
        else:
            assert added[mask].mean() > 60
        far = np.ones_like(mask)
        reach = bottom - top
        far[max(top - reach, 0) : bottom + reach, max(left - reach, 0) : right + reach] = False
        assert not added[far].any()


@pytest.mark.parametrize(
    "options",
    [{"view": "ML"}, {"symmetry": 1.5}, {"lesions": ("cyst",)}, {"lesions": ("mass", "mass")}, {"height": 100}],
)
def test_impossible_phantoms(options: dict) -> None:
    with pytest.raises(DataError):
        PhantomImage(**{"height": 256, "width": 200, "seed": 1, **options})


def exams(folder: Path, **options: object) -> list[Record]:
    chosen = {"patients": 6, "height": 320, "width": 256, "breasts": 2, "lesions": LESIONS, "seed": 4, **options}
    return read_table(write_phantoms(folder, **chosen)).records  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("file_format", ["dicom", "tiff"])
def test_exams_of_four_views(tmp_path: Path, file_format: str) -> None:
    records = exams(tmp_path, file_format=file_format, masks=True)
    assert len(records) == 24
    kinds = []
    for first in range(0, 24, 4):
        exam = records[first : first + 4]
        assert {(record.laterality, record.view) for record in exam} == {(s, v) for s in "LR" for v in ("CC", "MLO")}
        assert len({record.patient_id for record in exam}) == 1
        assert {record.label for record in exam} == ({0} if first % 8 == 0 else {0, 1})
        affected = [record for record in exam if record.label]
        assert len({record.laterality for record in affected}) == len(affected) // 2  # both views of one breast
        kinds += [finding.kind for record in affected for finding in record.findings]
        for record in exam:
            assert record.labels == {kind: float(kind in [f.kind for f in record.findings]) for kind in LESIONS}
            assert len(record.findings) == record.label
    assert kinds == ["cluster"] * 2 + ["mass"] * 2 + ["asymmetry"] * 2
    # Boxes and masks are in pixels of the file; every pixel of a mask lies in its box.
    for record in records:
        for finding in record.findings:
            assert finding.mask is not None and finding.box is not None
            mask = whole(finding.mask)
            top, bottom, left, right = finding.box
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            stored = whole(record.path, flip=False)
            assert stored.shape == mask.shape
            assert (stored[mask > 0] > 0).mean() > 0.9
            side = stored[:, :128].sum() > stored[:, 128:].sum()
            assert side == (record.laterality == "L")


def test_formats_hold_the_same_image(tmp_path: Path) -> None:
    image = PhantomImage(700, 600, seed=2, lesions=("mass",))
    write_dicom(tmp_path / "a.dcm", image, patient="P", study="1", laterality="R", view="CC", threads=2)
    write_tiff(tmp_path / "a.tif", image, laterality="R", threads=2)
    expected = image.read(0, 700, 0, 600)[:, ::-1]
    np.testing.assert_array_equal(dcmread(tmp_path / "a.dcm").pixel_array, expected)
    stored = np.rint(whole(tmp_path / "a.tif") * 65535).astype(np.uint16)
    np.testing.assert_array_equal(stored, expected << 4 | expected >> 8)
    assert abs(whole(tmp_path / "a.tif") - whole(tmp_path / "a.dcm", flip=False)).max() < 2**-15


def test_workers_and_threads_change_no_byte(tmp_path: Path) -> None:
    def content(folder: str, workers: int, patients: int) -> dict[str, bytes]:
        exams(tmp_path / folder, workers=workers, patients=patients, masks=True)
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        return {path.relative_to(tmp_path / folder).as_posix(): path.read_bytes() for path in files}

    assert content("a", 1, 2) == content("b", 2, 2)  # processes
    assert content("c", 1, 1) == content("d", 4, 1)  # threads


def test_nothing_of_the_image_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = PhantomImage(3000, 2500, seed=2)
    areas: list[int] = []
    read = image.read
    monkeypatch.setattr(image, "read", lambda *r: (areas.append((r[1] - r[0]) * (r[3] - r[2])), read(*r))[1])
    write_tiff(tmp_path / "a.tif", image, laterality="L")
    assert max(areas) == 512 * 512
    assert sum(areas) == 3000 * 2500
    areas.clear()
    write_dicom(tmp_path / "a.dcm", image, patient="P", study="1", laterality="L", view="CC")
    rows, columns = phantom_files._STRIP
    assert max(areas) == rows * columns
    assert sum(areas) == 3000 * 2500
    assert math.prod(open_pixels(tmp_path / "a.dcm").shape) == 3000 * 2500


def test_what_dicom_cannot_hold_is_told(tmp_path: Path) -> None:
    for height, width in ((65536, 200), (65535, 65535)):
        image = PhantomImage(height, width, seed=2)
        with pytest.raises(DataError, match=f"{height} x {width} pixels exceed a DICOM frame; write phantoms as tiff"):
            write_dicom(tmp_path / "a.dcm", image, patient="P", study="1", laterality="L", view="CC")
    with pytest.raises(DataError, match="exceed a DICOM frame"):
        write_phantoms(tmp_path, patients=1, height=65536, width=200)
    assert not list((tmp_path / "images").iterdir())
    with pytest.raises(DataError, match="one patient and one kind"):
        write_phantoms(tmp_path, patients=1, lesions=())


def test_lesions_of_a_volume_are_in_a_few_slices():
    """Near its depth a lesion is as in the mammogram, elsewhere it is absent; textures differ."""
    count, sound = 24, PhantomImage(256, 192, seed=5)
    ill = PhantomImage(256, 192, seed=5, lesions=["mass"])
    top, bottom, left, right = ill.lesions[0].box
    middle = int(ill.depth * count)
    added = []
    for number in range(count):
        with_mass, without = (one.at_slice(number, count).read(0, 256, 0, 192).astype(float) for one in (ill, sound))
        assert ((with_mass > 0) == (ill.read(0, 256, 0, 192) > 0)).all()
        added.append((with_mass - without)[top:bottom, left:right].mean())
    whole = (ill.read(top, bottom, left, right).astype(float) - sound.read(top, bottom, left, right)).mean()
    assert added[middle] > 0.8 * whole and sum(one > 0.1 * whole for one in added) <= 7
    apart = [abs(number - middle) > 6 for number in range(count)]
    assert max(one for one, far in zip(added, apart, strict=True) if far) < 0.01 * whole
    one, two = (ill.at_slice(number, count).read(0, 256, 0, 192).ravel() for number in (middle, middle + 8))
    assert 0.5 < np.corrcoef(one, two)[0, 1] < 0.999
