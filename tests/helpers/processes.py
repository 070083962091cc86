"""Functions run in several gloo processes of this machine."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_SECONDS = 240
Task = tuple[Any, ...]  # a function of a module in tests/helpers, and its arguments


def in_processes(number: int, folder: Path, tasks: Sequence[Task]) -> list[list[Any]]:
    """What `function(*args)` returns in each of `number` processes that have a gloo group: [task][rank].

    Args:
        folder: empty, for the processes to meet in.
    """
    named = [(function.__module__, function.__name__, args) for function, *args in tasks]
    (folder / "tasks").write_bytes(pickle.dumps(named))
    command = [sys.executable, __file__, str(number), str(folder)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, text = child.communicate(timeout=_SECONDS)
        assert child.returncode == 0, text[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]
    return [list(results) for results in zip(*ranks, strict=True)]


def _work(rank: int, number: int, folder: Path, functions: list[Callable[..., Any]], given: list[list[Any]]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    results = [function(*args) for function, args in zip(functions, given, strict=True)]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _main(number: int, folder: Path) -> None:
    """Import all that takes long, once, and fork: nothing has run that a fork could not take over."""
    importlib.import_module("torch._dynamo")
    torch.set_num_threads(1)
    tasks: list[tuple[str, str, list[Any]]] = pickle.loads((folder / "tasks").read_bytes())
    functions: list[Callable[..., Any]] = [getattr(importlib.import_module(module), name) for module, name, _ in tasks]
    given = [args for _, _, args in tasks]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_work, args=(rank, number, folder, functions, given)) for rank in range(number)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
