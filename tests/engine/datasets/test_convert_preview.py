"""What the network sees, as files, as figures and as a picture."""

from dataclasses import replace
from pathlib import Path

import imagecodecs
import lookalikes
import numpy as np
import pydicom
import pytest

from gigamorph.engine.datasets.dataset import open_record
from gigamorph.engine.datasets.preview import preview, thumbnail, write_preview
from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict.convert import convert_images
from gigamorph.engine.predict.options import RunOptions


def whole(path: Path, **options: object) -> np.ndarray:
    source = open_pixels(path, **options)  # pyright: ignore[reportArgumentType]
    return source.read(0, source.shape[1], 0, source.shape[2]).numpy()


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("p")
    table = write_phantoms(folder, patients=4, height=600, width=530, breasts=2, masks=True, lesions=("mass",))
    return read_table(table).records


@pytest.mark.parametrize("file_format", ["tiff", "png"])
def test_images_boxes_and_masks_move_together(phantoms: list[Record], tmp_path: Path, file_format: str) -> None:
    records, errors, found = convert_images(phantoms, tmp_path, file_format=file_format)  # pyright: ignore[reportArgumentType]
    assert errors == []
    assert found.done == len(records) == 16 and found.complete
    affected = 0
    for before, after in zip(phantoms, records, strict=True):
        assert (after.label, after.patient_id, after.split) == (before.label, before.patient_id, before.split)
        seen = whole(before.path)
        np.testing.assert_array_equal(np.rint(whole(after.path) * 65535), np.rint(seen * np.float64(65535)))
        assert after.extra["steps"].endswith("(chest wall left, feet down)") == (before.laterality == "R")
        for old, new in zip(before.findings, after.findings, strict=True):
            affected += 1
            assert old.box is not None and new.box is not None and old.mask is not None and new.mask is not None
            top, bottom, left, right = new.box
            assert (bottom - top, right - left) == (old.box[1] - old.box[0], old.box[3] - old.box[2])
            mask = whole(new.mask)[0] > 0
            expected = whole(old.mask)[0] > 0
            np.testing.assert_array_equal(mask, expected if before.laterality == "L" else expected[:, ::-1])
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
    assert affected == 4
    assert not list(tmp_path.rglob("*.part"))


def test_outlines_move_and_names_stay_apart(tmp_path: Path) -> None:
    paths = [lookalikes.dicom(tmp_path / folder / "1-1.dcm", PatientOrientation=["P", "L"]) for folder in "ab"]
    finding = Finding(outline=((1.0, 2.0), (3.0, 4.0), (5.0, 2.5)), box=(1, 6, 2, 5))
    records, _, _ = convert_images([Record(path, 0, "p", findings=(finding,)) for path in paths], tmp_path / "out")
    assert [record.path.name for record in records] == ["1-1.tif", "1-1-2.tif"]
    assert [record.extra["source"] for record in records] == ["a/1-1.dcm", "b/1-1.dcm"]
    assert records[0].findings[0].outline == ((1.0, 38.0), (3.0, 36.0), (5.0, 37.5))
    assert records[0].findings[0].box == (1, 6, 35, 38)


def test_bad_images_are_left_out_and_named(phantoms: list[Record], tmp_path: Path) -> None:
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(phantoms[0].path.read_bytes()[:9000])
    mask = tmp_path / "mask.png"
    mask.write_bytes(imagecodecs.png_encode(np.zeros((3, 3), np.uint8)))
    masks = mask, tmp_path / "absent.png"
    bad = [Record(cut, 0, "p"), *(Record(phantoms[1].path, 0, "p", findings=(Finding(mask=m),)) for m in masks)]
    options = RunOptions("", max_failures=1.0, workers=0)
    records, errors, _ = convert_images([bad[0], phantoms[0], *bad[1:]], tmp_path / "out", options=options)
    assert [record.path.stem for record in records] == [phantoms[0].path.stem]
    assert "cut.dcm: is truncated" in errors[0]
    assert "mask.png: is 3 x 3, but its image 600 x 530" in errors[1]
    assert "absent.png: cannot be read (No such file or directory)" in errors[2]


@pytest.mark.parametrize("file_format", ["tiff", "png"])
def test_pixels_that_are_no_numbers_are_refused_by_name(tmp_path: Path, file_format: str) -> None:
    image = tmp_path / "nan.npy"
    np.save(image, np.array([[0.5, np.nan]], np.float32))
    with pytest.raises(DataError, match=r"nan.npy: contains NaN or infinite pixels"):
        preview(open_pixels(image))
    record = Record(image, 0, "p")
    records, errors, _ = convert_images(
        [record],
        tmp_path / "out",
        file_format=file_format,  # pyright: ignore[reportArgumentType]
        options=RunOptions("", max_failures=1.0, workers=0),
    )
    assert records == [] and "nan.npy: contains NaN or infinite pixels" in errors[0]
    assert not list((tmp_path / "out" / "images").iterdir())


def test_files_of_one_name_are_called_after_patient_side_and_view(tmp_path: Path) -> None:
    """As TCIA's downloads, in which every series begins with 1-1.dcm."""
    views = [("P_00001", "L", "CC"), ("P_00001", "L", "MLO"), ("P 2/a", "R", "CC"), ("P 2/a", "R", "CC")]
    paths = [lookalikes.dicom(tmp_path / "in" / f"{n}" / "1-1.dcm") for n in range(4)]
    records = [Record(path, 0, *names[:1], None, *names[1:]) for path, names in zip(paths, views, strict=True)]
    records.append(Record(lookalikes.dicom(tmp_path / "in" / "4" / "own.dcm"), 0, "p", None, "L", "CC"))
    found, _, _ = convert_images(records, tmp_path / "out")
    assert [record.path.stem for record in found] == [
        "P_00001_L_CC",
        "P_00001_L_MLO",
        "P_2_a_R_CC",
        "P_2_a_R_CC-2",
        "own",
    ]
    assert [record.extra["source"] for record in found][-2:] == ["3/1-1.dcm", "4/own.dcm"]


def test_what_is_converted_is_not_mirrored_again(phantoms: list[Record], tmp_path: Path) -> None:
    """A table of PNG files says the side of the breast, and images that are mirrored already lie differently."""
    records, _, _ = convert_images(phantoms[:8], tmp_path)
    table = read_table(write_table(tmp_path / "t.csv", records, ["0", "1"])).records
    for before, after in zip(phantoms, table, strict=False):
        assert (after.chest_wall, after.white) == ("left", None)
        seen, again = (open_record(record).read(0, 600, 0, 530).numpy() for record in (before, after))
        np.testing.assert_array_equal(np.rint(again * 65535), np.rint(seen * np.float64(65535)))
    # Images that were never converted come to the same side.
    stored = open_record(phantoms[-1], flip=False).read(0, 600, 0, 530)[0].numpy()
    np.save(tmp_path / "x.npy", stored)
    assert phantoms[-1].laterality == "R"
    plain = open_record(Record(tmp_path / "x.npy", 0, "p", laterality="R")).read(0, 600, 0, 530)[0].numpy()
    np.testing.assert_array_equal(plain, stored[:, ::-1])
    assert not list((tmp_path / "out").rglob("*.part"))
    (tmp_path / "file").touch()
    with pytest.raises(GigamorphError, match="cannot be written"):
        convert_images(phantoms[:1], tmp_path / "file")


def test_a_conversion_goes_on_where_it_was_and_is_shared_out(phantoms: list[Record], tmp_path: Path) -> None:
    """As a prediction does; records are the same as those of one run, masks and boxes too."""
    few = phantoms[:5]
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(few[0].path.read_bytes()[:9000])
    given = [*few[:2], Record(cut, 0, "p"), *few[2:], few[0]]
    whole, _, _ = convert_images(given, tmp_path / "whole")
    here = RunOptions("", workers=0)
    with pytest.raises(DataError, match=r"cut\.dcm: is truncated"):
        convert_images(given, tmp_path / "out", options=here)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert len(written) == 2
    with pytest.raises(GigamorphError, match="was started with --images tiff; continue with it"):
        convert_images(given, tmp_path / "out", file_format="png", options=replace(here, resume=True))
    forgiving = replace(here, max_failures=0.5, resume=True)
    records, errors, found = convert_images(given, tmp_path / "out", options=forgiving)
    assert found.computed == 3 and len(errors) == 1 and "cut.dcm" in errors[0]
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())

    def below(found: list[Record]) -> list[Record]:
        return [replace(record, path=Path(record.path.name), findings=()) for record in found]

    assert below(records) == below(whole) and len(records) == 6 and records[0] == records[-1]
    assert [[f.box for f in r.findings] for r in records] == [[f.box for f in r.findings] for r in whole]
    shared = [
        convert_images(given, tmp_path / "shards", options=replace(forgiving, shard=(number, 2))) for number in (1, 2)
    ]
    assert [found.complete for _, _, found in shared] == [False, True] and below(shared[1][0]) == below(whole)


@pytest.mark.parametrize("file_format", ["tiff", "png"])
def test_no_identifier_gets_into_what_is_written(tmp_path: Path, file_format: str) -> None:
    path = lookalikes.dicom(tmp_path / "x.dcm", **lookalikes.SECRETS)
    convert_images([Record(path, 0, "p")], tmp_path / "out", file_format=file_format)  # pyright: ignore[reportArgumentType]
    write_preview(open_pixels(path), tmp_path / "out" / "preview.png")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix in (".tif", ".png")]) == 2
    for file in files:
        content = file.read_bytes()
        assert [value for value in lookalikes.SECRETS.values() if value.encode() in content] == []
    assert "Jane" not in repr(preview(open_pixels(path)))


def test_figures(phantoms: list[Record]) -> None:
    normalize = Normalize((0.3,), (0.1,))
    record = next(record for record in phantoms if record.laterality == "R")
    source = open_pixels(record.path, normalize=normalize)
    seen, pixels = preview(source), whole(record.path, normalize=normalize).astype(np.float64)
    assert (seen.shape, seen.steps) == (source.shape, source.steps)
    np.testing.assert_allclose([seen.mean, seen.std], [pixels.mean(), pixels.std()], rtol=1e-9)
    assert (seen.least, seen.most) == (pixels.min(), pixels.max())
    assert seen.black == (whole(record.path) == 0).mean()
    assert seen.white == 0
    assert seen.warnings == ()


@pytest.mark.parametrize(
    ("grey", "normalize", "warnings"),
    [
        (np.full((30, 30), 128, np.uint8), Normalize(), ["all pixels are equal"]),
        (np.tile(np.array([0, 255], np.uint8), (30, 15)), Normalize(), ["50.0% of the pixels are white"]),
        (np.pad(np.full((3, 3), 99, np.uint8), 20), Normalize(), ["99.5% of the pixels are black"]),
        (
            np.tile(np.array([0, 90], np.uint8), (30, 15)),
            Normalize((0.5,), (0.01,)),
            ["values reach -50: mean and std"],
        ),
    ],
)
def test_warnings(grey: np.ndarray, normalize: Normalize, warnings: list[str]) -> None:
    found = preview(open_pixels(grey, normalize=normalize)).warnings
    assert len(found) == len(warnings)
    for text, expected in zip(found, warnings, strict=True):
        assert text.startswith(expected)


def test_preview_png_holds_what_the_network_sees(phantoms: list[Record], tmp_path: Path) -> None:
    record = next(record for record in phantoms if record.laterality == "R")
    source = open_pixels(record.path, normalize=Normalize((0.3,), (0.1,)))
    assert write_preview(source, tmp_path / "x" / "p.png") == "every pixel"
    stored = pydicom.dcmread(record.path).pixel_array[:, ::-1] / 4095
    picture = imagecodecs.png_decode((tmp_path / "x" / "p.png").read_bytes())
    assert picture.dtype == np.uint16
    assert abs(picture / 65535 - stored).max() < 1.01 / 65535


def test_large_previews_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (100, 90), dtype=np.uint16)
    monkeypatch.setattr("gigamorph.engine.datasets.preview.PNG_PIXELS", 1000)
    assert write_preview(open_pixels(grey), tmp_path / "p.png") == "mean over blocks of 3 x 3 pixels"
    picture = imagecodecs.png_decode((tmp_path / "p.png").read_bytes())
    expected = grey[:99].reshape(33, 3, 30, 3).mean((1, 3))
    assert abs(picture - expected).max() <= 1


def test_thumbnail_fits_and_averages() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (101, 60), dtype=np.uint8)
    small = thumbnail(open_pixels(grey, normalize=Normalize((0.4,), (0.2,))), 20, 30)
    assert small.shape == (25, 15)
    expected = grey[:100].reshape(25, 4, 15, 4).mean((1, 3))
    assert abs(small - expected).max() <= 0.51
    assert thumbnail(open_pixels(grey[:3, :3]), 20, 30).shape == (3, 3)
