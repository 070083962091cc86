"""Parallel work on many files in several processes; a crash of one does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from ..errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

# For fewer items, starting processes costs more than it saves.
_FEW = 32


def run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int | None = None, chunk: int = 1
) -> Iterator[tuple[int, Result | DataError]]:
    """Iterate over (index, function(item)) of all items, in order of completion.

    A `DataError` is a result too, and so is a crash of the process (a damaged file in a faulty decoder), as a
    `DataError` that names the item. Other exceptions are bugs and are raised.

    Args:
        function: a function at the top level of a module, so that it can be pickled.
        items: the items.
        workers: the number of processes, by default one per CPU; 1 runs in this process.
        chunk: the number of items per task.
    """
    workers = min(workers or available_cpus(), max(1, len(items) // 2))
    if workers == 1 or (len(items) < _FEW and chunk > 1):
        for index, item in enumerate(items):
            yield index, _guarded(function, item)
        return
    starts = range(0, len(items), chunk)
    lost: list[int] = []
    with _pool(workers) as pool:
        futures: dict[Future[list[Result | DataError]], int] = {
            pool.submit(_run, function, items[start : start + chunk]): start for start in starts
        }
        try:
            for future in as_completed(futures):
                start = futures.pop(future)
                try:
                    results = future.result()
                except BrokenProcessPool:
                    lost.append(start)
                    continue
                yield from enumerate(results, start)
        finally:
            pool.shutdown(cancel_futures=True)
    # A crash breaks the pool, so unfinished items run again, each in its own process.
    for start in sorted(lost):
        for index in range(start, min(start + chunk, len(items))):
            yield index, _run_isolated(function, items[index])


def available_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result | DataError]:
    return [_guarded(function, item) for item in items]


def _guarded(function: Callable[[Item], Result], item: Item) -> Result | DataError:
    try:
        return function(item)
    except DataError as error:
        return error


def _run_isolated(function: Callable[[Item], Result], item: Item) -> Result | DataError:
    try:
        with _pool(1) as pool:
            return pool.submit(_guarded, function, item).result()
    except BrokenProcessPool:
        return DataError(f"{item}: reading it crashed the process; the file is damaged, fetch it again")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked processes need not import torch again.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=torch.set_num_threads, initargs=(1,)
    )
