"""A registry of a process group: which processes have started or failed, so that errors name the responsible process.

PyTorch's own errors name a connection. Each process registers in a store of `torch.distributed` when it starts and when
it fails. A process that did neither before the timeout of the others is the cause.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import GigamorphError

_MOMENT = 5.0
"""Seconds within which all processes that wait for the same process fail."""
# Errors of gloo, NCCL and the store if another process has ended or is late; most have no class of their own.
_LOST = re.compile(
    r"gloo|NCCL|Timed out|timed out|Connection (closed|reset|refused)|Broken pipe|Socket [Tt]imeout|recvValue", re.I
)


class Roll:
    """The registry of a group; created by `meet`.

    Attributes:
        store: the store of this group.
        again: whether the launcher has started another group before.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, again: bool) -> None:
        self.store, self._rank, self._size, self._timeout, self.again = store, rank, size, timeout, again

    def end(self, error: BaseException) -> None:
        """Register that this process has failed."""
        text = "" if is_lost(error) else " ".join(f"{error}".split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):  # the store ended with the process that hosted it
            if _is_late(error):
                self.store.set("late", "")
            self.store.set(f"end/{self._rank}", text)

    def blame(self, error: BaseException) -> str:
        """A one-line message that names the processes that caused an error, and what to do."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        ends: dict[int, str] = {}
        until = time.monotonic() + _MOMENT
        try:
            while time.monotonic() < until and len(ends) < len(others):
                for rank in others:
                    if rank not in ends and self.store.check([f"end/{rank}"]):
                        ends[rank] = self.store.get(f"end/{rank}").decode()
                        until = min(until, time.monotonic() + _MOMENT if ends[rank] else until)
                if any(ends.values()):
                    break
                time.sleep(0.05)
            silent = [rank for rank in others if rank not in ends]
            nodes = {rank: self.store.get(f"here/{rank}").decode() for rank in others}
            # A process that times out closes its connections, and others see only that.
            late = _is_late(error) or self.store.check(["late"])
        except RuntimeError:
            return f"process 0 of {self._size}, which hosts the store, has ended{_advice(_is_late(error))}"
        failed = [
            f"process {rank} of {self._size} ({nodes[rank]}) failed: {text}" for rank, text in ends.items() if text
        ]
        if failed:
            return "; ".join(failed)
        if not silent:
            return f"the {self._size} processes have lost each other ({_brief(error)}){_advice(late)}"
        names = ", ".join(f"process {rank} of {self._size} ({nodes[rank]})" for rank in silent)
        what = (
            f"gave no answer within {_span(self._timeout)}: it hangs or has far larger images" if late else "has ended"
        )
        return f"{names} {what}{_advice(late)}"


def meet(rank: int, size: int, timeout: timedelta) -> Roll:
    """Register this process, and wait until all processes have registered.

    A launcher that restarts processes reuses its store, which still contains entries of dead processes, and torchrun's
    restart counts differ between nodes. So the first process creates a new name for the group, and sends it to each
    process that asks with a unique token.

    Raises:
        GigamorphError: naming the processes that have not started in time.
    """
    try:
        store = _store(rank, size, timeout)
    except (RuntimeError, ValueError) as error:
        raise GigamorphError(
            f"process {rank} of {size} cannot reach the store of the group ({_brief(error)}); check MASTER_ADDR, "
            "MASTER_PORT, and process 0"
        ) from error
    store.set_timeout(timeout)
    word, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if not rank:
        name = f"{word}-{store.add('groups', 1)}"
    else:
        store.set(f"asks/{rank}", word)
        try:
            name = store.get(f"answer/{word}").decode()
        except RuntimeError as error:
            raise _absent([0], size, timeout) from error
    again = not name.endswith("-1")
    roll = Roll(dist.PrefixStore(name, store), rank, size, timeout, again)
    roll.store.set(f"here/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
    answered: set[str] = set()
    while absent := [other for other in range(size) if not roll.store.check([f"here/{other}"])]:
        for other in absent if not rank else []:
            if store.check([f"asks/{other}"]) and (asked := store.get(f"asks/{other}").decode()) not in answered:
                store.set(f"answer/{asked}", name)
                answered.add(asked)
        if time.monotonic() > until:
            raise _absent(absent, size, timeout)
        time.sleep(0.01)
    return roll


def _store(rank: int, size: int, timeout: timedelta) -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # PyTorch's own rendezvous would prefix all keys with the node's restart count.
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore("gigamorph", dist.TCPStore(*place, is_master=False, timeout=timeout))
    return next(rendezvous("env://", rank, size, timeout=timeout))[0]


def _absent(ranks: Sequence[int], size: int, timeout: timedelta) -> GigamorphError:
    return GigamorphError(
        f"process {', '.join(map(str, ranks))} of {size} did not start within {_span(timeout)}; check that all were "
        "started, or use a longer --timeout"
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process has ended or is late."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None
    )


def _is_late(error: BaseException) -> bool:
    """Whether an error means that another process did not answer in time."""
    return is_lost(error) and re.search(r"timed? ?out", str(error), re.I) is not None


def _advice(late: bool) -> str:
    longer = "; a longer --timeout waits longer" if late else ""
    return f"{longer}; --resume continues from the last checkpoint"


def _brief(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _span(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"
