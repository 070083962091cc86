"""One of two DDP processes over gloo: python ddp_worker.py RANK FOLDER.

Each saves its gradients; rank 0 also those of a single process on both shares.
"""

import sys
from pathlib import Path

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


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    images = torch.randn(4, 1, 37, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = nn.parallel.DistributedDataParallel(accelerate(network(), tile=16))
    for share in (images[rank::2][:1], images[rank::2][1:]):  # two steps: the second reuses DDP's buckets
        model.zero_grad()
        model(share).square().sum().backward()
    torch.save(gradients(model), folder / f"rank{rank}.pt")
    if rank == 0:
        alone = accelerate(network(), tile=16)
        (alone(images[2:]).square().sum() / 2).backward()
        torch.save(gradients(alone), folder / "alone.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
