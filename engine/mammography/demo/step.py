"""Memory and time of one training step on an image file, stock PyTorch's and gigamorph's, each in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...accelerate import accelerate
from ...bench.meter import measure
from ...bench.process import Process
from ...bench.results import OK
from ...errors import GigamorphError
from ...images.open import open_pixels
from ...images.pixels import PixelSource
from ...models import build_model

_ROUNDS, _STEPS = 4, 4  # several, because the allocator returns memory to the system in the first steps of a process


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step. Bytes exclude what the process held before: network, libraries, image file.

    Attributes:
        seconds: the fastest of all steps.
        curve: (seconds since the step began, bytes).
    """

    peak_bytes: int
    seconds: float
    curve: list[tuple[float, int]]
    loss: float


def measure_steps(
    image: str | Path, model: str, budgets: Sequence[int | None], *, device: str = "cpu"
) -> list[StepCost]:
    """Measure a training step on an image file: by tiles for each budget, with stock PyTorch if it is None.

    Each runs in a fresh process; they run alternately, so that other load on the machine affects all of them.

    Raises:
        GigamorphError: a process fails; the message is its last line.
    """
    with ExitStack() as processes:
        each = [processes.enter_context(Process(__name__)) for _ in budgets]

        def ask(process: Process, do: str, **what: Any) -> dict[str, Any]:
            found = process.ask(do, **what)
            if found["status"] != OK:
                raise GigamorphError(f"measuring a step on {image} failed: {found['reason']}")
            return found

        given = {"image": str(image), "model": model, "device": device}
        first = [ask(process, "begin", budget=budget, **given) for process, budget in zip(each, budgets, strict=True)]
        costs = [StepCost(f["peak_bytes"], f["seconds"], [(t, b) for t, b in f["curve"]], f["loss"]) for f in first]
        for _ in range(_ROUNDS):
            seconds = [ask(process, "turn")["seconds"] for process in each]
            costs = [replace(c, seconds=min(c.seconds, s)) for c, s in zip(costs, seconds, strict=True)]
    return costs


class Server:
    """The measurements that run in one process."""

    def begin(self, image: str, model: str, budget: int | None, device: str) -> dict[str, Any]:
        """Prepare the network, and measure the first step."""
        torch.manual_seed(0)
        self.device, self.stock = device, budget is None
        network = build_model(model, 2, 1).to(device)
        self.source = open_pixels(image)
        self.net = network if budget is None else accelerate(network, memory_budget=budget)
        # The first use of an operation loads libraries; a small image triggers that without much memory.
        _step(self.net, open_pixels(torch.zeros(1, 96, 96)), self.stock, device)
        losses = []
        cost = measure(lambda: losses.append(self._step()), device, curve=True)
        return asdict(StepCost(cost.added_bytes, cost.seconds[0], cost.curve, losses[0]))

    def turn(self) -> dict[str, Any]:
        """Measure further steps."""
        return {"seconds": min(measure(self._step, self.device, times=_STEPS).seconds)}

    def _step(self) -> float:
        return _step(self.net, self.source, self.stock, self.device)


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
