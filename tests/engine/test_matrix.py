"""The exactness matrix: every kind of layer, at sizes of every kind, in batches of 1, 2 and 4, in many tiles.

Each kind meets every size, every tile and every batch: a quarter of the pairs of size and tile, the next kind another
quarter, and kind by kind the sizes move on by one. Inference, which is the same forward without a graph, is compared
for batches of several images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from exactness import assert_each_exact, assert_exact, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate

SIZES = {
    "multiple of the tile": (32, 16),
    "odd": (25, 35),
    "prime": (23, 29),
    "smaller than a tile": (10, 9),
    "long": (53, 11),
}
BATCHES = (1, 2, 4, 2, 4)
TILES = (8, (5, 12), 16, 64)
C = 4


class Gate(nn.Module):
    """Squeeze-and-excite: each channel times a function of a statistic of the whole image."""

    def __init__(self, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool, self.excite = pool, nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.pool(x)).sigmoid()


class ResponseNorm(nn.Module):
    """Global response norm (ConvNeXt V2)."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        response = x.square().sum((2, 3), keepdim=True).sqrt()
        return x + self.gain * x * (response / (response.mean(1, keepdim=True) + 1e-6))


class PerPixel(nn.Module):
    """A layer that takes the channels last."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Two paths that wait for each other; `join` adds or concatenates them."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.long = nn.Sequential(nn.Conv2d(C, C, 5, padding=2), nn.Tanh(), nn.Conv2d(C, C, 3, padding=1))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.long(x), x)


class Image(nn.Module):
    """A norm whose weights have a value for each position."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def even(x: Tensor) -> Tensor:
    return x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]


def blur_pool(x: Tensor) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    return F.conv2d(
        F.pad(x, (1, 2, 1, 2), mode="reflect"), (taps[:, None] * taps).expand(C, 1, 4, 4), None, 2, groups=C
    )


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]
    channels: int = C  # that come out
    training: bool = False


def conv(*args, **kwargs) -> Kind:
    return Kind(lambda: nn.Conv2d(C, C, *args, **kwargs))


def up(*args, **kwargs) -> Kind:
    return Kind(lambda: nn.ConvTranspose2d(C, C, *args, **kwargs))


def of(function: Callable[[Tensor], Tensor], channels: int = C) -> Kind:
    return Kind(lambda: Function(function), channels)


KINDS = {
    "conv 1": conv(1),
    "conv 3": conv(3, padding=1),
    "conv 5 without padding": conv(5),
    "conv 7": conv(7, padding=3),
    "conv 3 without bias": conv(3, padding=1, bias=False),
    "conv 2": conv(2, padding=1),
    "conv 4 same": conv(4, padding="same"),
    "conv 1 stride 2": conv(1, 2),
    "conv 3 stride 2": conv(3, 2, 1),
    "conv 7 stride 4": conv(7, 4, 3),
    "conv 2 stride 2": conv(2, 2),
    "conv 3 stride 4": conv(3, 4),
    "conv 1x7 stride 1x2": conv((1, 7), (1, 2), (0, 3)),
    "conv dilated": conv(3, padding=2, dilation=2),
    "conv dilated by 4, stride 2": conv(3, 2, 4, dilation=4),
    "conv in groups": conv(3, padding=1, groups=2),
    "conv depthwise": conv(5, padding=2, groups=C),
    "conv reflected": conv(3, padding=1, padding_mode="reflect"),
    "conv replicated": conv(5, padding=2, padding_mode="replicate"),
    "conv circular": conv(3, padding=1, padding_mode="circular"),
    "transposed 2 stride 2": up(2, 2),
    "transposed 4 stride 2": up(4, 2, 1),
    "transposed 3 stride 2": up(3, 2, 1, output_padding=1),
    "transposed 3 stride 1": up(3, 1, 1),
    "transposed, dilated, in groups": up(3, 2, 2, groups=2, dilation=2, bias=False),
    "pad zeros": of(lambda x: F.pad(x, (3, 0, 1, 2))),
    "pad a value, crop": of(lambda x: F.pad(x, (2, -1, -3, 1), value=0.7)),
    "pad reflected": of(lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect")),
    "pad replicated": of(lambda x: F.pad(x, (4, 0, 1, 2), mode="replicate")),
    "pad circular": of(lambda x: F.pad(x, (2, 1, 0, 3), mode="circular")),
    "max pool 2": of(lambda x: F.max_pool2d(x, 2)),
    "max pool 3 stride 2": of(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max pool 5 stride 1": of(lambda x: F.max_pool2d(x, 5, 1, 2)),
    "max pool 2, last window cut": of(lambda x: F.max_pool2d(x, 2, ceil_mode=True)),
    "max pool dilated": of(lambda x: F.max_pool2d(x, 3, 1, 1, dilation=2)),
    "avg pool 2": of(lambda x: F.avg_pool2d(x, 2)),
    "avg pool 3 stride 2": of(lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "avg pool 3 over what is there": of(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    "avg pool 2, last window cut": of(lambda x: F.avg_pool2d(x, 2, 2, 0, True, False)),
    "blur pool": of(blur_pool),
    "space to depth": of(lambda x: F.pixel_unshuffle(even(x), 2), 4 * C),
    "depth to space": of(lambda x: F.pixel_shuffle(torch.cat([x, x.sin(), x.cos(), x.square()], 1), 2)),
    "nearest": of(lambda x: F.interpolate(x, scale_factor=2)),
    "nearest to a size": of(lambda x: F.interpolate(x, size=(33, 14))),
    "nearest exact": of(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    "bilinear": of(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "bilinear, corners aligned": of(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)),
    "bilinear to a size": of(lambda x: F.interpolate(x, size=(33, 14), mode="bilinear")),
    "residual": Kind(lambda: Residual(torch.add)),
    "concatenated": Kind(lambda: Residual(lambda x, y: torch.cat([x, y], 1)), 2 * C),
    "frozen batch norm": Kind(lambda: nn.BatchNorm2d(C)),
    "live batch norm": Kind(lambda: nn.BatchNorm2d(C), training=True),
    "live batch norm, cumulative": Kind(lambda: nn.BatchNorm2d(C, momentum=None), training=True),
    "batch norm without running statistics": Kind(lambda: nn.BatchNorm2d(C, track_running_stats=False)),
    "group norm": Kind(lambda: nn.GroupNorm(2, C)),
    "instance norm": Kind(lambda: nn.InstanceNorm2d(C, affine=True)),
    "layer norm over channels": Kind(lambda: PerPixel(nn.LayerNorm(C))),
    "layer norm, linear, GELU": Kind(lambda: PerPixel(nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.GELU()), 3 * C),
    "RMS norm over channels": Kind(lambda: PerPixel(nn.RMSNorm(C))),
    "layer norm over the image": Kind(Image),
    "local response norm": Kind(lambda: nn.LocalResponseNorm(3)),
    "response norm": Kind(ResponseNorm),
    "squeeze and excite": Kind(lambda: Gate(nn.AdaptiveAvgPool2d(1))),
    "gate of the maximum": Kind(lambda: Gate(lambda x: x.amax((2, 3), keepdim=True))),
}


class Around(nn.Module):
    """A layer between two convolutions, so that tiles hand halos on before and after it, and a global pooling."""

    def __init__(self, kind: Kind):
        super().__init__()
        # No bias: in front of a norm its gradient is nothing but rounding.
        self.first, self.layer = nn.Conv2d(2, C, 3, padding=1, bias=False), kind.make()
        self.last = nn.Conv2d(kind.channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)).tanh()).sin().mean((2, 3))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Around(KINDS[name])).double().train(KINDS[name].training)


def image(size: tuple[int, int], batch: int) -> Tensor:
    return torch.randn(batch, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_each_size_in_each_tile(name):
    turn = list(KINDS).index(name)
    places = range(turn, turn + len(SIZES))
    sizes = [list(SIZES.values())[place % len(SIZES)] for place in places]
    images = [image(size, batch) for size, batch in zip(sizes, BATCHES, strict=True)]
    assert_each_exact(network(name), [(x, TILES[place % len(TILES)]) for x, place in zip(images, places, strict=True)])


@pytest.mark.parametrize("name", KINDS)
def test_float32(name):
    inference = list(KINDS).index(name) % 2 == 0
    assert_exact(network(name).float(), image((25, 19), 2).float(), tile=(9, 8), limit=1e-5, inference=inference)


@pytest.mark.parametrize("name", ["conv 7 stride 4", "residual", "live batch norm", "squeeze and excite", "bilinear"])
def test_the_result_does_not_depend_on_the_tile(name):
    """Any side from one pixel to more than the image, both of them unlike each other."""
    x, model, results = image((23, 17), 2), network(name), []
    fast, buffers = accelerate(model), copy.deepcopy(dict(model.named_buffers()))
    for fast.tile in ((64, 64), (23, 17), (1, 17), (23, 2), (3, 3), (7, 5), (16, 16), (22, 16)):
        model.zero_grad()
        model.load_state_dict(buffers, strict=False)
        leaf = x.clone().requires_grad_()
        fast(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters())])
    largest = max(grad.norm() for grad in results[0])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert (got - expected).norm() <= 1e-12 * max(expected.norm(), 1e-3 * largest)
