"""A worker of `gpu.py`: every item by section and name, and the server that runs the requested ones."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BOX = 8.0  # seconds of timed steps in one entry

Row = dict[str, Any]


def registry(dry: bool) -> dict[str, dict[str, Callable[[], Row]]]:
    """Return every item by section and name."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    sys.path.insert(0, str(ROOT))  # use this checkout, installed or not
    if dry:
        import interpreter

        interpreter.install()
    import gpu_checks
    import gpu_ops
    import gpu_steps
    import gpu_tests
    import gpu_traces

    timer = gpu_ops.Timer(seconds=0.01, least=1, most=2) if dry else gpu_ops.Timer()
    once = gpu_ops.Timer(prepare=True)
    ops, tiles = gpu_ops.op_cases(dry), gpu_ops.config_cases(dry)
    # A name in `prepare` begins with its section.
    prepare = {f"steps: {n}": run for n, run in gpu_steps.preparations(dry).items()}
    if not dry:
        for section, cases in (("ops", ops), ("tiles", tiles)):
            prepare |= {f"{section}: {n}": lambda case=case: once.row(case()) for n, case in cases.items()}
    return {
        "ceilings": {"machine": machine, "ceilings": lambda: gpu_ops.ceilings(dry)},
        "tests": gpu_tests.tests(dry),
        "sanitizer": gpu_tests.sanitized(dry),
        "checks": gpu_checks.checks(dry),
        "prepare": prepare,
        "ops": {n: lambda case=case: timer.row(case()) for n, case in ops.items()},
        "tiles": {n: lambda case=case: timer.row(case()) for n, case in tiles.items()},
        "steps": {**gpu_steps.runs(gpu_steps.steps(dry), dry, 0.1 if dry else BOX), "choices": choices},
        "traces": gpu_traces.traces(dry),
        "limits": gpu_steps.runs(gpu_steps.limits(dry), dry, 0.1 if dry else BOX),
    }


def machine() -> Row:
    """Return the provenance of the figures."""
    import torch
    import triton

    from gigamorph.engine.bench.machine import provenance

    return {
        **provenance(),
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **clocks(),
    }


def clocks() -> Row:
    """Return driver, clocks, power and temperature as of now; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    try:
        return _clocks()
    except Exception as error:  # a failure of NVML must not stop a measurement
        return {"nvml": f"{type(error).__name__}: {error}"[:200]}


def _clocks() -> Row:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "gpu_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "gpu_bytes_used": pynvml.nvmlDeviceGetMemoryInfo(handle).used,
    }


def choices() -> Row:
    """Return the choice for each op and shape during the steps."""
    from dataclasses import asdict

    from gigamorph.kernels import choice, measurements

    rows = [asdict(row) for row in choice.table()]
    return {"file": measurements.measurement_file("").name, "choices": rows, "failed": choice.failures()}


class Server:
    """The work of a worker process; see gigamorph.engine.bench.process. Output of libraries goes to the log."""

    def __init__(self) -> None:
        import torch

        self.items = registry(dry="TRITON_INTERPRET" in os.environ)
        torch.manual_seed(0)

    def work(self, section: str, name: str) -> Row:
        """Return an item's row, or the names of all items; the status shows whether this process can continue."""
        import torch

        if section == "list":
            return {"row": {section: list(found) for section, found in self.items.items()}}
        started = time.perf_counter()
        try:
            row: Row = self.items[section][name]()
        except Exception as error:
            traceback.print_exc()
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            row = {"error": kind, "message": str(error)[:600]}
        if section in ("ops", "steps", "limits", "ceilings"):
            row |= {"clocks": clocks()}
        row["item_seconds"] = round(time.perf_counter() - started, 3)
        lost = torch.cuda.is_available() and _context_is_lost()
        return {"row": row, "status": "failed" if lost else "ok"}


def _context_is_lost() -> bool:
    """Whether an illegal access has ended this process's use of the GPU; if not, free memory for the next item."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return False
