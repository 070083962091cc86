"""Threads that share an accelerated network take turns, and threads that draw random numbers by tile do so too.

What a network keeps between calls (recorded programs, spare pages, captured tiles) serves one step at a time, so that
a forward, and the backward of each of its stages, has the network for itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import GigamorphError

# Held while the generators of the process are set to a tile's numbers: networks have those in common.
RANDOM = threading.RLock()

Lock = Any  # threading.RLock is a function

_LOCKS: WeakKeyDictionary[Any, Lock] = WeakKeyDictionary()
_MAKING = threading.Lock()
_here = threading.local()


@contextlib.contextmanager
def turn(net: Any) -> Iterator[None]:
    """This thread's turn with a network; others wait."""
    with _MAKING:
        lock = _LOCKS.setdefault(net, threading.RLock())
    with lock, _held(lock):
        yield


def current() -> Lock | None:
    """The lock of the network whose forward runs in this thread, for its backward."""
    return getattr(_here, "lock", None)


@contextlib.contextmanager
def again(lock: Lock | None) -> Iterator[None]:
    """A turn for the backward of what was computed in an earlier one.

    Raises:
        GigamorphError: if another thread has it, and waiting might not end: autograd's own threads serve the forward,
            too, that they would wait for.
    """
    if lock is None:
        yield
        return
    autograds = isinstance(threading.current_thread(), threading._DummyThread)  # pyright: ignore
    if not lock.acquire(blocking=not autograds):
        raise GigamorphError(
            "two threads use one accelerated network at the same time; hold a lock of yours around forward and "
            "backward, or give each thread its own accelerate(model)"
        )
    try:
        with _held(None):  # what is computed and differentiated within, maybe by autograd's threads, has this turn
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _held(lock: Lock | None) -> Iterator[None]:
    before = current()
    _here.lock = lock
    try:
        yield
    finally:
        _here.lock = before


def drawn() -> int:
    """Tells the state of the CPU's generator from others."""
    return hash(torch.get_rng_state().numpy().tobytes())


def check_drawn(before: int) -> None:
    """Refuse a second computation that has not drawn what the first one drew, told by `drawn()` after it.

    Raises:
        GigamorphError: threads that draw numbers with `torch.rand` and the like have come in between.
    """
    if drawn() != before:
        raise GigamorphError(
            "another thread drew torch random numbers while the network drew its own (dropout), so that the backward "
            "cannot draw them again; let that thread use a torch.Generator of its own, or wait for the step"
        )
