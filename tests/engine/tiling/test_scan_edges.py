"""Cases of the scan that were wrong once, and borders that random networks rarely meet."""

import pytest
import torch
from around import tied
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F


class Lambda(nn.Module):
    """A function with one parameter before it, so that there is always a gradient."""

    def __init__(self, function, channels: int = 2):
        super().__init__()
        self.first = nn.Conv2d(channels, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 2, 17, 3), (1, 2, 33, 11), (2, 2, 3, 17)])
def test_frozen_norm_of_a_block_one_pixel_wide(shape):
    """PyTorch's own batch_norm is wrong there if the gradient is ordered channels-last."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 2)
            nn.init.uniform_(self.norm.running_mean)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.first(x)
            y = self.norm(x)
            return self.last(x).permute(0, 2, 3, 1).mean((1, 2)), y.permute(0, 2, 3, 1).mean((1, 2)), y.mean((2, 3))

    assert_exact(Net().double().eval(), image(*shape), tile=(16, 2))


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_pool_of_one_pixel_in_the_middle(pool):
    """A kernel that covers a map of one pixel is a window all the same: maps may follow."""
    net = Lambda(lambda x: F.conv2d(pool(x, 1) + x, torch.ones(3, 2, 1, 1, dtype=x.dtype)).mean((2, 3)))
    assert_exact(net.double(), image(1, 2, 1, 1), tile=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 23), (23, 1), (2, 3)])
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_narrow_images(size, tile):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
    )
    assert_exact(net.double().eval(), image(2, 2, *size), tile=tile)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.conv2d(x * x, torch.ones(1, 2, 1, 1, dtype=x.dtype), stride=2, padding=1),
        lambda x: F.pad(x * x, (1, 1, -9, 2)),
    ],
)
def test_windows_wholly_in_the_padding(function):
    assert_exact(Lambda(function).double(), image(1, 2, 9, 7), tile=2)


def test_ties_across_tiles():
    """Equal maxima: amax spreads the gradient over all of them, adaptive_max_pool2d gives it to the first."""
    net = Lambda(lambda x: (tied(x).amax((2, 3)), F.adaptive_max_pool2d(tied(x) * x.detach().round(), 1)))
    flat = torch.zeros(2, 2, 13, 11, dtype=torch.float64)
    flat[0, :, 3, 4] = flat[0, :, 9, 1] = 3.0
    net = net.double()
    torch.nn.init.constant_(net.first.weight, 1.0)
    for tile in ((1, 1), (4, 3), (13, 2), (50, 50)):
        assert_exact(Lambda(lambda x: (x.amax((2, 3)), F.adaptive_max_pool2d(x, 1))).double(), flat, tile=tile)
        assert_exact(net, flat, tile=tile)


def test_no_gradient_wanted_by_the_image():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, 2, 1), nn.AdaptiveAvgPool2d(1))
    assert_exact(net.double(), image(1, 2, 21, 18), tile=(5, 8), image_gradient=False)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=2)], ids=str)
@pytest.mark.parametrize("way", ["detach", "no_grad", "mask"])
def test_values_read_without_a_gradient(pool: nn.Module, way: str):
    """What later tiles hand back for a map was lost in tiles where only an op without a gradient reads its block."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pool, self.conv = nn.Conv2d(2, 3, 3, padding=1), pool, nn.Conv2d(3, 3, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.stem(x))
            if way == "detach":
                x = x + self.conv(x).mul(2).detach()
            elif way == "no_grad":
                with torch.no_grad():
                    y = self.conv(x)
                x = x * y
            else:
                x = x * (self.conv(x) > 0)
            return x.mean((2, 3))

    for tile in ((3, 3), (4, 2), (7, 5)):
        assert_exact(Net().double(), image(2, 2, 20, 17), tile=tile)
