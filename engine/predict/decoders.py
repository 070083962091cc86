"""Reads and decodes images ahead in separate processes, in order, so that a GPU does not wait for decoders.

The stored pixels of an image are transferred once. Larger images are transferred as a source, whose regions are read
where they are computed. Remote files (`Row.url`) are also read by region, or downloaded if that is not possible.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets.grey import odd_grey
from ..datasets.tables import Record
from ..errors import DataError, GigamorphError
from ..images.dicomweb import remote_file
from ..images.pixels import ImageSource, stored_source
from ..images.rawfile import one_line
from ..images.stored import ArrayPixels
from .rows import Work, fetch

LARGEST = 2**28
"""Maximum stored bytes of an image that is decoded ahead; larger images are read by region."""

Open = Callable[[Record, Work], dict[str, Any]]
"""See `job.Unit.open`."""


@dataclass(frozen=True)
class Opened:
    """An opened image, or the error of opening it."""

    work: Work
    item: dict[str, Any] | None = None
    """The result of `job.Unit.open`."""
    error: GigamorphError | None = None
    staged: Path | None = None
    """Folder of a downloaded copy that the item still reads."""
    fault: str = ""
    """The traceback of an unexpected error."""
    odd: str = ""
    """`odd_grey` of the image; empty for images larger than `LARGEST`."""

    def close(self) -> None:
        """Delete the downloaded copy, after the image is done."""
        if self.staged is not None:
            shutil.rmtree(self.staged, ignore_errors=True)


class Ahead:
    """A context manager; a call with work yields the opened images in order.

    Args:
        open_image: opens a record of the work.
        workers: processes; 0 opens each image on demand in this process, and decodes it when it is read.
        depth: number of images that are requested ahead.
        staging: folder for downloaded files.

    Attributes:
        waited: seconds that the caller has waited.
    """

    def __init__(self, open_image: Open, workers: int, depth: int, staging: Path) -> None:
        self._open, self._depth, self._staging = open_image, depth, staging
        self._workers = workers if "fork" in multiprocessing.get_all_start_methods() else 0
        self._pool: ProcessPoolExecutor | None = None
        self.waited = 0.0

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is not None:
            # Python waits for running decoders at exit anyway, and fails if a pool is just ending then.
            self._pool.shutdown(wait=kind is None or issubclass(kind, Exception), cancel_futures=True)

    def __call__(self, work: Iterable[Work], more: Callable[[], bool] = lambda: True) -> Iterator[Opened]:
        """The opened images of the work.

        Args:
            work: the images to open.
            more: whether the next work, or the end, is available immediately.
        """
        if not self._workers:
            for one in work:
                began = time.monotonic()
                opened = _opened(self._open, one, self._staging, whole=False)
                self.waited += time.monotonic() - began
                yield opened
            return
        work = iter(work)
        pending: deque[tuple[Work, Future[Opened]]] = deque()
        while True:
            # Waiting for more work while some is pending could deadlock with a sender that waits for results.
            one = next(work, None) if more() or not pending else None
            if one is not None:
                pending.append((one, self._submit(one)))
            elif not pending:
                return
            if len(pending) >= self._depth or one is None:
                yield self._next(pending)

    def _submit(self, one: Work) -> Future[Opened]:
        if self._pool is None:
            self._pool = self._new_pool(self._workers)
        try:
            return self._pool.submit(_in_worker, one)
        except BrokenProcessPool as error:  # a worker has just crashed; earlier futures fail as well
            crashed: Future[Opened] = Future()
            crashed.set_exception(error)
            return crashed

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        # Forked processes inherit the arguments; they are not pickled.
        given = self._open, self._staging, os.getpid()
        return ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=given
        )

    def _next(self, pending: deque[tuple[Work, Future[Opened]]]) -> Opened:
        began = time.monotonic()
        one, future = pending.popleft()
        try:
            found = future.result()
        except BrokenProcessPool:
            # A crash cancels all pending work: this image is repeated alone, the others are resubmitted.
            assert self._pool is not None
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            found = self._open_separately(one)
            waiting = [other for other, _ in pending]
            pending.clear()
            pending.extend((other, self._submit(other)) for other in waiting)
        self.waited += time.monotonic() - began
        return found

    def _open_separately(self, one: Work) -> Opened:
        with self._new_pool(1) as pool:
            try:
                return pool.submit(_in_worker, one).result()
            except BrokenProcessPool:
                said = "reading it ended the process; the file is damaged or memory is too small; download it again"
                return Opened(one, error=DataError(f"{one.row.name}: {said}"))


_given: tuple[Open, Path] | None = None  # arguments of a worker


def _start_worker(open_image: Open, staging: Path, parent: int) -> None:
    global _given
    _given = open_image, staging
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process when its parent has ended, perhaps by a kill: otherwise it would wait for its queue forever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(one: Work) -> Opened:
    assert _given is not None
    open_image, staging = _given
    return _opened(open_image, one, staging, whole=True)


def _opened(open_image: Open, one: Work, staging: Path, *, whole: bool) -> Opened:
    """Download an image if necessary, open it and, if `whole`, decode it."""
    record, staged = one.row.record, None
    try:
        if one.row.url:
            remote: Any = remote_file(one.row.url)
            if remote is None:
                staged = Path(tempfile.mkdtemp(dir=staging))
                remote = fetch(one.row.url, staged)
            record = replace(record, path=remote)
        item = open_image(record, one)
        source = stored_source(item["image"])
        decoded, odd = False, ""
        if source is not None and _size(source) <= LARGEST:
            if whole or staged is not None:
                source.stored, decoded = DecodedPixels(source, one.row.name), True
            odd = odd_grey(source) if source.shape[0] == 1 else ""  # only grey images are judged
    except Exception as error:
        known = isinstance(error, GigamorphError)
        text = str(error) if known else f"{one.row.name}: cannot be read ({type(error).__name__}: {one_line(error)})"
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
            text = text.replace(str(record.path), one.row.url)
        kind = type(error) if known else DataError
        return Opened(one, error=kind(text), fault="" if known else traceback.format_exc())
    opened = Opened(one, item, staged=staged, odd=odd)
    if decoded:
        opened.close()
    return opened


def _size(source: ImageSource) -> int:
    """Bytes of the pixels as stored."""
    return math.prod(source.stored.shape) * np.dtype(str(source.stored.dtype).removeprefix("torch.")).itemsize


class DecodedPixels(ArrayPixels):
    """Decoded pixels of a file, which can be sent to other processes without the file."""

    def __init__(self, source: ImageSource, name: str) -> None:
        stored = source.stored
        height, width = stored.shape[-2:]
        super().__init__(stored.read(0, height, 0, width), name)
        self.dtype, self.to_original, self.self_describing = stored.dtype, stored.to_original, stored.self_describing
        self.info = getattr(stored, "info", None)
        # Some values are only known after pixels are read, and take time.
        self.table, self.full, self.steps = stored.table, stored.full, stored.steps
        self._flips = stored.flips() if source.flip == "auto" and source.laterality is None else (False, False)
        _ = source.full, source.to_original

    def flips(self) -> tuple[bool, bool]:
        return self._flips
