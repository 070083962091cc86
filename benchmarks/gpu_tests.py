"""The tests that need a GPU, and runs of our kernels under the sanitizer, as items of `gpu.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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
