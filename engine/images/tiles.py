"""Images stored in tiles: a region decodes the tiles it touches, in threads, and keeps them for its neighbours.

The cache is one for the process, so that its limit holds however many files are open. A scan goes along a row of tiles
and straddles file tiles at their borders; the limit holds the decoded tiles of such a row.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ..errors import DataError

_Key = tuple[int, tuple[int, int]]


class TileCache:
    """Decoded tiles, the least recently used dropped as soon as they take more than `limit` bytes; thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._tiles: OrderedDict[_Key, np.ndarray] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes

    def keys(self, owner: int) -> list[tuple[int, int]]:
        """(row, column) of the tiles held for one image, the least recently used first."""
        with self._lock:
            return [place for image, place in self._tiles if image == owner]

    def get(self, key: _Key) -> np.ndarray | None:
        """A tile, or None."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
            return self._tiles.get(key)

    def put(self, key: _Key, tile: np.ndarray) -> None:
        """Keep a tile; one that is larger than the limit is not kept."""
        if tile.nbytes > self.limit:
            return
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = tile
                self._bytes += tile.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._tiles.popitem(last=False)[1].nbytes

    def drop(self, owner: int) -> None:
        """Forget the tiles of one image."""
        with self._lock:
            for key in [key for key in self._tiles if key[0] == owner]:
                self._bytes -= self._tiles.pop(key).nbytes


CACHE = TileCache(256 * 2**20)

_owners = itertools.count()
_threads: ThreadPoolExecutor | None = None
_threads_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    """The threads that decode."""
    global _threads
    with _threads_lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "gigamorph-tiles")
        return _threads


def _after_fork() -> None:
    """A forked process has none of its parent's threads, and locks that they held stay locked."""
    global _threads, _threads_lock
    _threads, _threads_lock = None, threading.Lock()
    CACHE.__init__(CACHE.limit)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Tiled(Protocol):
    """What a file format offers to be read tile by tile."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def name(self) -> str: ...

    def tile(self, row: int, column: int) -> np.ndarray:
        """(channels, rows, columns) of one tile; those at the lower and right border may reach beyond the image."""
        ...


class TileGrid:
    """Reads regions of an image (channels, height, width) that is stored in tiles of `size` (rows, columns)."""

    def __init__(self, size: tuple[int, int], cache: TileCache = CACHE) -> None:
        self.size, self.cache = size, cache
        self.owner = next(_owners)
        weakref.finalize(self, cache.drop, self.owner)

    def read(self, image: Tiled, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """(channels, bottom - top, right - left), fresh; `image` is always the same one."""
        out = np.empty((image.shape[0], bottom - top, right - left), image.dtype)
        if not out.size:
            return out

        def paste(place: tuple[int, int]) -> None:
            tile = self._tile(image, *place)
            y, x = place[0] * self.size[0], place[1] * self.size[1]
            rows = max(y, top), min(y + self.size[0], bottom)
            columns = max(x, left), min(x + self.size[1], right)
            part = tile[:, rows[0] - y : rows[1] - y, columns[0] - x : columns[1] - x]
            goal = out[:, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
            if part.shape != goal.shape:
                raise DataError(
                    f"{image.name}: tile {place} has shape {tile.shape}, at least {goal.shape} expected; it is damaged"
                )
            goal[...] = part

        places = list(self._touched(top, bottom, left, right))
        missing = [place for place in places if self.cache.get((self.owner, place)) is None]
        _each(paste, places) if len(missing) > 1 else [paste(place) for place in places]
        return out

    def _touched(self, top: int, bottom: int, left: int, right: int) -> Iterator[tuple[int, int]]:
        height, width = self.size
        return itertools.product(range(top // height, -(-bottom // height)), range(left // width, -(-right // width)))

    def _tile(self, image: Tiled, row: int, column: int) -> np.ndarray:
        key = (self.owner, (row, column))
        tile = self.cache.get(key)
        if tile is None:
            tile = image.tile(row, column)
            self.cache.put(key, tile)
        return tile


def _each(task: Callable[[tuple[int, int]], None], places: list[tuple[int, int]]) -> None:
    """All of them in threads; the first error is raised once no thread is at work on `places` any more."""
    futures = [_pool().submit(task, place) for place in places]
    errors = []
    for future in futures:
        if errors:
            future.cancel()
        if not future.cancelled() and (error := future.exception()) is not None:
            errors.append(error)
    if errors:
        raise errors[0]
