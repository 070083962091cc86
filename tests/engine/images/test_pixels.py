"""Pixel sources: every format and layout, regions against the whole, memory, damage."""

import gzip
import json
import pickle
import resource
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grown_memory
import image_files
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from forked import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.pixels import Normalize, PixelSource
from gigamorph.engine.images.tiles import CACHE
from gigamorph.engine.mammography.phantom import write_phantoms

GREY = np.random.default_rng(0).integers(0, 65536, (151, 117), dtype=np.uint16)
COLOUR = np.random.default_rng(1).integers(0, 256, (101, 77, 3), dtype=np.uint8)
# Smooth enough for JPEG to keep it.
SHADED = np.stack([np.add.outer(np.arange(101), np.arange(77)) + k for k in (0, 30, 60)], -1).astype(np.uint8)
SMOOTH = np.linspace(-1, 2, 151 * 117).reshape(151, 117)


def planes(array: np.ndarray) -> np.ndarray:
    """What a source of this array is expected to deliver."""
    full = np.float32(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else np.float32(1)
    array = array.astype(np.float32) / full
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _npy(array: np.ndarray) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        np.save(path.with_suffix(".npy"), array)
        return path.with_suffix(".npy")

    return write


def _png(array: np.ndarray) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array)))
        return path

    return write


def _tiff(array: np.ndarray, **options) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        tifffile.imwrite(path, array, **options)
        return path

    return write


def _dicom(path: Path) -> Path:
    write_phantoms(path, patients=2, height=160, width=120, fractions=(0.5, 0.5, 0.0))
    return sorted(path.glob("images/*.dcm"))[0]


def _pyramid(path: Path) -> Path:
    """A tiled image, then a thumbnail and two lower resolutions of it, as Aperio's SVS has them."""
    with tifffile.TiffWriter(path) as tif:
        options = {"compression": "zlib", "metadata": None}
        tif.write(GREY, tile=(32, 48), description="Aperio Image Library v1\n117x151", **options)
        tif.write(GREY[::8, ::8], description="Aperio thumbnail", **options)
        tif.write(GREY[::2, ::2], tile=(32, 48), description="Aperio level", **options)
        tif.write(GREY[::4, ::4], tile=(32, 48), description="Aperio level", **options)
        tif.write(COLOUR, photometric="rgb", description="Aperio label", subfiletype=1, **options)
    return path


RGB = {"photometric": "rgb"}
KINDS: dict[str, tuple[np.ndarray | None, Callable[[Path], Path] | np.ndarray | torch.Tensor]] = {
    "npy": (planes(GREY), _npy(GREY)),
    "npy big endian": (planes(GREY), _npy(GREY.astype(">u2"))),
    "npy fortran": (planes(GREY), _npy(np.asfortranarray(GREY))),
    "npy float64": (planes(SMOOTH), _npy(SMOOTH)),
    "npy float16": (planes(SMOOTH.astype(np.float16)), _npy(SMOOTH.astype(np.float16))),
    "npy bool": (planes(GREY % 2 == 0), _npy(GREY % 2 == 0)),
    "npy HWC": (planes(COLOUR), _npy(COLOUR)),
    "npy CHW": (planes(COLOUR), _npy(COLOUR.transpose(2, 0, 1).copy())),
    "npy HWC fortran": (planes(COLOUR), _npy(np.asfortranarray(COLOUR))),
    "npy HW1": (planes(GREY), _npy(GREY[:, :, None])),
    "png 16 bit": (planes(GREY), _png(GREY)),
    "png 8 bit": (planes(COLOUR[..., 0]), _png(COLOUR[..., 0])),
    "png colour": (planes(COLOUR), _png(COLOUR)),
    "png alpha": (planes(COLOUR), _png(np.dstack([COLOUR, COLOUR[..., :1]]))),
    "tiff": (planes(GREY), _tiff(GREY)),
    "tiff big endian": (planes(GREY), _tiff(GREY, byteorder=">")),
    "tiff big": (planes(GREY), _tiff(GREY, bigtiff=True, tile=(32, 64), compression="zlib")),
    "tiff strips": (planes(GREY), _tiff(GREY, rowsperstrip=17, compression="lzw", predictor=True)),
    "tiff strips big endian": (planes(GREY), _tiff(GREY, rowsperstrip=7, compression="zlib", byteorder=">")),
    "tiff tiles": (planes(GREY), _tiff(GREY, tile=(32, 48))),
    "tiff tiles zlib": (planes(GREY), _tiff(GREY, tile=(32, 48), compression="zlib", predictor=True)),
    "tiff tiles zstd": (planes(GREY), _tiff(GREY, tile=(48, 32), compression="zstd")),
    "tiff tiles jpeg 2000": (planes(GREY), _tiff(GREY, tile=(64, 64), compression="jpeg2000")),
    "tiff float": (planes(SMOOTH.astype(np.float32)), _tiff(SMOOTH.astype(np.float32), tile=(32, 32))),
    "tiff white is zero": (1 - planes(GREY), _tiff(GREY, photometric="miniswhite", tile=(64, 64))),
    "tiff colour": (planes(COLOUR), _tiff(COLOUR, **RGB)),
    "tiff colour tiles": (planes(COLOUR), _tiff(COLOUR, **RGB, tile=(32, 32), compression="zlib")),
    "tiff colour planes": (planes(COLOUR), _tiff(COLOUR.transpose(2, 0, 1).copy(), **RGB, planarconfig="separate")),
    "tiff colour planes tiles": (
        planes(COLOUR),
        _tiff(COLOUR.transpose(2, 0, 1).copy(), **RGB, planarconfig="separate", tile=(32, 32), compression="zlib"),
    ),
    "tiff alpha": (planes(COLOUR), _tiff(np.dstack([COLOUR, COLOUR[..., :1]]), **RGB, tile=(32, 32))),
    "tiff jpeg": (None, _tiff(SHADED, **RGB, tile=(32, 32), compression="jpeg")),
    "tiff jpeg subsampled": (None, _tiff(SHADED, **RGB, compression="jpeg", subsampling=(2, 2))),
    "tiff pyramid": (planes(GREY), _pyramid),
    "tiff 12 bit": (planes(GREY >> 4) * 65535 / 4095, _tiff(GREY >> 4, bitspersample=12, rowsperstrip=11)),
    "jpeg": (None, lambda path: image_files.write_bytes(path, imagecodecs.jpeg8_encode(SHADED))),
    "jpeg-ls": (planes(SHADED), lambda path: image_files.write_bytes(path, imagecodecs.jpegls_encode(SHADED))),
    "jpeg 2000": (planes(GREY), lambda path: image_files.write_bytes(path, imagecodecs.jpeg2k_encode(GREY))),
    "jpeg 2000 colour": (
        planes(COLOUR),
        lambda path: image_files.write_bytes(path, imagecodecs.jpeg2k_encode(COLOUR, codecformat="j2k", mct=True)),
    ),
    "pgm": (planes(GREY), lambda path: image_files.write_pgm(path, GREY)),
    "pgm 8 bit": (planes(COLOUR[..., 0]), lambda path: image_files.write_pgm(path, COLOUR[..., 0])),
    "zarr": (planes(GREY), lambda path: image_files.write_zarr(path, GREY, (32, 48))),
    "zarr 2 colour": (planes(COLOUR), lambda path: image_files.write_zarr(path, COLOUR, (32, 48, 3), version=2)),
    "ome-zarr": (planes(GREY), lambda path: image_files.write_zarr(path, GREY[None], (1, 32, 48), "cyx")),
    "dicom": (None, _dicom),
    "dicom deflated": (None, lambda path: image_files.write_dicom(path, GREY, image_files.DEFLATED, 16)),
    "dicom rle": (planes(GREY), lambda path: image_files.write_dicom(path, GREY, image_files.RLE, 16)),
    "dicom slide": (planes(GREY), lambda path: image_files.write_slide(path, GREY, (32, 48), image_files.RLE)),
    "dicom slide colour": (planes(COLOUR), lambda path: image_files.write_slide(path, COLOUR, (32, 48))),
    "array": (planes(GREY), GREY),
    "array HWC": (planes(COLOUR), COLOUR),
    "array int16": (planes(SMOOTH.astype(np.int16) * 9999), SMOOTH.astype(np.int16) * 9999),
    "array not contiguous": (planes(GREY[::-1, ::2]), GREY[::-1, ::2]),
    "tensor": (planes(SMOOTH), torch.from_numpy(SMOOTH)),
    "tensor uint8": (planes(COLOUR), torch.from_numpy(COLOUR)),
    "tensor bfloat16": (
        torch.from_numpy(SMOOTH).bfloat16().float().numpy()[None],
        torch.from_numpy(SMOOTH).bfloat16(),
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, PixelSource]]:
    """Every kind of source, with all that it is expected to deliver."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for number, (kind, (expected, make)) in enumerate(KINDS.items()):
        source = open_pixels(make(folder / str(number)) if callable(make) else make)
        _, height, width = source.shape
        found[kind] = (source.read(0, height, 0, width).numpy() if expected is None else expected, source)
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(bytes(99), mtime=0), "is a gzip file; unpack it first"),
        (b"PK\3\4" + bytes(99), r"is a zip archive \(.npz files are, too\); unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file; save each image with numpy.save"),
        ((348).to_bytes(4, "little") + bytes(340) + b"n+1\0", "is a NIfTI volume; open it with frame='all'"),
        (b"NRRD0004\n", "is an NRRD file"),
        (b"ObjectType = Image\n", "is a MetaImage file"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "is a WebP file; save it as PNG"),
        (b"<!DOCTYPE html>", "is a web page or XML file, perhaps the error of a download"),
        (
            b"broken",
            "is not a DICOM, PNG, JPEG, JPEG 2000, PGM, TIFF, zarr or .npy file; check the path or convert the file",
        ),
        (b"", "is empty, not a DICOM"),
    ],
)
def test_files_that_are_not_read_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"image.png: {message}"):
        open_pixels(file)


@pytest.mark.parametrize("cut", [0.5, 0.9, 0.99])
def test_a_truncated_jpeg_2000_file_is_refused(cut: float, tmp_path: Path) -> None:
    whole = imagecodecs.jpeg2k_encode(GREY)
    file = tmp_path / "image.jp2"
    file.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(DataError, match=r"image.jp2: (is truncated|damaged)"):
        open_pixels(file).stored.read(0, 8, 0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_image(sources: dict, kind: str) -> None:
    expected, source = sources[kind]
    assert isinstance(source, PixelSource)
    assert source.shape == expected.shape
    whole = source.read(0, source.shape[1], 0, source.shape[2])
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    np.testing.assert_allclose(whole.numpy(), expected, atol=2e-7)
    assert whole.std() > 0.05
    assert len(source.steps) > 1
    assert str(source.stored.dtype).removeprefix("torch.") in {
        *("uint8", "uint16", ">u2", "int16", "bool", "float16", "float32", "float64", "bfloat16")
    }


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_regions_equal_the_whole(sources: dict, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    _, source = sources[kind]
    channels, height, width = source.shape
    whole = source.read(0, height, 0, width)
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
    fresh = pickle.loads(pickle.dumps(source)) if data.draw(st.booleans()) else source
    region = fresh.read(top, bottom, left, right)
    assert region.shape == (channels, bottom - top, right - left)
    assert torch.equal(region, whole[:, top:bottom, left:right])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_flip_channels_and_normalisation(sources: dict, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    expected, source = sources[kind]
    channels = data.draw(st.sampled_from([len(expected), 3]))
    mean = data.draw(st.lists(st.floats(-1, 1), min_size=channels, max_size=channels))
    std = data.draw(st.lists(st.floats(0.1, 3), min_size=channels, max_size=channels))
    flip = data.draw(st.booleans())
    other = type(source)(source.stored, normalize=Normalize(tuple(mean), tuple(std)), flip=flip, channels=channels)
    assert other.shape == (channels, *source.shape[1:])
    _, height, width = source.shape
    plain = type(source)(source.stored, flip=False).read(0, height, 0, width).numpy()
    wanted = (np.repeat(plain, channels // len(plain), 0) - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    wanted = wanted[:, :, ::-1] if flip else wanted
    region = other.read(7, height - 3, 5, width - 9)
    np.testing.assert_allclose(region.numpy(), wanted[:, 7 : height - 3, 5 : width - 9], atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_the_callers_own(sources: dict, kind: str) -> None:
    _, source = sources[kind]
    first = source.read(3, 20, 5, 30)
    kept = first.clone()
    first.zero_()
    assert torch.equal(source.read(3, 20, 5, 30), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_is_refused(sources: dict, kind: str) -> None:
    _, source = sources[kind]
    _, height, width = source.shape
    for region in [(-1, 5, 0, 5), (0, height + 1, 0, 5), (0, 5, 3, 2), (0, 5, 0, width + 1)]:
        with pytest.raises(ValueError, match="are not in"):
            source.read(*region)


@pytest.mark.parametrize("kind", ["npy", "tiff tiles zlib", "png 16 bit", "dicom"])
def test_threads(sources: dict, kind: str) -> None:
    _, source = sources[kind]
    source = pickle.loads(pickle.dumps(source))  # nothing open or decoded yet
    _, height, width = source.shape
    regions = [(y, min(y + 30, height), x, min(x + 25, width)) for y in range(0, height, 9) for x in range(0, width, 7)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda region: source.read(*region), regions))
    whole = source.read(0, height, 0, width)
    for (top, bottom, left, right), part in zip(regions, parts, strict=True):
        assert torch.equal(part, whole[:, top:bottom, left:right])


def test_planes_of_a_tiff(tmp_path: Path) -> None:
    """Pages of one size are planes of one image: which one must be said."""
    stack = np.random.default_rng(3).integers(0, 65536, (6, 40, 50), dtype=np.uint16)
    files = {
        "pages": {"photometric": "minisblack", "metadata": None},
        "tiles": {"photometric": "minisblack", "tile": (16, 16), "compression": "zstd"},
        "ome": {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZYX"}, "compression": "zlib"},
        "imagej": {"imagej": True},
    }
    for name, options in files.items():
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, stack, **options)
        with pytest.raises(DataError, match=rf"{name}\.tif: has 6 planes; choose one"):
            open_pixels(path)
        with pytest.raises(DataError, match="frame 6 does not exist; the file has 0 to 5"):
            open_pixels(path, frame=6)
        for frame in (0, 4):
            source = pickle.loads(pickle.dumps(open_pixels(path, frame=frame)))
            assert f"plane {frame} of 6" in source.steps[0]
            np.testing.assert_array_equal(source.stored.read(3, 37, 5, 44)[0], stack[frame, 3:37, 5:44])
    # Time, channel and depth of OME-TIFF, each page a plane; and colour in one page.
    path = tmp_path / "5d.ome.tif"
    five = stack.reshape(1, 2, 3, 40, 50)
    tifffile.imwrite(path, five, photometric="minisblack", metadata={"axes": "TCZYX"}, tile=(16, 16))
    np.testing.assert_array_equal(open_pixels(path, frame=3).stored.read(0, 40, 0, 50)[0], five[0, 1, 0])
    path = tmp_path / "colour.ome.tif"
    tifffile.imwrite(path, np.stack([COLOUR, COLOUR[::-1]]), photometric="rgb", metadata={"axes": "ZYXS"})
    np.testing.assert_array_equal(
        open_pixels(path, frame=1).stored.read(0, 101, 0, 77), COLOUR[::-1].transpose(2, 0, 1)
    )


@pytest.mark.parametrize(
    ("photometric", "bands", "extra"),
    [("rgb", 4, [0]), ("rgb", 8, [0] * 5), ("rgb", 5, [2, 0]), ("minisblack", 2, [0]), ("minisblack", 3, [0, 0])],
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_bands_are_not_dropped(tmp_path: Path, photometric: str, bands: int, extra: list[int], planar: str) -> None:
    shape = (40, 50, bands) if planar == "contig" else (bands, 40, 50)
    options = {"photometric": photometric, "planarconfig": planar, "extrasamples": extra}
    tifffile.imwrite(tmp_path / "b.tif", np.zeros(shape, np.uint16), **options)
    with pytest.raises(DataError, match=rf"b\.tif: has {bands} bands instead of {bands - len(extra)} and alpha"):
        open_pixels(tmp_path / "b.tif")


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "packbits"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_masks_that_are_compressed_as_a_fax(tmp_path: Path, compression: str, white_is_zero: bool) -> None:
    mask = np.kron(GREY[:17, :13] % 2, np.ones((6, 9))).astype(bool)
    tags = {262: 0} if white_is_zero else {}
    Image.fromarray(mask).save(tmp_path / "m.tif", compression=compression, tiffinfo=tags)
    source = open_pixels(tmp_path / "m.tif")
    assert tifffile.TiffFile(tmp_path / "m.tif").pages[0].photometric == (0 if white_is_zero else 1)
    np.testing.assert_array_equal(source.read(3, 50, 7, 90)[0].numpy(), mask[3:50, 7:90])


def test_a_thumbnail_before_its_image(tmp_path: Path) -> None:
    path = tmp_path / "first.tif"
    with tifffile.TiffWriter(path) as tif:
        for step in (4, 2, 1):
            tif.write(GREY[::step, ::step], tile=(32, 48), subfiletype=int(step > 1), metadata=None)
    source = open_pixels(path)
    np.testing.assert_array_equal(source.read(3, 50, 7, 90).numpy(), planes(GREY)[:, 3:50, 7:90])


def test_tiff_colour_that_would_come_out_wrong_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "y.tif"
    tifffile.imwrite(path, COLOUR, photometric="ycbcr", compression="zlib")
    with pytest.raises(DataError, match=r"y\.tif: colour is stored as YCbCr"):
        open_pixels(path)


def test_a_file_of_one_image_has_no_second_frame(tmp_path: Path) -> None:
    for kind in ("npy", "png 16 bit", "jpeg", "pgm", "tiff", "zarr"):
        make = KINDS[kind][1]
        assert callable(make)
        path = make(tmp_path / kind.replace(" ", "_"))
        open_pixels(path, frame=0)
        with pytest.raises(DataError, match=f"{kind.replace(' ', '_')}.*frame 1 does not exist"):
            open_pixels(path, frame=1)


def test_memmap_pickles_as_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GREY)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    source = open_pixels(mapped)
    assert len(pickle.dumps(source)) < 2000
    assert source.name == str(tmp_path / "a.npy")
    np.testing.assert_array_equal(source.read(3, 50, 7, 90).numpy(), planes(GREY)[:, 3:50, 7:90])
    part = open_pixels(mapped[10:60, 20:80])  # not the whole file: read as an array
    np.testing.assert_array_equal(part.read(3, 40, 7, 50).numpy(), planes(GREY)[:, 13:50, 27:70])


def test_memmap_that_is_no_longer_its_file(tmp_path: Path) -> None:
    """Changed in memory alone (copy on write), or mapped still when its file is gone."""
    np.save(tmp_path / "a.npy", GREY)
    changed = np.load(tmp_path / "a.npy", mmap_mode="c")
    changed[:] = GREY[::-1]
    np.testing.assert_array_equal(open_pixels(changed).read(3, 50, 7, 90).numpy(), planes(GREY[::-1])[:, 3:50, 7:90])
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    (tmp_path / "a.npy").unlink()
    np.testing.assert_array_equal(open_pixels(mapped).read(3, 50, 7, 90).numpy(), planes(GREY)[:, 3:50, 7:90])


@pytest.mark.parametrize("line", [(0, 101, 2, 3), (2, 3, 0, 117), (2, 3, 4, 5)])
def test_one_line_of_a_mirrored_image(tmp_path: Path, line: tuple[int, int, int, int]) -> None:
    values = np.random.default_rng(4).random((101, 117), np.float32)
    np.save(tmp_path / "a.npy", values)
    top, bottom, left, right = line
    for source, expected in [
        (open_pixels(tmp_path / "a.npy", flip=True), values[:, ::-1]),
        (open_pixels(values[::-1, ::-1]), values[::-1, ::-1]),
    ]:
        np.testing.assert_array_equal(source.read(*line)[0].numpy(), expected[top:bottom, left:right])


@pytest.mark.parametrize("behind", [b"\n", b"a motion picture", b"\xff\xd8\xff\xe0 another image", b"\0" * 9])
def test_a_jpeg_with_something_behind_its_end(tmp_path: Path, behind: bytes) -> None:
    """Phones and cameras write there; what ends early ends early all the same."""
    thumbnail = b"a thumbnail of its own end \xff\xd9"
    Image.fromarray(SHADED).save(tmp_path / "photo.jpg", icc_profile=thumbnail)
    whole = (tmp_path / "photo.jpg").read_bytes()
    expected = imagecodecs.jpeg8_decode(whole).transpose(2, 0, 1) / 255
    (tmp_path / "photo.jpg").write_bytes(whole + behind)
    source = open_pixels(tmp_path / "photo.jpg")
    np.testing.assert_allclose(source.read(3, 50, 7, 60).numpy(), expected[:, 3:50, 7:60], atol=2e-7)
    for end in (1, 2, 200):
        (tmp_path / "photo.jpg").write_bytes(whole[:-end])
        with pytest.raises(DataError, match=r"is truncated \(no end marker"):
            open_pixels(tmp_path / "photo.jpg")


def test_grey_from_colour(tmp_path: Path) -> None:
    (tmp_path / "grey.png").write_bytes(imagecodecs.png_encode(np.dstack([COLOUR[..., 0]] * 3)))
    (tmp_path / "colour.png").write_bytes(imagecodecs.png_encode(COLOUR))
    source = open_pixels(tmp_path / "grey.png", channels=1)
    assert source.shape == (1, 101, 77)
    np.testing.assert_array_equal(source.read(0, 101, 0, 77).numpy(), planes(COLOUR[..., 0]))
    with pytest.raises(DataError, match=r"colour\.png: is a colour image"):
        open_pixels(tmp_path / "colour.png", channels=1).read(0, 101, 0, 77)


def test_normalize_survives_json_and_refuses_nonsense() -> None:
    normalize = Normalize((0.1, 0.2, 0.3), (1, 2, 3))
    assert Normalize.from_dict(json.loads(json.dumps(normalize.to_dict()))) == normalize
    for mean, std in [((0.0,), (0.0,)), ((0.0, 1.0), (1.0,)), ((), ()), ((float("nan"),), (1.0,))]:
        with pytest.raises(DataError):
            Normalize(mean, std)
    with pytest.raises(DataError, match="2 values for 1 channels"):
        open_pixels(GREY, normalize=Normalize((0, 0), (1, 1)))


@pytest.mark.parametrize("shape", [(4, 5, 2), (7,), (2, 3, 4, 5), (2, 9, 9), (0, 5)])
def test_shapes_that_are_no_image(shape: tuple[int, ...]) -> None:
    for image in (np.zeros(shape), torch.zeros(shape)):
        with pytest.raises(DataError, match=r"must be \(H, W\)"):
            open_pixels(image)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (None, "an array or a tensor, not NoneType"),
        ([[1, 2], [3, 4]], "an array or a tensor, not list"),
        (Image.fromarray(COLOUR), "an array or a tensor, not Image; convert it with np.asarray"),
        (torch.ones(4, 5, dtype=torch.complex64), "<tensor 4x5>: is torch.complex64"),
        (torch.eye(5).to_sparse(), "<tensor 5x5>: is torch.float32, torch.sparse_coo; pass a dense"),
        (np.ones((4, 5), complex), "<array 4x5>: contains complex128"),
    ],
)
def test_objects_that_are_no_image(image: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_pixels(image)


# ---------------------------------------------------------------------------------------------- memory


def large_npy(path: Path) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(32768, 32768))  # sparse: takes no disk


def large_dicom(path: Path) -> None:
    blank = np.zeros((1, 2), np.uint16)
    data = image_files.write_dicom(path, blank, bits=16, Rows=16384, Columns=18432).read_bytes()
    with path.open("wb") as file:  # 600 MB, sparse
        file.write(data[:-8] + (16384 * 18432 * 2).to_bytes(4, "little"))
        file.truncate(file.tell() + 16384 * 18432 * 2)


def large_tiff(path: Path) -> None:
    blank = zlib.compress(bytes(2 * 1024**2))  # a tile as it is stored
    tiles, shape = (blank for _ in range(256)), (16384, 16384)
    tifffile.imwrite(path, tiles, shape=shape, dtype=np.uint16, tile=(1024, 1024), compression="zlib")


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """Bytes by which the peak of a process grows that reads parts of a large file, and the file's pixels; by format."""
    folder = tmp_path_factory.mktemp("large")
    paths = {kind: folder / f"large.{kind}" for kind in ("npy", "dcm", "tif")}
    for path, write in zip(paths.values(), (large_npy, large_dicom, large_tiff), strict=True):
        write(path)
    process = Forked(grown_memory.print_growth, [str(path) for path in paths.values()])
    assert process.wait() == 0, process.error
    printed = [tuple(int(word) for word in line.split()) for line in process.output.splitlines()]
    return dict(zip(paths, printed, strict=True))


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="no resource usage here")
def test_gigapixel_npy_is_not_held_in_memory(growth: dict[str, tuple[int, ...]]) -> None:
    grown, pixels = growth["npy"]
    assert pixels == 2**30
    assert grown < 50 * 2**20


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="no resource usage here")
def test_uncompressed_dicom_is_not_held_in_memory(growth: dict[str, tuple[int, ...]]) -> None:
    grown, pixels = growth["dcm"]
    assert pixels == 16384 * 18432
    assert grown < 50 * 2**20


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="no resource usage here")
def test_tiff_keeps_a_bounded_part(growth: dict[str, tuple[int, ...]]) -> None:
    grown, pixels = growth["tif"]
    assert pixels * 2 == 512 * 2**20
    assert grown < CACHE.limit + 50 * 2**20


def test_tiff_decodes_only_what_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, GREY, tile=(16, 16), compression="zlib")
    source = open_pixels(path)
    source.read(20, 30, 33, 47)
    assert image_files.cached_tiles(source.stored._grid) == [(1, 2)]
    source.read(31, 33, 47, 49)
    assert set(image_files.cached_tiles(source.stored._grid)) == {(1, 2), (1, 3), (2, 2), (2, 3)}


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind.startswith(("npy", "png", "tiff", "jpeg", "pgm")) and kind != "tiff pyramid"],
)
def test_truncated_files_are_errors_that_name_the_file(tmp_path: Path, kind: str) -> None:
    make = KINDS[kind][1]
    assert callable(make)
    path = make(tmp_path / "whole")
    data = path.read_bytes()
    cut = tmp_path / "cut"
    reference = open_pixels(path)
    _, height, width = reference.shape
    whole = reference.read(0, height, 0, width)
    refused = 0
    places = sorted({*range(0, len(data), max(1, len(data) // 60)), len(data) - 1})
    for place in places:
        cut.write_bytes(data[:place])
        try:
            read = open_pixels(cut).read(0, height, 0, width)
        except DataError as error:
            assert str(cut) in str(error), place
            assert "\n" not in str(error), place
            refused += 1
        else:
            # What is lost then is nothing that holds pixels: the end mark of a PNG, a directory's last bytes.
            assert torch.equal(read, whole), place
            assert place > 0.9 * len(data)
    assert refused >= len(places) - 2


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"hello" * 99, "not a DICOM"), (b"\x93NUMPY\x01\0", "damaged .npy")]
)
def test_unknown_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_pixels(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png: cannot be read \(No such file"):
        open_pixels(tmp_path / "absent.png")
    with pytest.raises(DataError, match="Is a directory"):
        open_pixels(tmp_path)


def test_arrays_that_are_no_pixels(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros((4, 4), complex))
    np.save(tmp_path / "o.npy", np.array([[{}, 1], [2, 3]], dtype=object), allow_pickle=True)
    for name in ("c.npy", "o.npy"):
        with pytest.raises(DataError, match=rf"{name}: contains"):
            open_pixels(tmp_path / name)
    with pytest.raises(DataError, match="contains complex128"):
        open_pixels(np.zeros((4, 4), complex))


def test_real_chest_film(real_data: Path) -> None:
    source = open_pixels(real_data / "nih_chest_xray.png")
    whole = source.read(0, source.shape[1], 0, source.shape[2])
    assert source.shape[0] == 1
    assert 0.9 < whole.max() <= 1
    assert 0.2 < whole.mean() < 0.8


@pytest.mark.parametrize("name", ["second.ome.tif", "sub/second.ome.tif", "../second.ome.tif", "{}/second.ome.tif"])
def test_planes_of_ome_tiff_are_read_from_its_folder_alone(name, tmp_path):
    """Its XML may name any file of the disk."""
    folder = tmp_path / "set"
    folder.mkdir()
    name = name.format(tmp_path)
    inside = not name.startswith(("..", "/"))
    (folder / name).parent.mkdir(exist_ok=True)
    tifffile.imwrite(folder / name, np.full((16, 16), 7, np.uint8))
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{own}">urn:uuid:{z}</UUID></TiffData>'
        for z, own in enumerate(["first.ome.tif", name])
    )
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="16" SizeY="16" SizeC="1" '
        f'SizeZ="2" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
    )
    with tifffile.TiffWriter(folder / "first.ome.tif", ome=False) as file:
        file.write(np.zeros((16, 16), np.uint8), description=xml, metadata=None)
    assert open_pixels(folder / "first.ome.tif", frame=0).stored.read(0, 16, 0, 16).max() == 0
    if inside:
        assert open_pixels(folder / "first.ome.tif", frame=1).stored.read(0, 16, 0, 16).min() == 7
    else:
        with pytest.raises(DataError, match=r"first\.ome\.tif: plane 1 is not in its folder"):
            open_pixels(folder / "first.ome.tif", frame=1)
