"""The cache of decoded tiles, and the threads that fill it."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import cached_tiles

from gigamorph.engine.errors import DataError
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.tiles import CACHE, TileCache, TileGrid

IMAGE = np.random.default_rng(0).integers(0, 2**16, (2, 61, 83), dtype=np.uint16)


class Tiles:
    """An image cut into tiles that reach beyond its border, which counts how often each is decoded."""

    dtype = IMAGE.dtype
    name = "the image"

    def __init__(self, size: tuple[int, int], limit: int, bad: tuple[int, int] | None = None) -> None:
        self.shape, self.bad = IMAGE.shape, bad
        self.padded = np.pad(IMAGE, ((0, 0), (0, size[0]), (0, size[1])))
        self.cache = TileCache(limit)
        self.grid = TileGrid(size, self.cache)
        self.decoded: list[tuple[int, int]] = []

    def tile(self, row: int, column: int) -> np.ndarray:
        self.decoded.append((row, column))
        height, width = self.grid.size
        if (row, column) == self.bad:
            raise DataError(f"tile {row}, {column} is damaged")
        return self.padded[:, row * height : (row + 1) * height, column * width : (column + 1) * width]

    def read(self, *region: int) -> np.ndarray:
        return self.grid.read(self, *region)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_regions(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    image = Tiles(size, data.draw(st.sampled_from([0, 10_000, 10**7])))
    for _ in range(3):
        top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, 61)] * 2)))
        left, right = sorted(data.draw(st.tuples(*[st.integers(0, 83)] * 2)))
        np.testing.assert_array_equal(image.read(top, bottom, left, right), IMAGE[:, top:bottom, left:right])
        held = sum(image.padded[:, : size[0], : size[1]].nbytes for _ in cached_tiles(image.grid))
        assert image.cache.nbytes == held <= image.cache.limit


def test_least_recently_used_tiles_go_first() -> None:
    tile = 2 * 16 * 16 * 2
    image = Tiles((16, 16), 3 * tile)
    for column in (0, 1, 2, 0, 3, 0, 2, 1):
        image.read(0, 8, column * 16, column * 16 + 8)
    assert image.decoded == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 1)]
    assert cached_tiles(image.grid) == [(0, 0), (0, 2), (0, 1)]
    assert image.cache.nbytes == 3 * tile


def test_the_limit_holds_over_images_and_closed_ones_leave() -> None:
    cache = TileCache(4000)
    images = [Tiles((16, 16), 0) for _ in range(3)]
    for image in images:
        image.grid = TileGrid((16, 16), cache)
        image.read(0, 32, 0, 48)
        assert cache.nbytes <= 4000
    assert cache.nbytes > 2000
    del images, image
    assert cache.nbytes == 0


def test_a_damaged_tile_spoils_no_other_region() -> None:
    image = Tiles((16, 16), 10**7, bad=(1, 2))
    with pytest.raises(DataError, match="tile 1, 2 is damaged"):
        image.read(0, 61, 0, 83)
    with pytest.raises(DataError, match="tile 1, 2 is damaged"):
        image.read(16, 32, 32, 33)
    np.testing.assert_array_equal(image.read(0, 16, 0, 83), IMAGE[:, :16])


def test_a_tile_that_is_too_small_is_an_error() -> None:
    image = Tiles((16, 16), 10**7)
    image.padded = image.padded[:, :20]
    with pytest.raises(DataError, match=r"the image: tile \(1, 0\) has shape"):
        image.read(0, 32, 0, 16)


def test_tiles_are_decoded_at_the_same_time() -> None:
    """Two tiles wait for each other, so that one thread alone would never come to an end."""
    image, both = Tiles((16, 16), 10**7), threading.Barrier(2, timeout=20)
    decode = image.tile

    def together(row: int, column: int) -> np.ndarray:
        both.wait()
        return decode(row, column)

    image.tile = together  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(image.read(0, 16, 0, 32), IMAGE[:, :16, :32])


def test_many_readers(tmp_path: Path) -> None:
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, IMAGE[0], tile=(16, 16), compression="zlib")
    source = open_pixels(path)
    expected = IMAGE[0] / np.float32(65535)
    regions = [(y, min(y + 30, 61), x, min(x + 25, 83)) for y in range(0, 60, 7) for x in range(0, 80, 5)]
    with ThreadPoolExecutor(8) as pool:
        for region, part in zip(regions, pool.map(lambda region: source.read(*region), regions), strict=True):
            np.testing.assert_array_equal(part[0], expected[region[0] : region[1], region[2] : region[3]])


def _read_in_child(source, results) -> None:
    results.put(float(source.read(0, 61, 0, 83).sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, IMAGE[0], tile=(16, 16), compression="zlib")
    source = open_pixels(path)
    expected = float(source.read(0, 61, 0, 83).sum())  # threads exist, and tiles are held
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with CACHE._lock:  # as another thread of the parent might at that moment
        child = context.Process(target=_read_in_child, args=(source, results))
        child.start()
    try:
        assert results.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()
