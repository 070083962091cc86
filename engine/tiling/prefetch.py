"""Pixels read ahead of need: while one tile is computed, the next one's are read, converted and uploaded.

One thread of its own reads, so a source is never read by two at once. On a CUDA device it uploads from pinned memory on
a stream of its own, and the computing stream waits for the copy, not the host. The upload stream waits for what the
thread that made the `Prefetch`, and the source itself, have begun on the device before: a source may read from there.

On the CPU all cores compute, and one thread more makes each op wait for the one of its threads that lost its core:
reading ahead pays where it takes long, as of compressed or remote files. Until a read has, pixels are read when they
are needed.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .halos import Rect

_NAME = "gigamorph-pixels"
_LONG = 0.01  # seconds of a read; with a thread for reads of 0.3 to 1 ms lesionnet's step took 1.4 times as long


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
        self.ahead = self.stream is not None
        self.now: dict[tuple[int, Rect], Future[tuple[Tensor, Any]] | None] = {}
        self.next = self._begin()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        if "thread" in vars(self):
            self.thread.shutdown(cancel_futures=True)

    @functools.cached_property
    def thread(self) -> ThreadPoolExecutor:
        """What reads ahead, from when it is first needed."""
        return ThreadPoolExecutor(1, _NAME) if self.stream is not None else _reader()

    def advance(self) -> None:
        """The next tile begins: the one after it is read from now on."""
        self.now = {rect: begun or self._submit(rect) for rect, begun in self.next.items()}
        self.next = self._begin()

    def __call__(self, source: int, rect: Rect) -> Tensor:
        """The pixels of a rectangle of the tile that has begun; reading errors are raised here."""
        begun = self.now.pop((source, rect)) or self._submit((source, rect))
        if begun is None:
            return self._read_here(source, rect)
        pixels, uploaded = begun.result()
        if uploaded is not None:
            stream = torch.cuda.current_stream(pixels.device)
            stream.wait_event(uploaded)
            pixels.record_stream(stream)
        return pixels

    def _begin(self) -> dict[tuple[int, Rect], Future[tuple[Tensor, Any]] | None]:
        return {rect: self._submit(rect) for rect in next(self.tiles, [])}

    def _submit(self, rect: tuple[int, Rect]) -> Future[tuple[Tensor, Any]] | None:
        return self.thread.submit(self._read, *rect) if self.ahead else None

    def _read_here(self, source: int, rect: Rect) -> Tensor:
        """In the modes that a thread of its own would read in; a read that takes long is the last one here."""
        began = time.perf_counter()
        with _no_modes(self.device):
            pixels, _ = self._read(source, rect)
        self.ahead = time.perf_counter() - began > _LONG
        return pixels

    def _read(self, source: int, rect: Rect) -> tuple[Tensor, Any]:
        pixels = self.fetch(source, rect)
        if self.stream is None:
            return self.convert(source, pixels), None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # this thread's, that the source has used
        with torch.cuda.stream(self.stream):
            pixels = self.convert(source, pixels if pixels.is_cuda else pixels.pin_memory())
            return pixels, self.stream.record_event()


@contextlib.contextmanager
def _no_modes(device: torch.device) -> Iterator[None]:
    """As in a thread of its own, but without gradients: what a source makes, and may keep, is of no mode of others."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield


def _reader() -> ThreadPoolExecutor:
    """A thread that reads, and computes by itself alone.

    With threads of its own beside those that compute the tiles, more threads would wait for each other than there are
    cores: on two cores lesionnet's step took twice the time.
    """
    count = torch.get_num_threads()
    reader = ThreadPoolExecutor(1, _NAME)
    reader.submit(torch.get_num_threads).result()  # the first call of a thread takes the process's number
    reader.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(count)  # what threads that begin later take; the reader keeps its own
    return reader


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: PyTorch deals out 32 streams in turn, and a new one for each would meet that of captures."""
    return torch.cuda.Stream(device)
