"""Ceilings of this machine, and the minimal time of a stock PyTorch step under them.

Roofline (Williams, Waterman, Patterson 2009): an op takes at least its arithmetic over the machine's rate, or its
traffic over the bandwidth, whichever is more. Traffic counts every tensor that the op reads or writes once. The sum
over the ops of an eager step is the limit of perfect kernels without fusion; a faster step fuses ops, or keeps maps in
cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import flop_registry

from ..models.classifier import taking_images
from ..torch_private import FakeTensorMode, TorchDispatchMode, tree_leaves
from .meter import time_call
from .ordinary import autocast, first_tensor, loss_of
from .results import BenchTask


def measure_ceilings(device: str, seconds: float = 1.5) -> dict[str, float]:
    """Measure copy bandwidth (`gb_per_s`, bytes read plus written) and arithmetic by dtype (`tflop_per_s fp32`, ...).

    Arithmetic is that of a matrix product or of a convolution, whichever is faster: on a CPU they come from two
    libraries, and one may use wider vectors. The best of many runs counts, because a ceiling is the machine's capacity,
    not its average next to other load.

    Args:
        seconds: duration of the measurement of each.
    """
    size = 2**28 if device == "cpu" else 2**32
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found = {"gb_per_s": 2 * size / _min_seconds(lambda: target.copy_(source), device, seconds) / 1e9}
    for name, dtype, side in (("fp32", torch.float32, 2048), ("bf16", torch.bfloat16, 8192)):
        if name == "bf16" and device == "cpu":
            continue
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        c, k = 256, 3  # channels and kernel of a square map of the same side as its channels
        x, w = (
            torch.randn(*shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for shape in ((1, c, c, c), (c, c, k, k))
        )
        with torch.no_grad():
            product = 2 * side**3 / _min_seconds(lambda a=a, b=b: a @ b, device, seconds)
            convolution = 2 * c**4 * k**2 / _min_seconds(lambda x=x, w=w: conv2d(x, w, padding=1), device, seconds)
        found[f"tflop_per_s {name}"] = max(product, convolution) / 1e12
    return found


def _min_seconds(run: Callable[[], Any], device: str, seconds: float) -> float:
    best, spent = float("inf"), 0.0
    time_call(run, device)
    while spent < seconds:
        took, own = time_call(run, device)
        spent += took
        if device == "cpu" and took > 1.5 * own:  # other load takes the cores: estimate the time without it
            took = own / torch.get_num_threads()
        best = min(best, took)
    return best


@dataclass(frozen=True)
class StepWork:
    """Ops of a stock PyTorch step: (flops, bytes, number of such ops)."""

    ops: tuple[tuple[float, float, int], ...]

    @property
    def flops(self) -> float:
        return sum(flops * times for flops, _, times in self.ops)

    def seconds(self, ceilings: dict[str, float], precision: str) -> float | None:
        """Return the sum over ops of max(arithmetic, traffic); None if a ceiling is unknown."""
        rate, bandwidth = ceilings.get(f"tflop_per_s {precision}"), ceilings.get("gb_per_s")
        if not rate or not bandwidth:
            return None
        return sum(max(flops / rate / 1e12, size / bandwidth / 1e9) * times for flops, size, times in self.ops)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[tuple[float, float]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
        if func.is_view or not written:
            return result
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count is not None else 0
        read = {id(t): t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.ops[float(flops), float(sum(read.values()) + written)] += 1
        return result


def count(network: nn.Module, task: BenchTask) -> StepWork:
    """Count the ops of a stock PyTorch step on fake tensors, without computation.

    Raises:
        GigamorphError: the network does not accept such an image.
    """
    fake = FakeTensorMode()
    state = {**dict(network.named_buffers()), **dict(network.named_parameters())}
    twins: dict[str, Tensor] = {name: fake.from_tensor(t, static_shapes=True) for name, t in state.items()}
    device = next((twin.device for twin in twins.values()), torch.device("cpu"))  # `task.device` may not exist here
    with fake, torch.set_grad_enabled(task.training):
        dtype = torch.float64 if task.precision == "fp64" else torch.float32
        image = torch.empty(task.image, dtype=dtype, device=device)
        leaves = [t for t in twins.values() if t.requires_grad]
        with _Count() as counter:
            with autocast(replace(task, device=device.type)), taking_images(network, task.model, task.image):
                output = first_tensor(torch.func.functional_call(network, twins, (image,)))
            if task.training:
                torch.autograd.grad(loss_of(output), leaves, allow_unused=True)
    return StepWork(tuple((flops, size, times) for (flops, size), times in counter.ops.items()))
