"""Launches processes that train together on one machine, and initializes their process group."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as torch_processes

from ..errors import GigamorphError
from ..torch_private import dynamo
from .process_registry import is_lost, meet

PATIENCE = 7200.0
"""Seconds that a process waits for another, which may have much larger images."""
_GRACE = 5.0
"""Seconds that processes have to end by themselves after one has failed, and again before they are killed."""
_STOPPING = {signal.SIGINT, signal.SIGTERM}


def launched() -> bool:
    """Whether a launcher (torchrun) has started this process."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def restarted() -> bool:
    """Whether a launcher (torchrun, Slurm) has restarted the group of this process after a failure."""
    return _again or os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


@contextlib.contextmanager
def process_group(device: str, timeout: float = PATIENCE) -> Iterator[None]:
    """Context of the process group of launched processes: gloo on the CPU, NCCL on GPUs, one GPU per process.

    Args:
        device: "cpu" or "cuda".
        timeout: seconds that a process waits for the others, at the start and in each collective.

    Raises:
        GigamorphError: naming the processes that did not start, ended, or did not answer in time; or if this machine
            has fewer GPUs than processes.
    """
    global _timeout, _again
    # Imported before the group exists: functions in it take the current group as a default. The group would outlive its
    # end, with threads that may abort the process when they lose the others.
    dynamo("config")

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        own = int(os.environ.get("LOCAL_RANK", rank))
        need_gpus(own + 1)
        torch.cuda.set_device(own)
    _timeout = timedelta(seconds=timeout)
    roll = meet(rank, size, _timeout)
    _again = roll.again
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = dist.PrefixStore("group", roll.store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_timeout)
        yield
    except BaseException as error:
        roll.end(error)
        if is_lost(error):
            raise GigamorphError(roll.blame(error)) from error
        raise
    finally:
        _neighbours.clear()
    dist.destroy_process_group()  # not after an error, which could deadlock


_timeout = timedelta(seconds=PATIENCE)
_again = False
_neighbours: dict[int, dist.ProcessGroup] = {}


def neighbours(number: int) -> dist.ProcessGroup:
    """The group of `number` processes with neighbouring ranks that contains this one; the first call is collective."""
    if number not in _neighbours:
        mine = None
        for first in range(0, dist.get_world_size(), number):
            ranks = list(range(first, first + number))
            group: Any = dist.new_group(ranks, timeout=_timeout)
            mine = group if dist.get_rank() in ranks else mine
        assert mine is not None
        _neighbours[number] = mine
    return _neighbours[number]


def need_gpus(number: int) -> None:
    """Raise an error if this machine has fewer GPUs."""
    if torch.cuda.device_count() < number:
        raise GigamorphError(f"{number} GPUs requested, but only {torch.cuda.device_count()} available; use fewer")


def launch(function: Callable[..., Any], number: int, device: str, *args: Any, timeout: float = PATIENCE) -> None:
    """Call `function(*args)` in `number` processes of this machine, which form a process group.

    If one process fails, all end. A first Ctrl-C or SIGTERM is passed on to each process as a Ctrl-C, and the processes
    end by themselves; a second one kills them.

    Args:
        function: a module-level function, which each process looks up by name.
        number: number of processes.
        device: "cpu" or "cuda".
        args: picklable arguments.
        timeout: see `process_group`.

    Raises:
        GigamorphError: the first one that a process raised.
        RuntimeError: another error of a process, with its traceback.
        KeyboardInterrupt: after a Ctrl-C, when all processes have ended.
    """
    if device == "cuda":
        need_gpus(number)
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // number)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # in the processes: DDP warns about intended settings
    logging.getLogger(torch_processes.spawn.__module__).setLevel(logging.ERROR)  # it logs the end of each process
    # As with torchrun, the process that outlives the others hosts the store.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (number, device, store.port, timeout, threads, errors, function, args)
    with terminated_as_interrupted():
        # Processes inherit blocked signals: a Ctrl-C stays pending until they are ready for it.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            context = torch_processes.start_processes(_child, given, number, join=False, start_method="spawn")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        assert context is not None
        interrupted = _joined(context, errors)
    if interrupted:
        raise KeyboardInterrupt


def _joined(context: Any, errors: Any) -> bool:
    """Wait for the processes to end; returns whether they were interrupted."""
    interrupted = False
    while True:
        try:
            if context.join(grace_period=_GRACE):
                return interrupted
        except KeyboardInterrupt:
            for process in context.processes:
                if process.is_alive():
                    process.kill() if interrupted else os.kill(process.pid, signal.SIGINT)
            interrupted = True
        except torch_processes.ProcessExitedException as error:
            if interrupted:
                return True
            if errors.empty():
                killed = error.exit_code == -signal.SIGKILL
                hint = "it may have run out of memory" if killed else "see its output"
                raise GigamorphError(f"{error}; {hint}") from error
            raise errors.get() from None


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Context in which SIGTERM (from a scheduler) acts like Ctrl-C, so that this process can write its files."""
    here = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, signal.default_int_handler) if here else None
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, former)


def _child(
    rank: int,
    number: int,
    device: str,
    port: int,
    timeout: float,
    threads: int,
    errors: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setpgrp()  # a terminal sends Ctrl-C to a whole process group; the parent passes it on once
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(threads)
    faulthandler.enable()  # prints the stack if a library aborts the process
    try:
        with process_group(device, timeout):
            function(*args)
    except KeyboardInterrupt:
        _end(130)
    except Exception as error:
        # Processes that waited for this one fail later, so their errors follow in the queue.
        known = isinstance(error, GigamorphError)
        errors.put(error if known else RuntimeError(f"process {rank} failed:\n{traceback.format_exc()}"))
        _end(2)


def _end(code: int) -> None:
    """Exit immediately: in an orderly exit, threads of an existing process group may abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
