"""Images read and decoded ahead in processes of their own, in order, so that a GPU waits for no decoder.

What comes over is the image as its file stores it, once; images too large for that come as their source and are read by
region where they are computed. Files of other places than this machine (`Row.url`) are read by region, too, or fetched
where that cannot be.
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
from torch import Tensor

from ..datasets.grey import odd_grey
from ..datasets.tables import Record
from ..errors import DataError, GigamorphError
from ..images.affine import Affine
from ..images.derived import stored_source
from ..images.dicomweb import remote_file
from ..images.pixels import ImageSource
from ..images.rawfile import one_line
from .rows import Work, fetch

LARGEST = 2**28
"""Bytes of an image, as stored, that is decoded ahead; larger ones are read by region."""
# Images that are read quickly go to a process several at a time: as many as take so many seconds, at most so many.
_BRIEF, _MOST = 0.02, 32

Open = Callable[[Record, Work], dict[str, Any]]
"""As `job.Unit.open`."""


@dataclass(frozen=True)
class Opened:
    """An image that is ready to be computed, or why it is not."""

    work: Work
    item: dict[str, Any] | None = None
    """As of `job.Unit.open`."""
    error: GigamorphError | None = None
    staged: Path | None = None
    """Folder of a fetched copy that the item still reads from."""
    fault: str = ""
    """The traceback of an unforeseen error."""
    bytes: int = 0
    """That were decoded ahead."""
    odd: str = ""
    """`odd_grey` of the image; empty for images larger than `LARGEST`."""
    seconds: float = 0.0
    """That reading it has taken."""

    def close(self) -> None:
        """The image is done."""
        if self.staged is not None:
            shutil.rmtree(self.staged, ignore_errors=True)


class Ahead:
    """A context manager; called with work, gives it opened, in order.

    Args:
        open_image: work's record -> its item.
        workers: processes; 0 opens each image when it is asked for, in this process, and decodes it when it is read.
        depth: images that are asked for before they are needed.
        staging: folder for files that are fetched.

    Attributes:
        waited: seconds that the caller was kept waiting.
    """

    def __init__(self, open_image: Open, workers: int, depth: int, staging: Path) -> None:
        self._open, self._depth, self._staging = open_image, depth, staging
        self._workers = workers if "fork" in multiprocessing.get_all_start_methods() else 0
        self._pool: ProcessPoolExecutor | None = None
        self._together = 1
        self.waited = 0.0

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is not None:
            # Python waits at its end for what is being decoded in any case, and trips over a pool that ends just then.
            self._pool.shutdown(wait=kind is None or issubclass(kind, Exception), cancel_futures=True)

    def __call__(self, work: Iterable[Work], more: Callable[[], bool] = lambda: True) -> Iterator[Opened]:
        """Work, opened.

        Args:
            more: whether the next piece of work, or the end, comes at once.
        """
        if not self._workers:
            for one in work:
                began = time.monotonic()
                opened = _opened(self._open, one, self._staging, whole=False)
                self.waited += time.monotonic() - began
                yield opened
            return
        work = iter(work)
        pending: deque[tuple[list[Work], Future[list[Opened]]]] = deque()
        while True:
            some = []
            # To wait for further work while some is done would be to wait for those who wait for that.
            while len(pending) < self._depth and len(some) < self._together and (more() or not (some or pending)):
                one = next(work, None)
                if one is None:
                    break
                some.append(one)
            if some:
                pending.append((some, self._submit(some)))
            elif not pending:
                return
            if len(pending) >= self._depth or not some:
                yield from self._next(pending)

    def _submit(self, some: list[Work]) -> Future[list[Opened]]:
        if self._pool is None:
            self._pool = self._new_pool(self._workers)
        try:
            return self._pool.submit(_in_worker, some)
        except BrokenProcessPool as error:  # a worker has crashed just now; those before this one are told as well
            crashed: Future[list[Opened]] = Future()
            crashed.set_exception(error)
            return crashed

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        # What a forked process needs to open images need not be sent to it.
        given = self._open, self._staging, os.getpid()
        return ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=given
        )

    def _next(self, pending: deque[tuple[list[Work], Future[list[Opened]]]]) -> list[Opened]:
        began = time.monotonic()
        some, future = pending.popleft()
        try:
            found = future.result()
        except BrokenProcessPool:
            # Whoever crashed took all that were under way along: these one by one, the others anew.
            assert self._pool is not None
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            found = [self._alone(one) for one in some]
            waiting = [others for others, _ in pending]
            pending.clear()
            pending.extend((others, self._submit(others)) for others in waiting)
        self.waited += time.monotonic() - began
        slowest = max(opened.seconds for opened in found)
        self._together = min(max(1, int(_BRIEF / max(slowest, 1e-6))), 2 * self._together, _MOST)
        return found

    def _alone(self, one: Work) -> Opened:
        with self._new_pool(1) as pool:
            try:
                return pool.submit(_in_worker, [one]).result()[0]
            except BrokenProcessPool:
                said = "reading it ended the process; the file is damaged, or memory too small; fetch it again"
                return Opened(one, error=DataError(f"{one.row.name}: {said}"))


_given: tuple[Open, Path] | None = None  # of a worker


def _start_worker(open_image: Open, staging: Path, parent: int) -> None:
    global _given
    _given = open_image, staging
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the one that computes ends the rest
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process when its parent has gone, killed perhaps: its queue would never end."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(some: list[Work]) -> list[Opened]:
    assert _given is not None
    open_image, staging = _given
    found, room = [], LARGEST
    for one in some:
        began = time.monotonic()
        opened = _opened(open_image, one, staging, whole=room > 0)
        found.append(replace(opened, seconds=time.monotonic() - began))
        room -= opened.bytes
    return found


def _opened(open_image: Open, one: Work, staging: Path, *, whole: bool) -> Opened:
    """An image, fetched and, if `whole`, decoded."""
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
        decoded, odd = 0, ""
        if source is not None and (size := _size(source)) <= LARGEST:
            if whole or staged is not None:
                source.stored, decoded = DecodedPixels(source, one.row.name), size
            odd = odd_grey(source)
    except Exception as error:
        known = isinstance(error, GigamorphError)
        text = str(error) if known else f"{one.row.name}: cannot be read ({type(error).__name__}: {one_line(error)})"
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
            text = text.replace(str(record.path), one.row.url)
        kind = type(error) if known else DataError
        return Opened(one, error=kind(text), fault="" if known else traceback.format_exc())
    opened = Opened(one, item, staged=staged, bytes=decoded, odd=odd)
    if decoded:
        opened.close()
    return opened


def _size(source: ImageSource) -> int:
    """Bytes of the pixels as stored."""
    return math.prod(source.stored.shape) * np.dtype(str(source.stored.dtype).removeprefix("torch.")).itemsize


class DecodedPixels:
    """What a file stores (`stored.StoredPixels`), held: it needs the file no more, and goes to other processes."""

    def __init__(self, source: ImageSource, name: str) -> None:
        stored = source.stored
        self.shape, self.dtype, self.name = stored.shape, stored.dtype, name
        self.to_original: Affine = stored.to_original
        self.self_describing = stored.self_describing
        self.info = getattr(stored, "info", None)
        _, height, width = stored.shape
        self.values = stored.read(0, height, 0, width)
        # Some are only known once pixels are read, and cost time.
        self.table, self.full, self.steps = stored.table, stored.full, stored.steps
        self._flips = stored.flips() if source.flip == "auto" and source.laterality is None else (False, False)
        _ = source.full, source.to_original

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        return self.values[:, top:bottom, left:right]

    def flips(self) -> tuple[bool, bool]:
        return self._flips
