"""Writes the blocks of a map, as tiles compute them, into an existing array or a new file.

Blocks arrive in row-major order in odd sizes. Tiled files are written in bands that are as high as a file tile and as
wide as the map. A band stays in memory until its last block has arrived.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import GigamorphError
from ..files import whole_or_absent
from ..lowering.ops import Axes
from .halos import Rect, cut
from .pages import GIVES_BACK

TILE = 256
Put = Callable[[Tensor, Rect], None]


def sink(out: Any, shape: Sequence[int], axes: Axes, dtype: torch.dtype) -> contextlib.AbstractContextManager[Put]:
    """Context manager that returns a function which writes a block of a map: `put(block, rect)`.

    Args:
        out: see `dense.write_map`.
        shape: shape of the map.
        axes: the image axes.

    Raises:
        GigamorphError: if `out` does not match the map.
    """
    if isinstance(out, str | Path):
        return _file(Path(out), shape, axes, _numpy_dtype(dtype))
    if tuple(getattr(out, "shape", ())) != tuple(shape):
        kind = f"of shape {tuple(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        raise GigamorphError(f"out must be an array of the map's shape {tuple(shape)}, not {kind}")
    if isinstance(out, Tensor):
        return contextlib.nullcontext(_copy(out, axes))
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise GigamorphError("out must be writable, but the array is read-only; open its file with mode r+")
        return contextlib.nullcontext(_assign(out, axes))
    chunks = getattr(out, "chunks", None)
    if chunks is None or not hasattr(out, "__setitem__"):
        raise GigamorphError(f"out must be a tensor, numpy array, zarr array or path, not a {type(out).__name__}")
    return contextlib.nullcontext(_in_chunks(out, shape, axes, chunks[axes[0]]))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype of a map in a file: bfloat16 is stored as float32, which represents its values exactly."""
    return np.dtype("float32") if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype


def _array(block: Tensor) -> np.ndarray:
    block = block.detach().cpu()
    return (block.float() if block.dtype == torch.bfloat16 else block).numpy()


def _region(rank: int, axes: Axes, rect: Rect) -> tuple[slice, ...]:
    index = [slice(None)] * rank
    index[axes[0]], index[axes[1]] = slice(rect[0], rect[1]), slice(rect[2], rect[3])
    return tuple(index)


def _copy(out: Tensor, axes: Axes) -> Put:
    def put(block: Tensor, rect: Rect) -> None:
        cut(out, axes, rect).copy_(block)

    return put


def _assign(out: Any, axes: Axes) -> Put:
    def put(block: Tensor, rect: Rect) -> None:
        out[_region(block.dim(), axes, rect)] = _array(block)

    return put


def _in_chunks(out: Any, shape: Sequence[int], axes: Axes, height: int) -> Put:
    """Write bands of whole chunks into an array: unaligned blocks would read and rewrite a chunk many times."""

    def flush(top: int, band: np.ndarray) -> None:
        rect = (top, top + band.shape[axes[0]], 0, shape[axes[1]])
        out[_region(len(shape), axes, rect)] = band

    return _Shard(shape, axes, np.dtype(out.dtype), height, flush)


class _Shard:
    """Assembles blocks into bands of `height` rows (the last may be lower) and flushes each band when it is complete.

    Args:
        flush: called with the first row of a band, and the band.
    """

    def __init__(
        self, shape: Sequence[int], axes: Axes, dtype: np.dtype, height: int, flush: Callable[[int, np.ndarray], None]
    ):
        self.shape, self.axes, self.dtype, self.height, self.flush = list(shape), axes, dtype, height, flush
        self.open: dict[int, np.ndarray] = {}

    def __call__(self, block: Tensor, rect: Rect) -> None:
        values, size = _array(block), self.shape[self.axes[0]]
        top, bottom, left, right = rect
        for start in range(top // self.height * self.height, bottom, self.height):
            end = min(start + self.height, size)
            if start not in self.open:
                shape = list(self.shape)
                shape[self.axes[0]] = end - start
                self.open[start] = np.empty(shape, self.dtype)
            lo, hi = max(top, start), min(bottom, end)
            target = _region(len(self.shape), self.axes, (lo - start, hi - start, left, right))
            rows = _region(len(self.shape), self.axes, (lo - top, hi - top, 0, right - left))
            self.open[start][target] = values[rows]
            if hi == end and right == self.shape[self.axes[1]]:
                self.flush(start, self.open.pop(start))


class _CannotWriteError(Exception):
    pass


@contextlib.contextmanager
def _file(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    """A new file or folder; an earlier one is kept if the computation fails."""
    kinds = {".npy": _npy, ".zarr": _zarr, ".tif": _tiff, ".tiff": _tiff}
    if path.suffix.lower() not in kinds:
        raise GigamorphError(f"{path}: unknown file format; the name must end in .npy, .zarr or .tif")
    try:
        with whole_or_absent(path) as new, kinds[path.suffix.lower()](new, shape, axes, dtype) as put:
            yield put
    except _CannotWriteError as error:
        raise GigamorphError(f"{path}: cannot be written ({error})") from error


@contextlib.contextmanager
def _npy(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))
    except OSError as error:
        raise _CannotWriteError(error.strerror or error) from error
    mapping: Any = array.base
    assign = _assign(array, axes)

    def put(block: Tensor, rect: Rect) -> None:
        assign(block, rect)
        # The data is in the file; resident pages would count as memory of this process.
        if GIVES_BACK and rect[3] == shape[axes[1]]:
            mapping.madvise(mmap.MADV_DONTNEED)

    yield put
    array.flush()


@contextlib.contextmanager
def _zarr(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    import zarr

    chunks = [min(n, TILE) if d in axes else n for d, n in enumerate(shape)]
    array = zarr.create_array(str(path), shape=tuple(shape), chunks=tuple(chunks), dtype=dtype, overwrite=True)
    yield _in_chunks(array, shape, axes, chunks[axes[0]])


@contextlib.contextmanager
def _tiff(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    """A tiled (Big)TIFF file, losslessly compressed with zstd.

    tifffile pulls the tiles from an iterator, so it runs in its own thread.
    """
    import tifffile

    others = [n for d, n in enumerate(shape) if d not in axes]
    channels = others[-1] if others and (len(shape) > 3 or axes[0] == 0) else 1
    if int(np.prod(others)) != channels:
        raise GigamorphError(f"a TIFF file holds the map of one image, not shape {tuple(shape)}; use .zarr or .npy")
    height, width = shape[axes[0]], shape[axes[1]]
    stored = np.dtype("uint8") if dtype.kind == "b" else dtype
    queue: Queue[np.ndarray | None] = Queue(-(-width // TILE))  # the tiles of one band
    failed: list[BaseException] = []

    def queued() -> Iterator[np.ndarray]:
        while (tile := queue.get()) is not None:
            yield tile

    def write() -> None:
        tiles = queued()
        try:
            with tifffile.TiffWriter(path, bigtiff=math.prod(shape) * stored.itemsize > 2**31) as file:
                file.write(
                    tiles,
                    shape=(height, width) if channels == 1 else (height, width, channels),
                    dtype=stored,
                    tile=(TILE, TILE),
                    photometric="minisblack",
                    planarconfig=None if channels == 1 else "contig",
                    compression="zstd",
                    maxworkers=1,  # several would first gather up to 512 MB of tiles
                    software="gigamorph",
                    metadata=None,
                )
        except BaseException as error:  # `check` raises it in the computing thread
            failed.append(error)
            for _ in tiles:
                pass

    def check() -> None:
        if failed:
            raise _CannotWriteError(failed[0])

    def flush(_top: int, band: np.ndarray) -> None:
        check()
        rows = np.moveaxis(band, axes, (0, 1)).reshape(-1, width, channels)
        for left in range(0, width, TILE):
            part = rows[:, left : left + TILE]
            tile = np.zeros((TILE, TILE, channels), stored)
            tile[: part.shape[0], : part.shape[1]] = part
            queue.put(tile)

    thread = Thread(target=write)
    thread.start()
    try:
        yield _Shard(shape, axes, dtype, TILE, flush)
    finally:
        queue.put(None)
        thread.join()
    check()
