"""Where the blocks of a map go as the tiles make them: into an array that is there, or a new file.

Blocks come in raster order in odd sizes. Files in fixed tiles are written in bands, which are as high as a tile and as
wide as the map: a band is held until the last block has come that reaches into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import GigamorphError
from ..lowering.ops import Axes
from .halos import Rect, cut

TILE = 256
Put = Callable[[Tensor, Rect], None]


def sink(out: Any, shape: Sequence[int], axes: Axes, dtype: torch.dtype) -> contextlib.AbstractContextManager[Put]:
    """Takes a map of this shape block by block.

    Args:
        out: as for `dense.write_map`.
        axes: the image axes.

    Raises:
        GigamorphError: if `out` does not fit the map.
    """
    if isinstance(out, str | Path):
        path = Path(out)
        files = {".npy": _npy, ".zarr": _zarr, ".tif": _tiff, ".tiff": _tiff}
        if path.suffix.lower() not in files:
            raise GigamorphError(f"{path}: cannot tell the format; name the file .npy, .zarr or .tif")
        return files[path.suffix.lower()](path, shape, axes, _numpy_dtype(dtype))
    if tuple(getattr(out, "shape", ())) != tuple(shape):
        kind = f"of shape {tuple(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        raise GigamorphError(f"the map has shape {tuple(shape)}; give an array of that shape, not one {kind}")
    if isinstance(out, Tensor):
        return contextlib.nullcontext(_copy(out, axes))
    if isinstance(out, np.ndarray):
        return contextlib.nullcontext(_assign(out, axes))
    chunks = getattr(out, "chunks", None)
    if chunks is None or not hasattr(out, "__setitem__"):
        raise GigamorphError(f"out is a {type(out).__name__}; give a tensor, numpy array, zarr array or path")
    return contextlib.nullcontext(_in_chunks(out, shape, axes, chunks[axes[0]]))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype of a map in a file: bfloat16 becomes float32, which holds its values."""
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
    """Into an array whose chunks are written whole: unaligned blocks would be read and written again and again."""

    def flush(top: int, band: np.ndarray) -> None:
        rect = (top, top + band.shape[axes[0]], 0, shape[axes[1]])
        out[_region(len(shape), axes, rect)] = band

    return _Shard(shape, axes, np.dtype(out.dtype), height, flush)


class _Shard:
    """Puts blocks together to bands of some rows, the last of which may be lower, and hands each on when it is full.

    Args:
        flush: gets a band's first row, and the band.
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


@contextlib.contextmanager
def _npy(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))
    yield _assign(array, axes)
    array.flush()


@contextlib.contextmanager
def _zarr(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    import zarr

    chunks = [min(n, TILE) if d in axes else n for d, n in enumerate(shape)]
    array = zarr.create_array(str(path), shape=tuple(shape), chunks=tuple(chunks), dtype=dtype, overwrite=True)
    yield _in_chunks(array, shape, axes, chunks[axes[0]])


@contextlib.contextmanager
def _tiff(path: Path, shape: Sequence[int], axes: Axes, dtype: np.dtype) -> Iterator[Put]:
    """A tiled (Big)TIFF, zstd without loss. Its writer asks for tiles, so it runs in a thread of its own."""
    import tifffile

    height, width = shape[axes[0]], shape[axes[1]]
    others = [n for d, n in enumerate(shape) if d not in axes]
    channels = others[-1] if others and (len(shape) > 3 or axes[0] == 0) else 1
    if int(np.prod(others)) != channels:
        raise GigamorphError(f"{path}: a TIFF takes the map of one image, not shape {tuple(shape)}; use .zarr or .npy")
    size = (height, width) if channels == 1 else (height, width, channels)
    kind = np.dtype("uint8") if dtype.kind == "b" else dtype
    bands: Queue[np.ndarray | None] = Queue(1)
    failed: list[BaseException] = []

    def full() -> Iterator[np.ndarray]:
        while (band := bands.get()) is not None:
            yield band

    come = full()

    def tiles() -> Iterator[np.ndarray]:
        for band in come:
            for left in range(0, width, TILE):
                part = band[:, left : left + TILE]
                tile = np.zeros((TILE, TILE, channels), kind)
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile

    def write() -> None:
        try:
            with tifffile.TiffWriter(path, bigtiff=height * width * channels * kind.itemsize > 2**31) as file:
                file.write(
                    tiles(),
                    shape=size,
                    dtype=kind,
                    tile=(TILE, TILE),
                    photometric="minisblack",
                    planarconfig=None if channels == 1 else "contig",
                    compression="zstd",
                    software="gigamorph",
                    metadata=None,
                )
        except BaseException as error:  # told to the thread that computes
            failed.append(error)
            for _ in come:
                pass

    def flush(_top: int, band: np.ndarray) -> None:
        if failed:
            raise GigamorphError(f"{path}: cannot be written ({failed[0]})")
        rows = np.moveaxis(band, axes, (0, 1))
        bands.put(rows.reshape(*rows.shape[:2], channels))

    writer = Thread(target=write)
    writer.start()
    whole = False
    try:
        yield _Shard(shape, axes, dtype, TILE, flush)
        whole = True
    finally:
        bands.put(None)
        writer.join()
        if not whole:
            path.unlink(missing_ok=True)
    if failed:
        raise GigamorphError(f"{path}: cannot be written ({failed[0]})")
