"""Steps of DDP over gloo, in each of two processes, and those of a process alone."""

import torch
from torch import nn

from gigamorph import accelerate


def network() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        .double()
        .eval()
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def steps() -> list[dict[str, torch.Tensor]]:
    """The gradients of this process, and those of a single process on both shares."""
    rank = torch.distributed.get_rank()
    images = torch.randn(4, 1, 37, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = nn.parallel.DistributedDataParallel(accelerate(network(), tile=16))
    for share in (images[rank::2][:1], images[rank::2][1:]):  # two steps: the second reuses DDP's buckets
        model.zero_grad()
        model(share).square().sum().backward()
    alone = accelerate(network(), tile=16)
    (alone(images[2:]).square().sum() / 2).backward()
    return [gradients(model), gradients(alone)]
