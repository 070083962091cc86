"""Writing of images by region: tiled TIFF of any size, and PNG for images that fit into memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import imagecodecs
import numpy as np
import tifffile

from ..errors import DataError
from ..files import whole_or_absent

ReadRegion = Callable[[int, int, int, int], np.ndarray]
"""Maps (top, bottom, left, right) to the pixels (rows, columns) of the region."""

TILE = 512
# Pixels of the largest PNG, which is encoded as a whole: 128 MiB of 16 bits.
PNG_PIXELS = 2**26

Item = TypeVar("Item")
Result = TypeVar("Result")


def write_tiff(
    path: Path,
    shape: tuple[int, int],
    dtype: np.dtype,
    read: ReadRegion,
    *,
    spacing: float | None = None,
    threads: int = 1,
    report: Callable[[int], object] | None = None,
) -> None:
    """Write a tiled grey (Big)TIFF with lossless zstd, tile by tile; only these tiles are in memory.

    Args:
        path: the file.
        shape: (rows, columns) of the image.
        dtype: of the pixels.
        read: returns the pixels of a region.
        spacing: millimetres between pixels.
        threads: the number of threads that read tiles ahead.
        report: called with numbers of pixels written.
    """
    height, width = shape
    regions = [
        (top, min(top + TILE, height), left, min(left + TILE, width))
        for top in range(0, height, TILE)
        for left in range(0, width, TILE)
    ]

    def tile(region: tuple[int, int, int, int]) -> np.ndarray:
        values = read(*region)
        if report is not None:
            report(values.size)
        # tifffile requires whole tiles; the file has the size of the image.
        return np.pad(values, ((0, TILE - values.shape[0]), (0, TILE - values.shape[1])))

    resolution = {"resolution": (10 / spacing, 10 / spacing), "resolutionunit": "CENTIMETER"} if spacing else {}
    with tifffile.TiffWriter(path, bigtiff=height * width * dtype.itemsize > 2**31) as file:
        file.write(
            map_ahead(tile, regions, threads),
            shape=shape,
            dtype=dtype,
            tile=(TILE, TILE),
            photometric="minisblack",
            compression="zstd",
            predictor=dtype.itemsize > 1,
            maxworkers=threads,
            buffersize=threads * TILE * TILE * dtype.itemsize,  # by default 512 MB of tiles are gathered
            software="gigamorph",
            metadata=None,
            **resolution,
        )


def write_grey(path: Path, shape: tuple[int, int], dtype: type[np.integer], read: ReadRegion) -> None:
    """Write a grey TIFF if the name ends in ``.tif``, else a PNG; a file that exists is complete.

    Raises:
        DataError: if it cannot be written, or the image is too large for a PNG, see `grey_suffix`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as part:
            if path.suffix == ".tif":
                write_tiff(part, shape, np.dtype(dtype), read)
            else:
                write_png(part, shape, read)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); free some space") from error


def grey_suffix(shape: tuple[int, int]) -> str:
    """``.png``, or ``.tif`` for an image that is too large for a PNG."""
    return ".png" if shape[0] * shape[1] <= PNG_PIXELS else ".tif"


def write_png(path: Path, shape: tuple[int, int], read: ReadRegion) -> None:
    """Write a grey PNG; `DataError` if the image is too large, because it is encoded as a whole."""
    if grey_suffix(shape) != ".png":
        raise DataError(f"{path}: {shape[0]} x {shape[1]} pixels are too many for a PNG; write tiff")
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(read(0, shape[0], 0, shape[1])), level=4))


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """function(item) of each item in order, computed by threads at most a few items ahead."""
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
