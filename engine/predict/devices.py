"""Computes on one device in this process, or on several devices, each in a process that reads ahead for itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..errors import BudgetError, DataError, GigamorphError
from ..train.options import Precision
from ..train.run import AUTOCAST
from .decoders import Ahead, Opened, end_with
from .job import Result, Start, Unit
from .rows import Work

_GRACE = 5.0
"""Seconds that a process has to end before it is killed."""


@dataclass(frozen=True)
class Outcome:
    """The result or the error of an image."""

    work: Work
    result: Result | None = None
    error: GigamorphError | None = None
    waited: float = 0.0
    """Seconds that the device was idle before it got this image."""


@dataclass(frozen=True)
class DeviceSettings:
    """How each device reads images ahead, and computes.

    Attributes:
        workers: reading processes; 0 reads in the computing process.
        staging: folder for downloaded files.
        forgiving: whether an unexpected error of reading is recorded as that image's failure; otherwise it is raised.
        device: "cpu" or "cuda".
        precision: "bf16" and "fp16" use autocast.
    """

    workers: int
    staging: Path
    forgiving: bool
    device: str = "cpu"
    precision: Precision = "fp32"

    @property
    def depth(self) -> int:
        """Number of images that are requested ahead."""
        return self.workers + 2 if self.workers else 1


def compute_here(
    unit: Unit,
    settings: DeviceSettings,
    work: Iterator[Work],
    before: Callable[[Opened], object] = lambda opened: None,
    more: Callable[[], bool] = lambda: True,
) -> Generator[Outcome, None, None]:
    """Compute in this process; yields outcomes in order.

    Args:
        unit: computes an image.
        settings: of the device.
        work: the images.
        before: called with each image before it is computed.
        more: see `Ahead`.
    """
    waited, dtype = 0.0, AUTOCAST.get(settings.precision)
    with Ahead(unit.open, settings.workers, settings.depth, settings.staging) as ahead:
        for opened in ahead(work, more):
            if opened.fault and not settings.forgiving:
                raise RuntimeError(f"{opened.work.row.name}: reading it failed:\n{opened.fault}")
            result, error = None, opened.error
            if error is None:
                before(opened)
                try:
                    with torch.autocast(settings.device, dtype) if dtype else nullcontext():
                        result = unit(opened)
                except (DataError, BudgetError) as own:
                    error = own
                finally:
                    opened.close()
            yield Outcome(opened.work, result, error, ahead.waited - waited)
            waited = ahead.waited


def compute_in_processes(
    start: Start, settings: DeviceSettings, work: Iterator[Work], devices: int
) -> Generator[Outcome, None, None]:
    """Compute in a process per device; yields outcomes in the order of completion.

    Args:
        start: makes the unit of a process.
        settings: of each process; device "cuda" takes a GPU per process.
        work: the images.
        devices: number of processes.

    Raises:
        GigamorphError: if a process raised it, or died.
        RuntimeError: for an unexpected error, with its traceback.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, threads // devices)
    processes = _start_processes(start, settings, devices, threads)
    given: dict[Connection, dict[str, Work]] = {pipe: {} for pipe in processes}

    def give(pipe: Connection) -> None:
        one = next(work, None)
        with suppress(OSError):  # it has died, which the next recv reports
            pipe.send(one)
        if one is not None:
            given[pipe][one.key] = one

    working = set(processes)
    try:
        for _ in range(settings.depth + 2):
            for pipe in processes:
                give(pipe)
        while working:
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                try:
                    kind, key, value, waited = ready.recv()
                except (EOFError, OSError):
                    raise _process_error(processes[ready]) from None
                if kind == "end":
                    working.discard(ready)
                elif kind == "fault":
                    raise value if isinstance(value, GigamorphError) else RuntimeError(value)
                else:
                    one = given[ready].pop(key)
                    give(ready)
                    failed = kind == "error"
                    yield Outcome(one, None if failed else value, value if failed else None, waited)
    finally:
        for pipe, process in processes.items():
            if pipe in working:
                process.terminate()
        for pipe, process in processes.items():
            process.join(_GRACE)
            process.kill()
            process.join()
            pipe.close()


def _start_processes(start: Start, settings: DeviceSettings, devices: int, threads: int) -> dict[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    # A terminal sends Ctrl-C to all processes: the children inherit that it is ignored, and this process ends them.
    main = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        for number in range(devices):
            here, there = context.Pipe()
            own = there, start, settings, number, threads, os.getpid()
            process = context.Process(target=_device, args=own, name=f"device {number}")
            process.start()
            there.close()
            processes[here] = process
    finally:
        if former is not None:
            signal.signal(signal.SIGINT, former)
    return processes


def _process_error(process: Any) -> GigamorphError:
    process.join()
    code = process.exitcode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = "; it may have run out of memory" if code == -signal.SIGKILL else ""
    return GigamorphError(f"the process of {process.name} {how}{hint}; results so far are stored, --resume continues")


def _device(pipe: Connection, start: Start, settings: DeviceSettings, number: int, threads: int, parent: int) -> None:
    end_with(parent)
    torch.set_num_threads(threads)
    last: tuple[str, str, Any, float] = ("end", "", None, 0.0)
    try:
        if settings.device == "cuda":
            torch.cuda.set_device(number)
        given = iter(pipe.recv, None)
        for outcome in compute_here(start(device=settings.device), settings, given, more=pipe.poll):
            failed = outcome.error is not None
            value = outcome.error if failed else outcome.result
            pipe.send(("error" if failed else "result", outcome.work.key, value, outcome.waited))
    except GigamorphError as error:
        last = "fault", "", error, 0.0
    except Exception:
        said = f"the process of {multiprocessing.current_process().name} failed:\n{traceback.format_exc()}"
        last = "fault", "", said, 0.0
    with suppress(OSError):  # the parent has ended
        pipe.send(last)
    # Exit immediately: Python would wait for the reading processes, which wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
