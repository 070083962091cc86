"""Zarr arrays and OME-Zarr images, read by region: only the chunks that a region touches are decoded."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import codecs
from .affine import Affine
from .arrays import channels_first
from .rawfile import one_line
from .stored import full_range
from .tiles import TileGrid

# What a folder holds that is a zarr array or group, of version 3 and 2.
MARKS = ("zarr.json", ".zarray", ".zgroup")


class ZarrPixels:
    """Stored pixels (`stored.StoredPixels`) of a zarr array, or of the full resolution of an OME-Zarr image.

    An array of two or three axes is laid out as `open_pixels` says. Of one with more, and of an OME-Zarr image, the
    last two axes are rows and columns; `frame` counts through the others (time, channel, depth), the last fastest, and
    is needed where they hold more than one plane. An OME-Zarr channel axis of length 3 is colour, and none of those.

    Chunks that were never written hold the array's fill value.
    """

    table = None
    self_describing = False
    to_original = Affine()

    def __init__(self, path: Path, frame: int | None = None) -> None:
        self.name, self.path, self.frame = str(path), path, frame
        try:
            import zarr
        except ImportError as error:
            raise DataError(f"{path}: is a zarr array; pip install 'zarr>=3' to read it") from error
        try:
            # As a text, a folder that is called "zip::a" would be a URL.
            found: Any = zarr.open(path if isinstance(path, Path) else str(path), mode="r")
            array, axes = (found, None) if isinstance(found, zarr.Array) else _full_resolution(found, path)
            from .zarr_codecs import bounded

            self._array = bounded(array)
            self._describe(axes)
        except DataError:
            raise
        except Exception as error:  # zarr lets errors of every kind out of damaged metadata
            raise DataError(f"{path}: damaged zarr metadata ({one_line(error)}); fetch it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "frame": self.frame}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["frame"])

    def _describe(self, axes: list[str] | None) -> None:
        array, shape = self._array, tuple(self._array.shape)
        self.dtype = np.dtype(array.dtype)
        if self.dtype.kind not in "buif":
            raise DataError(f"{self.path}: holds {self.dtype}, not numbers that can be pixels")
        self.full = full_range(self.dtype)
        if axes is None and len(shape) > 3:  # one level of an OME-Zarr image, for example
            axes = ["?"] * (len(shape) - 2) + ["y", "x"]
        if axes is None:
            order = channels_first(shape, self.name)
            index: list[int | slice] = [slice(None)] * len(shape)
            if self.frame not in (None, 0):
                raise DataError(f"{self.path}: frame {self.frame} is wanted, the array is one image")
        else:
            order, index = self._plane(shape, axes)
        self._index, self._order = index, order
        kept = [axis for axis, at in enumerate(index) if isinstance(at, slice)]
        self._axes = [kept[number] for number in order]
        sides = [shape[axis] for axis in self._axes]
        self.shape = (sides[0] if len(sides) == 3 else 1, sides[-2], sides[-1])
        self._size = array.chunks[self._axes[-2]], array.chunks[self._axes[-1]]
        if math.prod(array.chunks) * self.dtype.itemsize > codecs.LARGEST_BYTES or min(self._size) < 1:
            raise DataError(f"{self.path}: chunks of {tuple(array.chunks)}; save it in smaller chunks")
        fixed = [at for at in index if isinstance(at, int)]
        which = f", plane {fixed}" if fixed else ""
        self.steps = (f"zarr, {self.dtype}{which}",)
        self._grid = TileGrid(self._size)

    def _plane(self, shape: tuple[int, ...], axes: list[str]) -> tuple[tuple[int, ...], list[int | slice]]:
        """The order of the axes that are read, and the place along each of the others."""
        if len(axes) != len(shape) or axes[-2:] != ["y", "x"] or not all(shape):
            raise DataError(f"{self.path}: axes {axes} of shape {shape} do not end in y, x; convert it")
        colour = [axis for axis, name in enumerate(axes) if name == "c" and shape[axis] == 3]
        others = [axis for axis in range(len(shape) - 2) if axis not in colour]
        planes = math.prod(shape[axis] for axis in others)
        if self.frame is None and planes > 1:
            raise DataError(f"{self.path}: has {planes} planes; say which one (frame=0 to {planes - 1})")
        if self.frame is not None and not 0 <= self.frame < planes:
            raise DataError(f"{self.path}: frame {self.frame} is wanted, the image has 0 to {planes - 1}")
        index: list[int | slice] = [slice(None)] * len(shape)
        left = self.frame or 0
        for axis in reversed(others):
            left, index[axis] = divmod(left, shape[axis])
        return ((0, 1, 2) if colour else (0, 1)), index

    def flips(self) -> tuple[bool, bool]:
        return False, False

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return self._grid.read(self, top, bottom, left, right)

    def tile(self, row: int, column: int) -> np.ndarray:
        """(channels, rows, columns) of the chunks at one place."""
        index = list(self._index)
        for axis, place, step in zip(self._axes[-2:], (row, column), self._size, strict=True):
            index[axis] = slice(place * step, (place + 1) * step)
        self._check_chunks(index)
        try:
            values = np.asarray(self._array[tuple(index)])
        except Exception as error:  # every codec has its own exceptions
            raise DataError(
                f"{self.path}: chunk {row}, {column} is damaged ({one_line(error)}); fetch it again"
            ) from error
        values = values.transpose(self._order)
        return values if values.ndim == 3 else values[None]

    def _check_chunks(self, index: list[int | slice]) -> None:
        """`DataError` if a chunk's file is longer than a chunk may be: zarr reads it whole. Local files only."""
        array = self._array
        sides = array.shards or array.chunks
        most = codecs.most_encoded(math.prod(sides) * self.dtype.itemsize)
        spans = [at if isinstance(at, slice) else slice(at, at + 1) for at in index]
        places = (
            range((at.start or 0) // side, -(-min(length, at.stop or length) // side))
            for at, side, length in zip(spans, sides, array.shape, strict=True)
        )
        for place in itertools.product(*places) if isinstance(self.path, Path) else ():
            path = self.path / array.path / array.metadata.encode_chunk_key(place)
            if path.is_file() and path.stat().st_size > most:
                raise DataError(f"{path}: has more bytes than a chunk may have ({most}); fetch {self.path} again")


def _full_resolution(group: Any, path: Path) -> tuple[Any, list[str]]:
    """The largest array of an OME-Zarr image (0.4 and 0.5), and the names of its axes."""
    attributes = group.attrs.asdict()
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise DataError(f"{path}: is a zarr group and no OME-Zarr image; name one of its arrays ({path}/NAME)")
    axes = [axis["name"] if isinstance(axis, dict) else axis for axis in images[0].get("axes", "tczyx")]
    array = group[images[0]["datasets"][0]["path"]]
    return array, list(axes)
