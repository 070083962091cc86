"""Memory and time of one training step, stock PyTorch's or ours, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..accelerate import accelerate
from ..errors import GigamorphError
from ..images.open import open_pixels
from ..images.pixels import PixelSource
from ..models import create_model
from ..tiling.memory import peak_bytes, reset_peak, used_bytes

_STEPS = 3


@dataclass(frozen=True)
class StepCost:
    """What one training step took. Bytes are above what the process held before: network, libraries, image file."""

    peak_bytes: int
    seconds: float
    """The fastest of three steps."""
    curve: list[tuple[float, int]]
    """Seconds since the step began, and bytes then."""
    loss: float


def measure_step(
    image: str | Path, model: str, *, classes: int = 2, budget: int | None, device: str = "cpu"
) -> StepCost:
    """Train one step on an image file in a fresh process: with ``budget`` by tiles, without as stock PyTorch does.

    Raises:
        GigamorphError: if the process fails, with its last line.
    """
    task = {"image": str(image), "model": model, "classes": classes, "budget": budget, "device": device}
    # -c and not -m: the module is then imported once, under its own name.
    code = f"from {__name__} import child; child()"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(task), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode} (out of memory?)"]
        raise GigamorphError(f"measuring a step on {image} failed: {lines[-1]}")
    values = json.loads(done.stdout.splitlines()[-1])
    return StepCost(values["peak_bytes"], values["seconds"], [(t, b) for t, b in values["curve"]], values["loss"])


def child() -> None:
    """Read a task from the standard input, measure, write the result as JSON."""
    task = json.loads(sys.stdin.read())
    device = task["device"]
    torch.manual_seed(0)
    model = create_model(task["model"], task["classes"], 1).to(device)
    source = open_pixels(task["image"])
    net = model if task["budget"] is None else accelerate(model, memory_budget=task["budget"])
    # The first use of each operation loads libraries; a small image does that without the memory of a large one.
    _step(net, open_pixels(torch.zeros(1, 96, 96)), task["budget"] is None, device)
    cost = _measure(lambda: _step(net, source, task["budget"] is None, device), device)
    print(json.dumps(asdict(cost)))


def _step(net: nn.Module, source: PixelSource, stock: bool, device: str) -> float:
    x = source
    if stock:
        _, height, width = source.shape
        x = source.read(0, height, 0, width)[None].to(device)
    loss = F.cross_entropy(net(x), torch.tensor([1], device=device))
    loss.backward()
    value = loss.item()
    net.zero_grad()
    return value


def _measure(step: Callable[[], float], device: str) -> StepCost:
    base = used_bytes(device)
    reset_peak(device)
    curve: list[tuple[float, int]] = []
    stop = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        while not stop.wait(0.004):
            curve.append((round(time.monotonic() - began, 4), used_bytes(device) - base))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    loss = step()
    stop.set()
    watcher.join()
    peak = peak_bytes(device) - base
    times = []
    for _ in range(_STEPS):
        start = time.monotonic()
        step()
        times.append(time.monotonic() - start)
    return StepCost(peak, min(times), curve, loss)
