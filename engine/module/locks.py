"""Locks for threads that share an accelerated network or the random generators.

State between calls (recorded programs, spare pages, captured tiles) serves one step at a time. A forward, and the
backward of each of its stages, therefore locks the network.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import GigamorphError

# Held while the process's random generators have a tile's state: all networks share them.
RANDOM = threading.RLock()

Lock = Any  # threading.RLock is a function

_LOCKS: WeakKeyDictionary[Any, Lock] = WeakKeyDictionary()
_MAKING = threading.Lock()
_thread = threading.local()


@contextlib.contextmanager
def exclusive(net: Any) -> Iterator[None]:
    """Lock a network for this thread; other threads wait."""
    with _MAKING:
        lock = _LOCKS.setdefault(net, threading.RLock())
    with lock, _held(lock):
        yield


def current() -> Lock | None:
    """The lock of the network that runs in this thread; its backward needs it."""
    return getattr(_thread, "lock", None)


@contextlib.contextmanager
def reacquire(lock: Lock | None) -> Iterator[None]:
    """Lock the network again for the backward.

    Raises:
        GigamorphError: another thread holds the lock, and this is a thread of autograd. Waiting could deadlock, because
            the other forward may need autograd's threads too.
    """
    if lock is None:
        yield
        return
    autograds = isinstance(threading.current_thread(), threading._DummyThread)  # pyright: ignore
    if not lock.acquire(blocking=not autograds):
        raise GigamorphError(
            "two threads use one accelerated network at the same time; hold a lock around forward and backward, or "
            "call accelerate(model) in each thread"
        )
    try:
        with _held(None):  # nested forwards and backwards, perhaps in autograd's threads, run under this lock
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _held(lock: Lock | None) -> Iterator[None]:
    before = current()
    _thread.lock = lock
    try:
        yield
    finally:
        _thread.lock = before


def drawn() -> int:
    """A hash of the state of the CPU's random generator."""
    return hash(torch.get_rng_state().numpy().tobytes())


def check_drawn(before: int) -> None:
    """Check that a second computation drew the same random numbers as the first.

    Args:
        before: `drawn()` after the first computation.

    Raises:
        GigamorphError: another thread drew numbers from the global generator in between.
    """
    if drawn() != before:
        raise GigamorphError(
            "another thread drew torch random numbers while the network drew its own (dropout), so the backward cannot "
            "repeat them; use a separate torch.Generator in that thread, or let it wait for the step"
        )
