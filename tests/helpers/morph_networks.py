"""Small networks for tests of widening and training: one per family of layers, and a few deterministic steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gigamorph.engine.models.resnet import BasicBlock, ResNet
from gigamorph.engine.morph.spaces import find_spaces

X = torch.zeros(1, 3, 8, 8)


def half_resnet(num_classes: int, in_channels: int, width: int, blocks: int = 1) -> ResNet:
    """The first half of a ResNet: `blocks` blocks in the first stage, one in the second."""
    model = ResNet(BasicBlock, (blocks, 1, 1, 1), num_classes, in_channels, width=width)
    model.layer3 = model.layer4 = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    model.fc = nn.Linear(2 * width, num_classes)
    return model


class Residual(nn.Module):
    """Two residual blocks with BatchNorm on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.a = nn.ModuleList(nn.Conv2d(6, 4, 3, padding=1, bias=False) for _ in range(2))
        self.n = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.b = nn.ModuleList(nn.Conv2d(4, 6, 1) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        for a, n, b in zip(self.a, self.n, self.b, strict=True):
            x = x + b(F.gelu(n(a(x))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted bottleneck with squeeze-and-excite and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1, bias=False)
        self.n1 = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.n2 = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n2(self.depth(F.silu(self.n1(self.expand(x))))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.project(x).mean((2, 3))


class Next(nn.Module):
    """A ConvNeXt block: LayerNorm over channels, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma = nn.Parameter(torch.full((6,), 0.7))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        x = x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Grouped convolution, concatenation, one parameter for all channels, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.act = nn.PReLU()
        self.group = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(10, 4, 2, 2)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.group(self.act(self.a(x))), torch.tanh(self.b(x))], 1)
        return self.head(self.act(self.up(x))).mean((2, 3))


class Groups(nn.Module):
    """ResNeXt blocks: groups of three channels that give two, behind a LayerNorm or BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.n = nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.m, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.norm, self.d = nn.LayerNorm(6), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c(F.relu(self.m(self.b(F.relu(self.n(self.a(x)))))))
        x = x + self.d(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.head(x.mean((2, 3)))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.PReLU(6),
        nn.Flatten(),
        nn.Linear(6 * 16, 7),
        nn.Hardswish(),
        nn.Linear(7, 5),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "residual": Residual,
    "depthwise": Depthwise,
    "layernorm": Next,
    "concat": Concat,
    "groups": Groups,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    return NETWORKS[name]().double()


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0, side: int = 8) -> float:
    """The last loss."""
    model.train()
    loss = torch.zeros(())
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, side, side, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (6,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def outputs(model: nn.Module, side: int = 8) -> Tensor:
    """In train and eval mode, on a batch that was not trained on."""
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    with torch.no_grad():
        model.eval()
        result = model(x)
        return torch.cat([result, copy.deepcopy(model).train()(x)])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def doubled(model: nn.Module, times: int = 2, groups: str = "more", side: int = 8) -> dict[str, int]:
    spaces = find_spaces(copy.deepcopy(model).float(), torch.zeros(1, 3, side, side), groups=groups)
    return {s.key: times * s.width for s in spaces.growable()}
