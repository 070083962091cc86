"""Zarr arrays and OME-Zarr images."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import cached_tiles, picture, write_zarr

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels

GREY = picture(16, (45, 70))
COLOUR = picture(8, (3, 45, 70))


def whole(path: Path, **options) -> np.ndarray:
    stored = open_pixels(path, **options).stored
    return stored.read(0, stored.shape[1], 0, stored.shape[2])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("pixels", "chunks", "expected"),
    [
        (GREY, (16, 32), GREY[None]),
        (GREY, (45, 70), GREY[None]),
        (COLOUR, (1, 16, 32), COLOUR),
        (COLOUR.transpose(1, 2, 0), (16, 32, 3), COLOUR),
        (GREY.astype(np.float32), (7, 9), GREY[None].astype(np.float32)),
        (GREY.astype(">u2"), (16, 32), GREY[None]),
    ],
)
def test_arrays(tmp_path: Path, version: int, pixels: np.ndarray, chunks: tuple, expected: np.ndarray) -> None:
    path = write_zarr(tmp_path / "a.zarr", pixels, chunks, version=version)
    np.testing.assert_array_equal(whole(path), expected)
    source = pickle.loads(pickle.dumps(open_pixels(path)))
    region = source.read(11, 40, 20, 69).numpy() * source.stored.full
    np.testing.assert_allclose(region, expected[:, 11:40, 20:69], rtol=1e-6)


def test_shards(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", GREY, (8, 8), shards=(32, 32))
    np.testing.assert_array_equal(whole(path)[0], GREY)
    source = open_pixels(path)
    source.read(9, 15, 17, 23)
    assert cached_tiles(source.stored._grid) == [(1, 2)]


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr(tmp_path: Path, version: int) -> None:
    stack = picture(12, (2, 4, 45, 70))
    path = write_zarr(tmp_path / "a.zarr", stack, (1, 1, 16, 32), "czyx", version)
    with pytest.raises(DataError, match=r"a\.zarr: has 8 planes"):
        open_pixels(path)
    with pytest.raises(DataError, match="frame 8 does not exist"):
        open_pixels(path, frame=8)
    for frame in (0, 3, 6):
        np.testing.assert_array_equal(whole(path, frame=frame)[0], stack.reshape(8, 45, 70)[frame])
    np.testing.assert_array_equal(whole(path / "1", frame=5)[0], stack.reshape(8, 45, 70)[5, ::2, ::2])
    colour = write_zarr(tmp_path / "c.zarr", COLOUR[None], (1, 3, 16, 32), "tcyx", version)
    np.testing.assert_array_equal(whole(colour), COLOUR)
    # As bioformats2raw writes all images; and several depths of a colour image.
    five = write_zarr(tmp_path / "5.zarr", COLOUR[None, :, None], (1, 1, 1, 16, 32), "tczyx", version)
    np.testing.assert_array_equal(whole(five), COLOUR)
    depths = write_zarr(tmp_path / "d.zarr", np.stack([COLOUR, COLOUR[::-1]], 1), (1, 1, 16, 32), "czyx", version)
    with pytest.raises(DataError, match="has 2 planes"):
        open_pixels(depths)
    np.testing.assert_array_equal(open_pixels(depths, frame=1).stored.read(0, 45, 0, 70), COLOUR[::-1])


def test_one_level_by_its_name(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", GREY, (16, 32), "yx")
    np.testing.assert_array_equal(whole(path)[0], GREY)
    np.testing.assert_array_equal(whole(path / "1")[0], GREY[::2, ::2])


def test_what_is_no_image(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", GREY, (16, 32), "yx")
    attributes = json.loads((path / "zarr.json").read_text())
    attributes["attributes"] = {}
    (path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(DataError, match=r"a\.zarr: is a zarr group, not an OME-Zarr image"):
        open_pixels(path)
    with pytest.raises(DataError, match="Is a directory"):
        open_pixels(tmp_path)
    with pytest.raises(DataError, match=r"must be \(H, W\)"):
        open_pixels(write_zarr(tmp_path / "b.zarr", np.zeros((2, 9, 9), np.uint8), (1, 4, 4)))
    with pytest.raises(DataError, match="contains complex64"):
        open_pixels(write_zarr(tmp_path / "c.zarr", np.zeros((9, 9), np.complex64), (4, 4)))


@pytest.mark.parametrize("change", ["cut", "noise", "shape", "chunks", "codec", "text"])
def test_damage(tmp_path: Path, change: str) -> None:
    path = write_zarr(tmp_path / "a.zarr", GREY, (16, 32))
    chunk, marks = path / "c" / "1" / "1", json.loads((path / "zarr.json").read_text())
    if change == "cut":
        chunk.write_bytes(chunk.read_bytes()[:20])
    elif change == "noise":
        chunk.write_bytes(b"\7" * 500)
    elif change == "shape":
        marks["shape"] = [2**40, 70]
        marks["chunk_grid"]["configuration"]["chunk_shape"] = [2**40, 32]
    elif change == "chunks":
        marks["chunk_grid"]["configuration"]["chunk_shape"] = [0, 32]
    elif change == "codec":
        marks["codecs"].append({"name": "no such codec"})
    (path / "zarr.json").write_text("{" if change == "text" else json.dumps(marks))
    with pytest.raises(DataError) as error:
        whole(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_chunks_never_written_hold_the_fill_value(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", GREY, (16, 32), fill_value=7)
    shutil.rmtree(path / "c" / "1")
    expected = GREY.copy()
    expected[16:32] = 7
    np.testing.assert_array_equal(whole(path)[0], expected)
