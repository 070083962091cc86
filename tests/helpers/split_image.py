"""Training steps on an image that all processes share."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from exactness import Step, randomize, step, step_errors
from random_net import Program
from sync_norms import store
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.dense import dense_loss
from gigamorph.engine.errors import GigamorphError


class Residual(nn.Module):
    def __init__(self, before: int, after: int, norm: Any, excite: bool = False):
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, 2, 1), nn.Conv2d(after, after, 3, padding=1)
        self.aside = nn.Conv2d(before, after, 1, 2)
        self.norms = nn.ModuleList([norm(after) for _ in range(3)])
        self.excite = nn.Linear(after, after) if excite else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.two(self.norms[0](self.one(x)).relu()))
        if self.excite is not None:
            y = y * self.excite(y.mean((2, 3))).sigmoid()[:, :, None, None]
        return (y + self.norms[2](self.aside(x))).relu()


class Net(nn.Module):
    def __init__(self, norm: Any, excite: bool = False, pooling: Any = None):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 7, 2, 3, bias=False), norm(4)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = Residual(4, 6, norm, excite)
        self.pooling = pooling or nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.pool(self.norm(self.stem(x)).relu()))
        return self.last(self.pooling(x).flatten(1))


class Amax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3), keepdim=True)


class Unet(nn.Module):
    """Skips, upsampling, a dense output and one number."""

    def __init__(self):
        super().__init__()
        self.down, self.mid = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.norm, self.out = nn.BatchNorm2d(6), nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.down(x).relu()
        b = self.norm(self.mid(a))
        up = F.interpolate(b, size=a.shape[2:], mode="bilinear")
        a = torch.cat([up, a], 1)
        a = F.interpolate(a, size=x.shape[2:], mode="nearest")
        return self.out(torch.cat([a, x], 1)), b.mean((2, 3))


class Ties(nn.Module):
    """Maxima that many pixels share."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.max_pool2d(x, 3, 2, 1)
        return y.amax((2, 3)), F.adaptive_max_pool2d(y, 1), y.logsumexp((2, 3)), y.norm(dim=(2, 3))


class Strips(nn.Module):
    """Statistics of rows and of columns, and of a grid whose cells overlap, spread over the map again."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.rows, self.cells = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(self.conv(x))
        rows = self.rows(x.mean(3, keepdim=True)).sigmoid() * x.var(2, keepdim=True)
        cells = F.interpolate(self.cells(F.adaptive_avg_pool2d(x, (3, 2))), x.shape[2:], mode="bilinear")
        x = x * rows + cells * x.amax(2, keepdim=True) - x.std(3, keepdim=True)
        return x.mean((2, 3)), F.adaptive_max_pool2d(x, (2, 5)), x.max(3).values.mean(2), x.amax(3).mean(2)


NETS: dict[str, Any] = {
    "frozen": lambda: Net(nn.BatchNorm2d).eval(),
    "live": lambda: Net(lambda c: nn.BatchNorm2d(c, momentum=0.3)).train(),
    "cumulative": lambda: Net(lambda c: nn.BatchNorm2d(c, momentum=None)).train(),
    "groups": lambda: Net(lambda c: nn.GroupNorm(2, c)).train(),
    "excite": lambda: Net(nn.BatchNorm2d, True).eval(),
    "excite, live": lambda: Net(nn.BatchNorm2d, True).train(),
    "max": lambda: Net(nn.BatchNorm2d, pooling=nn.AdaptiveMaxPool2d(1)).eval(),
    "amax": lambda: Net(nn.BatchNorm2d, pooling=Amax()).train(),
    "unet": lambda: Unet().train(),
    "ties": Ties,
    "strips": lambda: Strips().train(),
    "circular": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 5, padding=3, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, 2, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
    ),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(NETS[name]().double())


def image(size: tuple[int, int], number: int = 2) -> Tensor:
    x = torch.randn(number, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.round(decimals=0) if size[0] % 2 else x  # equal values, so that maxima are shared


def in_shards(name: str, size: tuple[int, int], tile: int, ranges: bool = False) -> Step:
    """A step on an image that all processes share."""
    store(ranges)
    return step(accelerate(network(name), tile=tile, split=True), image(size))


def in_pairs(name: str, sizes: Sequence[tuple[int, int]]) -> Step:
    """Two processes share an image, two others another one."""
    store(False)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    return step(accelerate(network(name), tile=16, split=groups[pair]), image(sizes[pair]))


def programs_in_shards(programs: Sequence[Program]) -> list[float]:
    """The largest error of each program, without and with maps computed again; NaN for those that are left out."""
    found = []
    for number, program in enumerate(programs):
        model = program.build()
        x = torch.randn(program.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        stock = step(copy.deepcopy(model), x)
        sizes = [t.norm() for t in (stock.image, *stock.gradients.values()) if t is not None]
        finite = all(output.isfinite().all() for output in stock.outputs)
        if not finite or sizes[0] < 1e-6 or max(sizes) > 1e6:  # norms of maps whose values are all equal
            found.append(torch.nan)
            continue
        store(number % 2 == 1)
        fast = accelerate(model, tile=program.tile, halos=program.halos, split=True)
        found.append(max(step_errors(stock, step(fast, x)).values()))
    return found


def after_one_records_again() -> list[Tensor]:
    """What a network gives before and after one process alone records it again, with other random numbers in each."""
    torch.manual_seed(dist.get_rank())
    fast = accelerate(network("frozen"), tile=32, split=True)
    before = fast(image((40, 40))).detach()
    if dist.get_rank() == 1:
        torch.compiler.reset()
    return [before, fast(image((40, 40))).detach()]


def rows_read(size: tuple[int, int]) -> tuple[int, int]:
    """The first and the last row of an image that this process reads in a step."""
    rows: list[int] = []

    class Source:
        shape, name = (2, *size), "an image"

        def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
            rows.extend((top, bottom) if top < bottom else ())
            return torch.ones(2, bottom - top, right - left)

    accelerate(network("frozen"), tile=32, split=True)(Source()).sum().backward()  # pyright: ignore
    return min(rows), max(rows)


def in_ddp_too(size: tuple[int, int]) -> Step:
    """As `in_bands`, with the gradients averaged once more by DDP."""
    store(False)
    fast = accelerate(network("live"), tile=32, split=True)
    found = step(nn.parallel.DistributedDataParallel(fast), image(size))
    cut = [{n.removeprefix("module."): t for n, t in group.items()} for group in (found.gradients, found.buffers)]
    return replace(found, gradients=cut[0], buffers=cut[1])


def dense(bands: bool) -> list[Tensor | None]:
    """A loss of the pixels of a map, and its gradients."""
    store(False)
    net = network("unet")
    labels = torch.arange(2 * 45 * 38).reshape(2, 45, 38) % 2

    def criterion(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs[0], labels, label_smoothing=0.1) + outputs[1].square().sum()

    x = image((45, 38))
    loss = (
        dense_loss(accelerate(net, tile=16, split=True), x, labels, criterion) if bands else criterion(net(x), labels)
    )
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


def refusals() -> list[str]:
    """What is said to processes that have other images, random numbers by position, too little memory, two sizes, other
    weights, other statistics, another mode.
    """
    rank = dist.get_rank()
    drops = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Dropout(), nn.AdaptiveAvgPool2d(1)).double()
    net = accelerate(network("frozen"), tile=32, split=True)
    weights, statistics, mode = (network("frozen") for _ in range(3))
    nn.init.constant_(weights.last.bias, rank)
    nn.init.constant_(statistics.norm.running_mean, rank)
    mode.norm.train(rank == 0)
    calls: list[Callable[[], Any]] = [
        lambda: net(image((40 + rank, 40))),
        lambda: accelerate(drops, tile=32, split=True)(image((40, 40))),
        lambda: net.evidence(image((40, 40))),
        lambda: accelerate(network("live"), memory_budget=1000, split=True)(image((40, 40))),
        lambda: accelerate(network("live"), tile=32, split=True)([image((40, 40)), image((41, 40))]),
        *(lambda net=net: accelerate(net, tile=32, split=True)(image((40, 40))) for net in (weights, statistics, mode)),
    ]
    found = []
    for call in calls:
        try:
            found.append(str(call()))
        except GigamorphError as error:
            found.append(str(error))
    return found


def enough_memory() -> tuple[str, bool]:
    """What is said of a budget in which nothing fits, and whether the step runs in the one that it names."""
    net, x = network("live"), image((160, 120))
    try:
        accelerate(net, memory_budget="300KiB", split=True)(x)
    except GigamorphError as error:
        said = str(error)
        named = re.search(r"needs at least ([\d.]+ \w+), ", said)
        return said, named is not None and bool(accelerate(net, memory_budget=named[1], split=True)(x).isfinite().all())
    return "", False


def dropout_in_the_head(split: bool) -> Tensor:
    """Outputs and gradients of two steps with a dropout of channels and one of the pooled values."""
    rank = dist.get_rank() if split else 0
    torch.manual_seed(rank)
    torch.rand(rank)  # the processes' own random numbers differ
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Dropout2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout())
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    fast = accelerate(net.double(), tile=8, split=split)
    outputs = [fast(image((20, 20))) for _ in range(2)]
    torch.stack(outputs).square().sum().backward()
    return torch.cat([*(t.flatten() for t in outputs), *(p.grad.flatten() for p in net.parameters())]).detach()
