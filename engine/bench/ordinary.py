"""An ordinary step of a network: one forward and one backward, and what it is for all peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .results import Task

Step = Callable[[Tensor], Tensor]
Prepared = tuple[nn.Module, Step]  # what is called for a forward, and the step


def loss_of(output: Tensor) -> Tensor:
    """The loss of every benchmark: the mean square of the output."""
    return (output if output.dtype == torch.float64 else output.float()).square().mean()


def autocast(task: Task) -> torch.autocast:
    """The autocast that a task asks for."""
    return torch.autocast(task.device, dtype=torch.bfloat16, enabled=task.precision == "bf16")


def ordinary(net: nn.Module, task: Task) -> Prepared:
    """A step in one forward and one backward."""

    def train(image: Tensor) -> Tensor:
        if not task.accumulate:
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
    """The output that the loss is taken of."""
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor))
