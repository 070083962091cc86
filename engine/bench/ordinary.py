"""A plain PyTorch step of a network, one forward and one backward, and definitions that all peers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import tree_leaves
from .results import BenchTask

Step = Callable[[Tensor], Tensor]
Prepared = tuple[nn.Module, Step]  # module that runs the forward, step


def loss_of(output: Tensor) -> Tensor:
    """Return the loss of every benchmark: the mean square of the output."""
    return (output if output.dtype == torch.float64 else output.float()).square().mean()


def autocast(task: BenchTask) -> torch.autocast:
    """Return the autocast context of a task."""
    return torch.autocast(task.device, dtype=torch.bfloat16, enabled=task.precision == "bf16")


def ordinary(net: nn.Module, task: BenchTask) -> Prepared:
    """Build a step of one forward and one backward."""

    def train(image: Tensor) -> Tensor:
        net.zero_grad(set_to_none=True)
        with autocast(task):
            output = first_tensor(net(image))
        loss_of(output).backward()
        return output.detach()

    def infer(image: Tensor) -> Tensor:
        with torch.no_grad(), autocast(task):
            return first_tensor(net(image))

    return net, train if task.training else infer


def first_tensor(output: Any) -> Tensor:
    """Return the output tensor that enters the loss."""
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor))
