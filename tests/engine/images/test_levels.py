"""White levels and sides of files that do not say them themselves."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from image_files import picture, write_dicom, write_pgm

from gigamorph.engine.datasets.dataset import ImageDataset, open_record
from gigamorph.engine.datasets.grey import grey_warnings
from gigamorph.engine.datasets.preview import preview
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError
from gigamorph.engine.images.batches import PixelBatch, StoredBatch
from gigamorph.engine.images.levels import parse_white
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize


def whole(source) -> np.ndarray:
    return source.read(0, source.shape[1], 0, source.shape[2]).numpy()


def save(path: Path, pixels: np.ndarray) -> Path:
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(pixels))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, pixels, tile=(16, 16), compression="zlib", photometric="minisblack")
    elif path.suffix == ".pgm":
        write_pgm(path, pixels)
    else:
        np.save(path, pixels)
    return path


@pytest.mark.parametrize("white", [0, -1, float("nan"), float("inf"), "bright", "4095"])
def test_levels_that_are_none_are_refused(white: float | str) -> None:
    with pytest.raises(DataError, match="must be 'auto' or a positive number"):
        open_pixels(np.zeros((4, 5), np.uint16), white=white)


@pytest.mark.parametrize("laterality", ["left", "r", "", "X"])
def test_sides_that_are_none_are_refused(laterality: str) -> None:
    with pytest.raises(DataError, match="must be 'L' or 'R'"):
        open_pixels(np.zeros((4, 5), np.uint16), laterality=laterality)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".npy"])
@pytest.mark.parametrize("white", [4095.0, "auto"])
def test_twelve_bits_in_sixteen(tmp_path: Path, suffix: str, white: float) -> None:
    pixels = picture(12)
    path = save(tmp_path / f"x{suffix}", pixels)
    source = open_pixels(path, white=white)
    np.testing.assert_array_equal(whole(source)[0], pixels.astype(np.float32) / np.float32(4095))
    assert "grey 0 to 4095 as 0 to 1" in source.steps
    assert whole(open_pixels(path)).max() < 1 / 16
    # The batch that is converted on the device gives the same bits.
    stored = StoredBatch.of(PixelBatch([source]))
    assert stored is not None
    region = 0, pixels.shape[0], 0, pixels.shape[1]
    torch.testing.assert_close(stored.develop(stored.read(*region))[0], source.read(*region), rtol=0, atol=0)
    np.testing.assert_array_equal(whole(source.as_stored), whole(source))


@pytest.mark.parametrize(
    ("dtype", "most", "white"),
    [
        (np.uint16, 900, 1023),
        (np.uint16, 1024, 4095),
        (np.uint16, 9000, 16383),
        (np.uint16, 16384, 65535),
        (np.uint8, 12, 255),
        (np.float32, 0.3, 1),
        (np.float32, 200, 255),
        (np.float32, 1e6, 1e6),
    ],
)
def test_auto_is_the_least_depth_that_holds_the_image(tmp_path: Path, dtype: type, most: float, white: float) -> None:
    pixels = np.zeros((40, 30), dtype)
    pixels[37, 11] = most
    assert open_pixels(save(tmp_path / "x.npy", pixels), white="auto").full == white


def test_white_is_zero_in_some_tiff_files(tmp_path: Path) -> None:
    pixels = picture(12)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="miniswhite")
    for white in (4095, "auto"):
        grey = whole(open_pixels(tmp_path / "x.tif", white=white))[0]
        np.testing.assert_allclose(grey, 1 - pixels / 4095, atol=1e-7)


def test_what_is_brighter_than_white_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", picture(12))
    with pytest.raises(DataError, match=r"x\.png: contains 4095, above white 1023; use a larger white level"):
        whole(open_pixels(path, white=1023))
    for wrong in ("0", "-4095", "nan", "inf", "white"):
        with pytest.raises(DataError, match="must be auto or a positive number"):
            parse_white(wrong)
    assert (parse_white("Auto"), parse_white("4095")) == ("auto", 4095.0)


def test_dicom_says_itself(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x.dcm", picture(12))
    plain = open_pixels(path)
    told = open_pixels(path, white=100, laterality="R")
    np.testing.assert_array_equal(whole(told), whole(plain))
    assert told.steps == plain.steps


def breast(side: str, *, background: int = 0) -> np.ndarray:
    """A half disc on one side."""
    rows, columns = np.ogrid[:60, :40]
    pixels = np.where((rows - 30) ** 2 + columns**2 < 25**2, 3000, background).astype(np.uint16)
    pixels[5, 2] = 4000  # a mark in a corner
    return pixels if side == "left" else pixels[:, ::-1].copy()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("laterality", ["L", "R"])
def test_the_chest_wall_comes_to_the_left(tmp_path: Path, suffix: str, side: str, laterality: str) -> None:
    """By where the breast is, so that images which were mirrored before are not mirrored again."""
    path = save(tmp_path / f"x{suffix}", breast(side))
    record = Record(path, 0, "p", laterality=laterality, white=4095)
    source = open_record(record)
    np.testing.assert_array_equal(whole(source)[0], breast("left") / np.float32(4095))
    assert (source.to_original.xx < 0) == (side == "right")
    np.testing.assert_array_equal(whole(source.as_stored)[0], breast(side) / np.float32(4095))
    assert any("mirrored left-right (chest wall left" in step for step in source.steps) == (side == "right")
    # Without a side in the table nothing says that it is a mammogram.
    np.testing.assert_array_equal(whole(open_pixels(path, white=4095))[0], breast(side) / np.float32(4095))
    # What the table says of the chest wall counts first.
    for wall in ("left", "right"):
        told = open_record(Record(path, 0, "p", laterality=laterality, white=4095, chest_wall=wall))
        expected = breast(side) if wall == "left" else breast(side)[:, ::-1]
        np.testing.assert_array_equal(whole(told)[0], expected / np.float32(4095))


def test_an_unclear_image_is_mirrored_as_the_breast_is_hung(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", np.tile(np.arange(30, dtype=np.uint8) % 7 * 20, (40, 1)))
    stored = whole(open_pixels(path))
    np.testing.assert_array_equal(whole(open_pixels(path, laterality="L")), stored)
    np.testing.assert_array_equal(whole(open_pixels(path, laterality="R")), stored[:, :, ::-1])


def test_a_data_set_takes_the_tables_level_before_its_own(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", picture(12))
    records = [Record(path, 0, "p"), Record(path, 0, "p", white=8190)]
    greatest = [float(item["image"].read(0, 37, 0, 53).max()) for item in ImageDataset(records, white=4095)]
    assert greatest == [1.0, 0.5]


@pytest.mark.parametrize(
    ("pixels", "options", "told"),
    [
        (picture(12), {}, ["x.npy (and 1 more of 2 checked images): grey values reach only 4095 of 65535, "]),
        (picture(12), {"white": 4095.0}, []),
        (picture(14), {}, []),
        (
            picture(8).astype(np.float32),
            {},
            ["grey values reach 255, but white is 1; set the white level: --white 255,"],
        ),
        (picture(8), {"normalize": Normalize((0.2,), (0.2,))}, []),
        (picture(8), {"normalize": Normalize((128.0,), (1.0,))}, ["mean 128 is outside the grey range; "]),
        (picture(8), {"normalize": Normalize((128.0,), (64.0,))}, ["mean 128 is outside", "std 64 exceeds the"]),
        (picture(12), {"normalize": Normalize((7048.0,), (12005.0,)), "white": 4095.0}, ["mean 7048", "std 12005"]),
    ],
)
def test_what_cannot_be_the_scale_of_the_images_is_told(
    tmp_path: Path, pixels: np.ndarray, options: dict, told: list[str]
) -> None:
    path = save(tmp_path / "x.npy", pixels)
    found = grey_warnings(ImageDataset([Record(path, 0, "p")] * 2, **options))
    assert len(found) == len(told)
    assert all(part in text for part, text in zip(told, found, strict=True))
    assert grey_warnings(ImageDataset([])) == []


def test_a_preview_tells(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", picture(12))
    assert "--white 4095" in preview(open_pixels(path, normalize=Normalize((0.5,), (0.25,)))).warnings[0]
    assert preview(open_pixels(path, white=4095)).warnings == ()
