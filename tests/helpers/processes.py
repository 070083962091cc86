"""Functions run in several gloo processes of this machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from forked import Forked
from torch import distributed as dist

_SECONDS = 240
Task = tuple[Any, ...]  # a function of a module in tests/helpers, and its arguments


def in_processes(number: int, folder: Path, tasks: Sequence[Task]) -> list[list[Any]]:
    """What `function(*args)` returns in each of `number` processes that have a gloo group: [task][rank].

    Args:
        folder: for their results.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with contextlib.ExitStack() as stack:
        ranks = [Forked(_work, rank, number, store.port, folder, tasks) for rank in range(number)]
        for process in ranks:
            stack.callback(process.end)
        end = time.monotonic() + _SECONDS
        codes = [process.wait(max(0, end - time.monotonic())) for process in ranks]
        said = "".join(process.output + process.error for process in ranks)
        assert codes == [0] * number, f"{codes}: {said[-3000:]}"
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]
    return [list(each) for each in zip(*results, strict=True)]


def _work(rank: int, number: int, port: int, folder: Path, tasks: Sequence[tuple[Callable[..., Any], Any]]) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number)
    results = [function(*args) for function, *args in tasks]
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
