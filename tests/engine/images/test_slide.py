"""Whole-slide DICOM, read by region against the image that was cut into tiles."""

import pickle
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from image_files import EXPLICIT, JPEG, LOSSLESS, RLE, cached_tiles, encode, picture, write_dicom, write_slide

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.dicom import open_dicom
from gigamorph.engine.images.header import read_info
from gigamorph.engine.images.open import open_pixels

GREY = picture(12, (45, 70))
COLOUR = picture(8, (45, 70, 3))


def whole(path: Path, **options) -> np.ndarray:
    stored = open_pixels(path, **options).stored
    return stored.read(0, stored.shape[1], 0, stored.shape[2])


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("sparse", [False, True])
def test_grey_slides_are_bit_exact(tmp_path: Path, syntax: str, sparse: bool) -> None:
    path = write_slide(tmp_path / "s.dcm", GREY, (16, 32), syntax, 12, sparse=sparse)
    source = open_pixels(path)
    assert source.shape == (1, 45, 70)
    np.testing.assert_array_equal(whole(path)[0], GREY)
    region = pickle.loads(pickle.dumps(source)).read(11, 40, 20, 69).numpy()[0]
    np.testing.assert_array_equal(region, (GREY[11:40, 20:69] / 4095).astype(np.float32))


@pytest.mark.parametrize("syntax", [EXPLICIT, RLE, JPEG + "80", JPEG + "90"])
def test_colour_slides_are_bit_exact(tmp_path: Path, syntax: str) -> None:
    path = write_slide(tmp_path / "s.dcm", COLOUR, (16, 32), syntax)
    np.testing.assert_array_equal(whole(path), COLOUR.transpose(2, 0, 1))
    assert open_pixels(path).shape == (3, 45, 70)


def test_jpeg_colour_slides_are_what_the_codec_says(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.dcm", COLOUR, (16, 32), JPEG + "50", PhotometricInterpretation="YBR_FULL_422")
    tile = imagecodecs.jpeg8_decode(encode(COLOUR[16:32, 32:64], JPEG + "50", 8))
    np.testing.assert_array_equal(whole(path)[:, 16:32, 32:64], tile.transpose(2, 0, 1))
    assert np.abs(tile.astype(int) - COLOUR[16:32, 32:64]).mean() < 20


def test_uncompressed_colour_plane_by_plane(tmp_path: Path) -> None:
    planes = COLOUR[:32, :64].transpose(2, 0, 1)
    tiles = np.stack([planes[:, y : y + 16, x : x + 32] for y in (0, 16) for x in (0, 32)])
    path = write_slide(tmp_path / "s.dcm", COLOUR[:32, :64], (16, 32), PlanarConfiguration=1, PixelData=b"")
    write_slide(path, COLOUR[:32, :64], (16, 32), PlanarConfiguration=1)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - tiles.nbytes] + tiles.tobytes())
    np.testing.assert_array_equal(whole(path), planes)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422"])
def test_jpeg_without_a_colour_mark_follows_the_header(tmp_path: Path, photometric: str) -> None:
    """Neither JFIF nor Adobe segment: PhotometricInterpretation alone says what the components are."""
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    smooth[..., 1] = 255 - smooth[..., 1]
    space = "RGB" if photometric == "RGB" else "YCBCR"
    stream = imagecodecs.jpeg8_encode(smooth, level=95, colorspace="RGB", outcolorspace=space)
    for mark in (b"\xff\xe0", b"\xff\xee"):  # APP0, APP14
        if mark in stream[:40]:
            place = stream.index(mark)
            stream = stream[:place] + stream[place + 2 + int.from_bytes(stream[place + 2 : place + 4], "big") :]
    assert b"JFIF" not in stream
    assert b"Adobe" not in stream
    path = write_slide(tmp_path / "s.dcm", smooth, (32, 32), JPEG + "50", PhotometricInterpretation=photometric)
    data, old = path.read_bytes(), encode(smooth, JPEG + "50", 8)
    assert old in data
    head = data[: data.index(old) - 4]
    length = len(stream) + len(stream) % 2
    stream = stream + b"\0" * (length - len(stream))
    path.write_bytes(head + length.to_bytes(4, "little") + stream + b"\xfe\xff\xdd\xe0\0\0\0\0")
    got = whole(path).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - smooth).mean() < 4


def test_focal_planes(tmp_path: Path) -> None:
    planes = np.stack([GREY, GREY[::-1], GREY[:, ::-1]])
    for sparse in (False, True):
        path = write_slide(tmp_path / "s.dcm", planes, (16, 32), JPEG + "80", 12, sparse=sparse)
        with pytest.raises(DataError, match=r"s\.dcm: has 3 focal planes"):
            open_pixels(path)
        with pytest.raises(DataError, match="plane 3 does not exist"):
            open_pixels(path, frame=3)
        for number, plane in enumerate(planes):
            np.testing.assert_array_equal(whole(path, frame=number)[0], plane)


def test_tiles_left_out_are_background(tmp_path: Path) -> None:
    for image, background in ((COLOUR, 255), (GREY, 0)):
        bits = 8 if image is COLOUR else 12
        path = write_slide(tmp_path / "s.dcm", image, (16, 32), JPEG + "80", bits, sparse=True, skip=((1, 0), (2, 2)))
        expected = image.copy()
        expected[16:32, :32] = expected[32:, 64:] = background
        got = whole(path)
        np.testing.assert_array_equal(got.transpose(1, 2, 0) if bits == 8 else got[0], expected)


def test_only_touched_tiles_are_decoded_and_kept(tmp_path: Path) -> None:
    source = open_pixels(write_slide(tmp_path / "s.dcm", GREY, (16, 32), JPEG + "80", 12))
    source.read(17, 30, 33, 60)
    assert cached_tiles(source.stored._grid) == [(1, 1)]
    source.read(15, 17, 31, 33)
    assert sorted(cached_tiles(source.stored._grid)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 8}, "8 frames do not fill 3 x 3 tiles"),
        ({"TotalPixelMatrixRows": 4500}, "9 frames do not fill 282 x 3 tiles"),
        ({"PhotometricInterpretation": "YBR_FULL_422"}, "YBR_FULL_422 with 1 samples is not supported"),
    ],
)
def test_slides_that_do_not_add_up(tmp_path: Path, elements: dict, message: str) -> None:
    path = write_slide(tmp_path / "s.dcm", GREY, (16, 32), JPEG + "80", 12, **elements)
    with pytest.raises(DataError, match=message) as error:
        open_pixels(path)
    assert str(path) in str(error.value)


def test_sparse_slides_that_do_not_add_up(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.dcm", GREY, (16, 32), sparse=True, TotalPixelMatrixRows=2**30)
    with pytest.raises(DataError, match="too few"):
        open_pixels(path)
    path = write_slide(tmp_path / "s.dcm", GREY, (16, 32), sparse=True, TotalPixelMatrixRows=20)
    with pytest.raises(DataError, match="is not on the grid of tiles"):
        open_pixels(path)


def test_a_slide_of_100_000_tiles_is_indexed_by_its_table(tmp_path: Path) -> None:
    """With a table of offsets the file is not searched from end to end: only the last frame is looked at."""
    path = write_dicom(tmp_path / "s.dcm", np.zeros((2, 8, 8), np.uint8), RLE, 8)
    info = read_info(path)
    assert info.matrix is None
    tiles = np.arange(400 * 4, dtype=np.uint8).reshape(400, 2, 2)
    image = tiles.reshape(20, 20, 2, 2).transpose(0, 2, 1, 3).reshape(40, 40)
    path = write_slide(tmp_path / "s.dcm", image, (2, 2), RLE)
    data = bytearray(path.read_bytes())
    place = data.index(encode(tiles[5], RLE, 8)) - 8
    data[place : place + 4] = b"\1\2\3\4"  # a damaged item in the middle shows when its tile is read
    path.write_bytes(bytes(data))
    slide = open_dicom(path)
    np.testing.assert_array_equal(slide.read(2, 40, 0, 40)[0], image[2:])
    with pytest.raises(DataError, match=r"s\.dcm: frame 5 is damaged"):
        slide.read(0, 2, 0, 40)
