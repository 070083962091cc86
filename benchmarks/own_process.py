"""Memory and time of training steps, measured in a process of their own (CPU)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from torch import Tensor, nn

from gigamorph.engine.memory import peak_bytes, reset_peak, used_bytes


def measure_steps(net: nn.Module, image: Tensor, steps: int) -> dict[str, Any]:
    """Run some steps.

    Returns:
        `bytes`, the parameters and what the steps added at most; `added`, that without the parameters; of the fastest
        step `seconds`, and `cpu_seconds`, which other processes on the machine change less.
    """
    parameters = sum(t.nbytes for t in net.state_dict().values())
    before = used_bytes()
    reset_peak()
    seconds, cpu_seconds = [], []
    for _ in range(steps):
        net.zero_grad(set_to_none=True)
        started, cpu_started = time.perf_counter(), time.process_time()
        net(image).square().mean().backward()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    added = peak_bytes() - before
    return {
        "bytes": added + parameters, "added": added, "seconds": min(seconds), "cpu_seconds": min(cpu_seconds),
    }  # fmt: skip


def in_own_process(script: str, task: dict[str, Any]) -> dict[str, Any]:
    """What a script prints last, as JSON, when it is run with `--child` and the task; its failure ends this process."""
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(task)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
