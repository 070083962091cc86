"""Measurements that are scripts of the checkout: kernels, and growing networks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from ..errors import GigamorphError
from .machine import ROOT
from .results import FAILED, OK, KernelRow, MorphRow

_RIVAL = "from scratch, same epochs"


def script(name: str) -> ModuleType:
    """Import a module of `benchmarks/`.

    Raises:
        GigamorphError: the package was installed without its checkout.
    """
    folder = ROOT / "benchmarks"
    if not (folder / f"{name}.py").is_file():
        raise GigamorphError(f"benchmarks/{name}.py not found; run this in a clone of gigamorph (pip install -e .)")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)


def measure_kernels(match: str = "", say: Callable[[KernelRow], None] = lambda row: None) -> list[KernelRow]:
    """Measure each op of `benchmarks/gpu.py` whose name contains `match`: ours, cuDNN, eager PyTorch, torch.compile.

    Raises:
        GigamorphError: torch finds no GPU.
    """
    if not torch.cuda.is_available():
        raise GigamorphError("bench kernels needs a GPU, but torch finds none; run gigamorph doctor for the reason")
    ops = script("gpu_ops")
    timer = ops.Timer()
    rows = []
    for name, make in ops.op_cases(False).items():
        if match not in name:
            continue
        found = timer.row(make())
        failed = "; ".join(f"{how}: {why}" for how, why in found.get("failed", {}).items())
        status = FAILED if failed else OK
        rows.append(KernelRow(name, "bf16", found["flops"], found["bytes"], found["ms"], status, failed or None))
        say(rows[-1])
    return rows


def measure_morphs(seeds: Sequence[int], say: Callable[[str], None] = print) -> list[MorphRow]:
    """Run `benchmarks/morph_training.py` with 30 epochs each."""
    return morph_rows(script("morph_training").run(seeds, (30, 30), say))


def morph_rows(result: dict[str, Any]) -> list[MorphRow]:
    """Convert the result of `morph_training.run` to rows: time and epochs until an accuracy is reached.

    A grown network and one that is trained from scratch are compared; the accuracy is the final one of the latter.

    Seconds are of one CPU core, including the parent's training.
    """
    rows = []
    for one in result["seeds"]:
        for name in ("widened", "deepened"):
            rival = f"{name}, {_RIVAL}"
            aim = one["curves"][rival][-1]["test_accuracy"]
            for how in (name, rival):
                curve = [(p["seconds"], p["epoch"], p["test_accuracy"]) for p in one["curves"][how]]
                reached = next((point for point in curve if point[2] >= aim), None)
                seconds = one["checks"][name]["seconds"] if how == name else None
                when, epoch = reached[:2] if reached else (None, None)
                rows.append(MorphRow(one["seed"], how, seconds, aim, when, epoch, curve))
    return rows
