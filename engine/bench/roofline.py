"""Ceilings of this machine, and the least time that a step of stock PyTorch could take under them.

Roofline (Williams, Waterman, Patterson 2009): an op takes at least its arithmetic over the machine's rate and its
traffic over the bandwidth, whichever is more. Traffic is every tensor that the op reads or writes, once. Summed over
the ops of an eager step this is what perfect kernels could reach that are not fused; a step above it fuses ops, or
keeps maps in cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..models.classifier import taking_images
from .meter import time_call
from .ordinary import autocast, first_tensor, loss_of
from .results import Task


def measure_ceilings(device: str, seconds: float = 1.5) -> dict[str, float]:
    """Copy bandwidth (`gb_per_s`, bytes read plus written) and arithmetic by dtype (`tflop_per_s fp32`, ...).

    Arithmetic is that of a matrix product or of a convolution, whichever is faster: on a CPU they come from two
    libraries, of which one may use wider vectors than the other. The best of many counts: a ceiling is what the machine
    can do, not what it does on average beside other work.

    Args:
        seconds: that each of them is tried for.
    """
    size = 2**28 if device == "cpu" else 2**32
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found = {"gb_per_s": 2 * size / _least_seconds(lambda: target.copy_(source), device, seconds) / 1e9}
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
            product = 2 * side**3 / _least_seconds(lambda a=a, b=b: a @ b, device, seconds)
            convolution = 2 * c**4 * k**2 / _least_seconds(lambda x=x, w=w: conv2d(x, w, padding=1), device, seconds)
        found[f"tflop_per_s {name}"] = max(product, convolution) / 1e12
    return found


def _least_seconds(run: Callable[[], Any], device: str, seconds: float) -> float:
    best, spent = float("inf"), 0.0
    time_call(run, device)
    while spent < seconds:
        took, own = time_call(run, device)
        spent += took
        if device == "cpu" and took > 1.5 * own:  # other work has the cores; alone it would have taken its own time
            took = own / torch.get_num_threads()
        best = min(best, took)
    return best


@dataclass(frozen=True)
class Work:
    """What a step of stock PyTorch does: (flops, bytes) of an op, and how many such ops there are."""

    ops: tuple[tuple[float, float, int], ...]

    @property
    def flops(self) -> float:
        return sum(flops * times for flops, _, times in self.ops)

    def seconds(self, ceilings: dict[str, float], precision: str) -> float | None:
        """The sum over ops of max(arithmetic, traffic); None where a ceiling is not known."""
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


def count(network: nn.Module, task: Task) -> Work:
    """Count a step of stock PyTorch on fake tensors: nothing is computed.

    Raises:
        GigamorphError: the network does not take such an image.
    """
    fake = FakeTensorMode()
    state = {**dict(network.named_buffers()), **dict(network.named_parameters())}
    twins: dict[str, Tensor] = {name: fake.from_tensor(t, static_shapes=True) for name, t in state.items()}
    lies = next((twin.device for twin in twins.values()), torch.device("cpu"))  # `task.device` need not be here
    with fake, torch.set_grad_enabled(task.training):
        dtype = torch.float64 if task.precision == "fp64" else torch.float32
        image = torch.empty(task.image, dtype=dtype, device=lies)
        leaves = [t for t in twins.values() if t.requires_grad]
        with _Count() as counter:
            with autocast(replace(task, device=lies.type)), taking_images(network, task.model, task.image):
                output = first_tensor(torch.func.functional_call(network, twins, (image,)))
            if task.training:
                torch.autograd.grad(loss_of(output), leaves, allow_unused=True)
    return Work(tuple((flops, size, times) for (flops, size), times in counter.ops.items()))
