"""Memory and time of one training step on an image file, stock PyTorch's or ours, in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..accelerate import accelerate
from ..bench.meter import measure
from ..bench.process import Process
from ..bench.results import OK
from ..errors import GigamorphError
from ..images.open import open_pixels
from ..images.pixels import PixelSource
from ..models import create_model

_STEPS = 12  # the first ones of a process give the heap's pages back to see what there is besides


@dataclass(frozen=True)
class StepCost:
    """What one training step took. Bytes are above what the process held before: network, libraries, image file.

    Attributes:
        seconds: the fastest of `_STEPS` steps.
        curve: seconds since the step began, and bytes then.
    """

    peak_bytes: int
    seconds: float
    curve: list[tuple[float, int]]
    loss: float


def measure_step(
    image: str | Path, model: str, *, classes: int = 2, budget: int | None, device: str = "cpu"
) -> StepCost:
    """Train one step on an image file in a fresh process: with ``budget`` by tiles, without as stock PyTorch does.

    Raises:
        GigamorphError: if the process fails, with its last line.
    """
    with Process(__name__) as process:
        found = process.ask("measure", image=str(image), model=model, classes=classes, budget=budget, device=device)
    if found["status"] != OK:
        raise GigamorphError(f"measuring a step on {image} failed: {found['reason']}")
    return StepCost(found["peak_bytes"], found["seconds"], [(t, b) for t, b in found["curve"]], found["loss"])


class Server:
    """What the process does."""

    def measure(self, image: str, model: str, classes: int, budget: int | None, device: str) -> dict[str, Any]:
        torch.manual_seed(0)
        stock = create_model(model, classes, 1).to(device)
        source = open_pixels(image)
        net = stock if budget is None else accelerate(stock, memory_budget=budget)
        # The first use of each operation loads libraries; a small image does that without the memory of a large one.
        _step(net, open_pixels(torch.zeros(1, 96, 96)), budget is None, device)
        losses = []

        def step() -> None:
            losses.append(_step(net, source, budget is None, device))

        first = measure(step, device, curve=True)
        later = measure(step, device, times=_STEPS)
        return asdict(StepCost(first.added_bytes, min(later.seconds), first.curve, losses[0]))


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
