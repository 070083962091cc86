"""Functions run in several gloo processes of this machine."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import select
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
    launcher, answer = _launcher(), ""
    assert launcher.stdin is not None and launcher.stdout is not None
    try:
        launcher.stdin.write(f"{number} {folder}\n")
        launcher.stdin.flush()
        if select.select([launcher.stdout], [], [], _SECONDS)[0]:
            answer = launcher.stdout.readline()
        assert answer == "0\n", (folder / "said").read_text()[-3000:] if (folder / "said").exists() else "not begun"
    finally:
        if answer != "0\n":
            _end(launcher)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]
    return [list(results) for results in zip(*ranks, strict=True)]


@functools.cache
def _launcher() -> subprocess.Popen[str]:
    """A process that imports all that takes long, once, and forks."""
    command = [sys.executable, __file__]
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(_end, started)
    return started


def _end(launcher: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _launcher.cache_clear()


def _work(rank: int, number: int, folder: Path, functions: list[Callable[..., Any]], given: list[list[Any]]) -> None:
    with (folder / "said").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    results = [function(*args) for function, args in zip(functions, given, strict=True)]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _launch(number: int, folder: Path) -> bool:
    """Nothing has run that a fork could not take over: this process only imports."""
    tasks: list[tuple[str, str, list[Any]]] = pickle.loads((folder / "tasks").read_bytes())
    functions: list[Callable[..., Any]] = [getattr(importlib.import_module(module), name) for module, name, _ in tasks]
    given = [args for _, _, args in tasks]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_work, args=(rank, number, folder, functions, given)) for rank in range(number)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return any(process.exitcode for process in ranks)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module("torch._dynamo")
    torch.set_num_threads(1)
    for line in sys.stdin:
        wanted, _, where = line.rstrip("\n").partition(" ")
        print(int(_launch(int(wanted), Path(where))), file=answers, flush=True)
