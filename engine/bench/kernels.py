"""Each kernel against cuDNN, eager PyTorch and torch.compile, per op and shape, with its floor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import GigamorphError
from .checkout import script
from .results import FAILED, OK, KernelRow


def measure(match: str = "", say: Callable[[KernelRow], None] = lambda row: None) -> list[KernelRow]:
    """Time the ops whose name contains a text: those of `benchmarks/gpu.py`, by the same code.

    Raises:
        GigamorphError: without a GPU.
    """
    if not torch.cuda.is_available():
        raise GigamorphError("bench kernels needs a GPU: there is none that torch can use; gigamorph doctor says why")
    ops = script("gpu_ops")
    timer = ops.Timer()
    rows = []
    for name, make in ops.op_cases(False).items():
        if match not in name:
            continue
        found = timer.row(make())
        failed = "; ".join(f"{how}: {why}" for how, why in found.get("failed", {}).items())
        rows.append(
            KernelRow(
                name, "bf16", found["flops"], found["bytes"], found["ms"], FAILED if failed else OK, failed or None
            )
        )
        say(rows[-1])
    return rows
