"""Functions run in several gloo processes of this machine."""

from __future__ import annotations

import importlib
import pickle
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
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(number), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(number)
    ]
    try:
        for child in children:
            _, text = child.communicate(timeout=_SECONDS)
            assert child.returncode == 0, text[-3000:]
    finally:
        for child in children:
            child.kill()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]
    return [list(results) for results in zip(*ranks, strict=True)]


def _main(rank: int, number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    tasks: list[tuple[str, str, list[Any]]] = pickle.loads((folder / "tasks").read_bytes())
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    functions: list[Callable[..., Any]] = [getattr(importlib.import_module(module), name) for module, name, _ in tasks]
    results = [function(*args) for function, (_, _, args) in zip(functions, tasks, strict=True)]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
