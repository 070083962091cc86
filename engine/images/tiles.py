"""Images stored in tiles: reading a region decodes its tiles in threads and caches them for neighbouring regions.

The cache is global to the process, so its limit is independent of the number of open files. A scan moves along a row of
tiles that overlap file tiles at their borders; the limit is enough for the decoded file tiles of such a row.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import DataError
from .parallel import available_cpus
from .stored import StoredPixels

_Key = tuple[int, tuple[int, int]]


class TileCache:
    """A thread-safe cache of decoded tiles; the least recently used are dropped beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._tiles: OrderedDict[_Key, np.ndarray] = OrderedDict()
        self.nbytes = 0

    def get(self, key: _Key) -> np.ndarray | None:
        """The tile, or None."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
            return self._tiles.get(key)

    def put(self, key: _Key, tile: np.ndarray) -> None:
        """Add a tile; a tile larger than the limit is ignored."""
        if tile.nbytes > self.limit:
            return
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = tile
                self.nbytes += tile.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._tiles.popitem(last=False)[1].nbytes

    def drop(self, owner: int) -> None:
        """Remove the tiles of an image."""
        with self._lock:
            for key in [key for key in self._tiles if key[0] == owner]:
                self.nbytes -= self._tiles.pop(key).nbytes


CACHE = TileCache(256 * 2**20)

_owners = itertools.count()


if hasattr(os, "register_at_fork"):  # the lock may be held by a thread that a forked process lacks
    os.register_at_fork(after_in_child=lambda: CACHE.__init__(CACHE.limit))


class TileGrid:
    """A reader of regions of an image (channels, height, width) stored in tiles of `size` (rows, columns)."""

    def __init__(self, size: tuple[int, int], cache: TileCache = CACHE) -> None:
        self.size, self.cache = size, cache
        self.owner = next(_owners)
        weakref.finalize(self, cache.drop, self.owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,)

    def read(self, image: TiledPixels, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A region as a new array, as in `StoredPixels.read`; all calls must have the same `image`."""
        out = np.empty((*image.shape[:-2], bottom - top, right - left), image.dtype)
        if not out.size:
            return out

        def paste(index: tuple[int, int]) -> None:
            tile = self._tile(image, *index)
            y, x = index[0] * self.size[0], index[1] * self.size[1]
            rows = max(y, top), min(y + self.size[0], bottom)
            columns = max(x, left), min(x + self.size[1], right)
            part = tile[..., rows[0] - y : rows[1] - y, columns[0] - x : columns[1] - x]
            goal = out[..., rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
            if part.shape != goal.shape:
                raise DataError(
                    f"{image.name}: tile {index} has shape {tile.shape}, less than {goal.shape}; it is damaged"
                )
            goal[...] = part

        height, width = self.size
        rows, columns = range(top // height, -(-bottom // height)), range(left // width, -(-right // width))
        indices = list(itertools.product(rows, columns))
        missing = [index for index in indices if self.cache.get((self.owner, index)) is None]
        if len(missing) < 2:
            list(map(paste, indices))
        else:
            with ThreadPoolExecutor(min(8, available_cpus()), "gigamorph-tiles") as pool:
                list(pool.map(paste, indices))
        return out

    def _tile(self, image: TiledPixels, row: int, column: int) -> np.ndarray:
        key = (self.owner, (row, column))
        tile = self.cache.get(key)
        if tile is None:
            tile = image.tile(row, column)
            self.cache.put(key, tile)
        return tile


class TiledPixels(StoredPixels):
    """Stored pixels of a file format that is read tile by tile; a base class."""

    _grid: TileGrid

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return self._grid.read(self, top, bottom, left, right)

    def tile(self, row: int, column: int) -> np.ndarray:
        """The pixels of a tile, as in `read`; at the lower and right border it may exceed the image."""
        raise NotImplementedError
