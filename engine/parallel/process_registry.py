"""The roll of a process group: who has come, who has ended and why, so that an error names the process it is of.

PyTorch's own errors name a connection. Each process signs in a store of `torch.distributed` when it comes, and when it
fails; who did neither when the others have waited long enough is the one to look at.
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
"""Seconds in which processes that wait for the same one fail after each other."""
# What gloo, NCCL and the store say when another process is gone or late; most have no class of their own.
_LOST = re.compile(
    r"gloo|NCCL|Timed out|timed out|Connection (closed|reset|refused)|Broken pipe|Socket [Tt]imeout|recvValue", re.I
)


class Roll:
    """Who is in a group; made by `meet`.

    Attributes:
        store: of this group alone.
        again: the launcher has started another group before.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, again: bool) -> None:
        self.store, self._rank, self._size, self._timeout, self.again = store, rank, size, timeout, again

    def end(self, error: BaseException) -> None:
        """This process has failed."""
        text = "" if is_lost(error) else " ".join(f"{error}".split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):  # the store is gone, with the process that held it
            if _is_late(error):
                self.store.set("late", "")
            self.store.set(f"end/{self._rank}", text)

    def blame(self, error: BaseException) -> str:
        """In one line: which processes are to be looked at, and what to do."""
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
            told = {rank: self.store.get(f"here/{rank}").decode() for rank in others}
            # Who waits too long cuts its connections, and that is all that the next one sees.
            late = _is_late(error) or self.store.check(["late"])
        except RuntimeError:
            return f"process 0 of {self._size}, which keeps the roll, is gone{_advice(_is_late(error))}"
        failed = [
            f"process {rank} of {self._size} ({told[rank]}) failed: {text}" for rank, text in ends.items() if text
        ]
        if failed:
            return "; ".join(failed)
        if not silent:
            return f"the {self._size} processes have lost each other ({_brief(error)}){_advice(late)}"
        names = ", ".join(f"process {rank} of {self._size} ({told[rank]})" for rank in silent)
        what = (
            f"gave no answer within {_span(self._timeout)}: it hangs or has far larger images" if late else "has ended"
        )
        return f"{names} {what}{_advice(late)}"


def meet(rank: int, size: int, timeout: timedelta) -> Roll:
    """Sign, and wait until all have.

    A launcher that starts processes anew keeps its store, with what processes that are dead have left there, and
    torchrun's count of restarts is not the same on all nodes. So the first process names the group anew, and tells its
    name to who asks with a word that nobody has used before.

    Raises:
        GigamorphError: naming those that have not come in time.
    """
    try:
        store = _store(rank, size, timeout)
    except (RuntimeError, ValueError) as error:
        raise GigamorphError(
            f"process {rank} of {size} cannot reach the one that keeps the roll ({_brief(error)}); look at "
            "MASTER_ADDR, MASTER_PORT, and the first process"
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
        # PyTorch's own rendezvous would set the node's count of restarts before all keys.
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore("gigamorph", dist.TCPStore(*place, is_master=False, timeout=timeout))
    return next(rendezvous("env://", rank, size, timeout=timeout))[0]


def _absent(ranks: Sequence[int], size: int, timeout: timedelta) -> GigamorphError:
    return GigamorphError(
        f"process {', '.join(map(str, ranks))} of {size} did not come within {_span(timeout)}; see whether all were "
        "started, or give a longer --timeout"
    )


def is_lost(error: BaseException) -> bool:
    """Whether it says that another process is gone or late."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None
    )


def _is_late(error: BaseException) -> bool:
    """Whether another process did not answer in time."""
    return is_lost(error) and re.search(r"timed? ?out", str(error), re.I) is not None


def _advice(late: bool) -> str:
    longer = "; a longer --timeout waits longer" if late else ""
    return f"{longer}; --resume goes on from the last checkpoint"


def _brief(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _span(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"
