"""Steps of an accelerated network whose optimizer's state, or whose parameters, lie in parts on several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from gigamorph import accelerate

STEPS, RATE = 3, 1e-2


def picture(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.rand(1, 3, 37, 29, generator=generator, dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()


def alone(ranks: int) -> dict[str, Tensor]:
    """The parameters after some steps of AdamW on the mean loss of all processes' images, in stock PyTorch."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [net(picture(rank, step)).square().sum() for rank in range(ranks)]
        torch.stack(losses).mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def _trained(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        net(picture(dist.get_rank(), step)).square().sum().backward()
        optimizer.step()


def zero() -> tuple[dict[str, Tensor], int]:
    """Parameters with ZeroRedundancyOptimizer, and how many values of state this process holds."""
    net = accelerate(network(), tile=16)
    shared = DistributedDataParallel(net)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=RATE)
    _trained(shared, optimizer)
    held = sum(v.numel() for state in optimizer.optim.state.values() for v in state.values() if v.ndim)
    return {name: p.detach().clone() for name, p in net.named_parameters()}, held


def fsdp2() -> tuple[dict[str, Tensor], int] | str:
    """The same with FSDP2's fully_shard."""
    try:
        net: Any = fully_shard(accelerate(network(), tile=16))
        optimizer = torch.optim.AdamW(net.parameters(), RATE)
        _trained(net, optimizer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    held = sum(v.to_local().numel() for s in optimizer.state.values() for v in s.values() if hasattr(v, "to_local"))
    return {name: p.full_tensor().detach().clone() for name, p in net.named_parameters()}, held
