"""Prefetching of pixels: while one tile is computed, the pixels of the next are read, converted and uploaded.

A single thread reads, so a source is never read concurrently. On a CUDA device it uploads from pinned memory on its own
stream, and the computing stream waits for the copy, not the host. A source may read from device memory: the upload
stream waits for kernels launched before by the source and by the thread that created the `Prefetch`.

On the CPU all cores compute, so an additional thread delays every op. Prefetching pays only if reads are slow, as for
compressed or remote files. Until a slow read is seen, pixels are read when they are needed.
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

from ..torch_private import without_dispatch_modes, without_torch_functions
from .halos import Rect

_NAME = "gigamorph-pixels"
_LONG = 0.01  # seconds of a slow read; a thread for reads of 0.3 to 1 ms made lesionnet's step 1.4 times as long


class Prefetch:
    """Reads the rectangles of consecutive tiles; calling it with a source and a rectangle returns the pixels.

    Args:
        fetch: reads a rectangle of a source and returns its pixels on the source's device.
        convert: moves pixels to `device` and converts them to the dtype and memory order of the computation.
        device: the device of the computation.
        tiles: (source, rectangle) pairs of each tile, in the order in which tiles are computed.
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
        self.next = self._submit_next()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        if "thread" in vars(self):
            self.thread.shutdown(cancel_futures=True)

    @functools.cached_property
    def thread(self) -> ThreadPoolExecutor:
        """The prefetching thread, started on first use."""
        return ThreadPoolExecutor(1, _NAME) if self.stream is not None else _reader()

    def advance(self) -> None:
        """Move to the next tile and start reading the one after it."""
        self.now = {rect: begun or self._submit(rect) for rect, begun in self.next.items()}
        self.next = self._submit_next()

    def __call__(self, source: int, rect: Rect) -> Tensor:
        """The pixels of a rectangle of the current tile; raises errors that occurred while reading."""
        begun = self.now.pop((source, rect)) or self._submit((source, rect))
        if begun is None:
            return self._read_here(source, rect)
        pixels, uploaded = begun.result()
        if uploaded is not None:
            stream = torch.cuda.current_stream(pixels.device)
            stream.wait_event(uploaded)
            pixels.record_stream(stream)
        return pixels

    def _submit_next(self) -> dict[tuple[int, Rect], Future[tuple[Tensor, Any]] | None]:
        return {rect: self._submit(rect) for rect in next(self.tiles, [])}

    def _submit(self, rect: tuple[int, Rect]) -> Future[tuple[Tensor, Any]] | None:
        return self.thread.submit(self._read, *rect) if self.ahead else None

    def _read_here(self, source: int, rect: Rect) -> Tensor:
        """Read in the calling thread; after a slow read, the prefetching thread takes over."""
        began = time.perf_counter()
        with _no_modes(self.device):
            pixels, _ = self._read(source, rect)
        self.ahead = time.perf_counter() - began > _LONG
        return pixels

    def _read(self, source: int, rect: Rect) -> tuple[Tensor, Any]:
        pixels = self.fetch(source, rect)
        if self.stream is None:
            return self.convert(source, pixels), None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # this thread's stream, which the source used
        with torch.cuda.stream(self.stream):
            pixels = self.convert(source, pixels if pixels.is_cuda else pixels.pin_memory())
            return pixels, self.stream.record_event()


@contextlib.contextmanager
def _no_modes(device: torch.device) -> Iterator[None]:
    """Context with the modes of a new thread, but without gradients.

    Tensors that a source creates, and may store, must not depend on the caller's modes.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        without_torch_functions(),
        without_dispatch_modes(),
    ):
        yield


def _reader() -> ThreadPoolExecutor:
    """A reading thread whose PyTorch ops use one thread.

    With more, its threads and those of the tiles would exceed the cores: on two cores lesionnet's step took twice as
    long.
    """
    count = torch.get_num_threads()
    reader = ThreadPoolExecutor(1, _NAME)
    reader.submit(torch.get_num_threads).result()  # a thread's first call adopts the process's number
    reader.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(count)  # the default of later threads; the reader is unaffected
    return reader


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """The upload stream of all passes.

    PyTorch assigns 32 streams round-robin, so new streams per pass would collide with that of captures.
    """
    return torch.cuda.Stream(device)
