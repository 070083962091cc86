"""Pixels read ahead of need: while one tile is computed, the next one's are read, converted and uploaded.

One thread of its own reads, so a source is never read by two at once. On a CUDA device it uploads from pinned memory on
a stream of its own, and the computing stream waits for the copy, not the host. The upload stream waits for what the
thread that made the `Prefetch`, and the source itself, have begun on the device before: a source may read from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .halos import Rect


class Prefetch:
    """Reads the rectangles of one tile after the other. Call it with a source and a rectangle for its pixels.

    Args:
        fetch: reads a rectangle of a source and returns its pixels where they are.
        convert: moves them to the device, dtype and memory order they are computed in.
        device: that device.
        tiles: the sources and rectangles of each tile, in the order in which tiles are computed.
    """

    def __init__(
        self,
        fetch: Callable[[int, Rect], Tensor],
        convert: Callable[[int, Tensor], Tensor],
        device: torch.device,
        tiles: Iterable[list[tuple[int, Rect]]],
    ):
        self.fetch, self.convert, self.tiles = fetch, convert, iter(tiles)
        self.device = device
        self.stream = _upload_stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.thread = ThreadPoolExecutor(1, "gigamorph-pixels")
        self.now: dict[tuple[int, Rect], Future[tuple[Tensor, Any]]] = {}
        self.next = self._begin()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def advance(self) -> None:
        """The next tile begins: the one after it is read from now on."""
        self.now, self.next = self.next, self._begin()

    def __call__(self, source: int, rect: Rect) -> Tensor:
        """The pixels of a rectangle of the tile that has begun; reading errors are raised here."""
        pixels, uploaded = self.now.pop((source, rect)).result()
        if uploaded is not None:
            stream = torch.cuda.current_stream(pixels.device)
            stream.wait_event(uploaded)
            pixels.record_stream(stream)
        return pixels

    def _begin(self) -> dict[tuple[int, Rect], Future[tuple[Tensor, Any]]]:
        return {(source, rect): self.thread.submit(self._read, source, rect) for source, rect in next(self.tiles, [])}

    def _read(self, source: int, rect: Rect) -> tuple[Tensor, Any]:
        pixels = self.fetch(source, rect)
        if self.stream is None:
            return self.convert(source, pixels), None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # this thread's, that the source has used
        with torch.cuda.stream(self.stream):
            pixels = self.convert(source, pixels if pixels.is_cuda else pixels.pin_memory())
            return pixels, self.stream.record_event()


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: PyTorch deals out 32 streams in turn, and a new one for each would meet that of captures."""
    return torch.cuda.Stream(device)
