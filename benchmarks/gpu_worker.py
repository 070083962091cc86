"""A worker of `gpu.py`: every item by section and name, and the server that runs the requested ones.

The tests that need a GPU, and the runs of our kernels under the sanitizer, are defined here.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BOX = 8.0  # seconds of timed steps in one entry

Row = dict[str, Any]


# One check per family: the sanitizer makes a kernel a hundred times slower.
SANITIZED = ("conv forward", "conv dgrad", "conv wgrad", "depthwise", "stem", "max_pool2d", "batch_norm", "layer_norm")
TOOLS = ("memcheck", "racecheck")


def tests(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the functions of tests/gpu by name, except those of this script; in a dry run one, which is skipped."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    named = [
        (file, name)
        for file in files
        if file.stem != "test_gpu_benchmark"
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    ]
    return {f"{file.stem}: {name}": partial(_pytest, f"{file}::{name}") for file, name in named[: 1 if dry else None]}


def sanitized(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return families by tool; none in a dry run."""
    return {} if dry else {f"{tool} {name}": partial(_sanitized, tool, name) for tool in TOOLS for name in SANITIZED}


def _pytest(which: str) -> dict[str, Any]:
    """Run a test and return its result; a failure is an error. Measurements are discarded: others run in parallel."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", which]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**_environment(), "GIGAMORPH_CACHE": folder}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode not in (0, 5):
        print(done.stdout, done.stderr, file=sys.stderr)
        raise AssertionError(f"{last}\n{done.stdout[-1500:]}")
    return {"result": last}


def _sanitized(tool: str, family: str) -> dict[str, Any]:
    """Run the first check of a family under compute-sanitizer."""
    path = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if path is None:
        return {"result": "compute-sanitizer is not installed"}
    code = f"import gpu_checks; c = gpu_checks.checks(False); c[next(n for n in c if n.startswith({family!r}))]()"
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
    return {"result": errors[-1] if errors else "no summary"}


def _environment() -> dict[str, str]:
    """Return a child's environment with the checkout's packages."""
    paths = [ROOT, ROOT / "tests" / "helpers", ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}


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

    timer = gpu_ops.Timer(seconds=0.01, least=1, most=2) if dry else gpu_ops.Timer()
    once = gpu_ops.Timer(prepare=True)
    ops = gpu_ops.op_cases(dry)
    # A name in `prepare` begins with its section.
    prepare = {f"steps: {n}": run for n, run in gpu_steps.preparations(dry).items()}
    if not dry:
        prepare |= {f"ops: {n}": lambda case=case: once.row(case()) for n, case in ops.items()}
    return {
        "ceilings": {"machine": machine, "ceilings": lambda: gpu_ops.ceilings(dry)},
        "tests": tests(dry),
        "sanitizer": sanitized(dry),
        "checks": gpu_checks.checks(dry),
        "prepare": prepare,
        "ops": {n: lambda case=case: timer.row(case()) for n, case in ops.items()},
        "steps": {**gpu_steps.runs(gpu_steps.steps(dry), dry, 0.1 if dry else BOX), "choices": choices},
        "front": gpu_steps.runs(gpu_steps.front(dry), dry, 0.1 if dry else BOX),
        "traces": gpu_steps.traces(dry),
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
    except Exception as error:  # a failure of NVML must not stop a measurement
        return {"nvml": f"{type(error).__name__}: {error}"[:200]}


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
        if section in ("ops", "steps", "front", "limits", "ceilings"):
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
