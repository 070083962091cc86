"""Networks with SyncBatchNorm, trained for two steps in one process and in several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from exactness import randomize
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from gigamorph import accelerate, kernels
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.lowering.ops import Maps
from gigamorph.engine.lowering.stages import Divider
from gigamorph.engine.planning.strategy import Strategy, cut_maps, segments_between, strategies
from gigamorph.kernels import choice


def pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 2)


class Branches(nn.Module):
    """Norms one behind the other and side by side, of a pooled grid too, with and without momentum."""

    def __init__(self):
        super().__init__()
        self.first, self.one = nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.SyncBatchNorm(4, momentum=0.3)
        self.second, self.two = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.SyncBatchNorm(6, momentum=None)
        self.aside, self.three = nn.Conv2d(4, 6, 1, bias=False), nn.SyncBatchNorm(6, affine=False)
        self.third, self.four = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6).eval()
        self.grid, self.last = nn.SyncBatchNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x)).relu()
        x = (self.two(self.second(x)) + self.three(self.aside(x))).relu()
        x = (x + self.four(self.third(x))).relu()
        x = x * self.grid(pool(x)).mean((2, 3), keepdim=True).sigmoid()
        return self.last(x.mean((2, 3)))

    def train(self, mode: bool = True) -> Branches:
        super().train(mode)
        self.four.eval()
        return self


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Branches().double()).train()


def in_one_process(net: Branches, xs: list[Tensor]) -> list[Tensor]:
    """The outputs for image batches of several sizes whose norms see the pixels of all of them, by stock PyTorch."""

    def norm(module: nn.SyncBatchNorm, maps: list[Tensor]) -> list[Tensor]:
        pixels = torch.cat([x.transpose(0, 1).flatten(1) for x in maps], 1)
        parts = module(pixels[None])[0].split([x.shape[0] * x[0, 0].numel() for x in maps], 1)
        return [
            part.unflatten(1, (x.shape[0], *x.shape[2:])).transpose(0, 1) for part, x in zip(parts, maps, strict=True)
        ]

    xs = [x.relu() for x in norm(net.one, [net.first(x) for x in xs])]
    main, aside = norm(net.two, [net.second(x) for x in xs]), norm(net.three, [net.aside(x) for x in xs])
    xs = [(a + b).relu() for a, b in zip(main, aside, strict=True)]
    xs = [(x + net.four(net.third(x))).relu() for x in xs]
    grids = [grid.mean((2, 3), keepdim=True).sigmoid() for grid in norm(net.grid, [pool(x) for x in xs])]
    return [net.last((x * grid).mean((2, 3))) for x, grid in zip(xs, grids, strict=True)]


def images(rank: int, step: int, sizes: list[tuple[int, int]]) -> Tensor:
    """A rank's images in a step, one or two of the rank's size."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(1 + rank % 2, 2, *sizes[rank % len(sizes)], dtype=torch.float64, generator=generator) + rank


def state(net: nn.Module) -> dict[str, Any]:
    """Gradients and buffers by name."""
    found: dict[str, Any] = {f"gradient of {n.removeprefix('module.')}": p.grad for n, p in net.named_parameters()}
    return found | {n.removeprefix("module."): b.clone() for n, b in net.named_buffers()}


def with_segments(maps: Maps, nodes: list[Any], *_: Any) -> Iterator[Strategy]:
    """The choice to compute again, in the backward, what lies between two cuts."""
    divider = Divider(maps, nodes)
    cuts = cut_maps(divider)
    network = divider.split(divider.crossing(cuts), cuts)
    network.segments = segments_between(network, cuts)
    yield Strategy("ranges", network, 0.0, 0)


def store(ranges: bool) -> None:
    """Let plans keep all maps that are read again, or compute again those between two cuts."""
    sys.modules["gigamorph.engine.planning.search"].strategies = with_segments if ranges else strategies  # pyright: ignore


def in_ddp(sizes: list[tuple[int, int]], ranges: bool, share: int | None, fused: bool = False) -> dict[str, Any]:
    """Two steps of this process's images in DDP.

    Args:
        sizes: of the images of each rank, see `images`.
        ranges: whether steps are computed again in the backward.
        share: how many neighbouring processes share their statistics; None for all.
        fused: the graph of a GPU, each op of it computed by PyTorch, in one tile.
    """
    if fused:
        with mock.patch.object(kernels, "enabled", lambda device: True), choice.override("stock"):
            return _in_ddp(sizes, ranges, share, 64)
    return _in_ddp(sizes, ranges, share, 9)


def _in_ddp(sizes: list[tuple[int, int]], ranges: bool, share: int | None, tile: int) -> dict[str, Any]:
    net, rank = network(), dist.get_rank()
    if share is not None:
        groups = [dist.new_group(list(range(r, r + share))) for r in range(0, dist.get_world_size(), share)]
        for module in net.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.process_group = groups[rank // share]
    store(ranges)
    fast = accelerate(net, tile=tile)
    # Stock's SyncBatchNorm runs on GPUs alone, so DDP refuses it elsewhere.
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # pyright: ignore
    model = nn.parallel.DistributedDataParallel(fast, broadcast_buffers=False)
    outputs = []
    for step in range(2):
        model.zero_grad()
        outputs.append(model(images(rank, step, sizes)))
        outputs[-1].square().sum().backward()
        outputs[-1] = outputs[-1].detach()
    return {"outputs": outputs, **state(model)}


def unlike_plans(size: tuple[int, int]) -> str:
    """What a step says where the processes store other maps."""
    store(dist.get_rank() == 0)
    try:
        accelerate(network(), tile=9)(images(0, 0, [size]))
    except GigamorphError as error:
        return str(error)
    return ""
