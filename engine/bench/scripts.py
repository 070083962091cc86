"""Measurements that are scripts of the checkout: kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from ..errors import GigamorphError
from .machine import ROOT
from .results import FAILED, OK, KernelRow


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
