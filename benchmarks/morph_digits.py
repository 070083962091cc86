"""Task and network of the training benchmark: scikit-learn's digits, enlarged, at random positions with noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 24  # pixels of an image; a digit has 16
NOISE = 0.35  # standard deviation; grey levels are 0 to 1
TEST = 597  # number of test digits, out of 1,797
VIEWS = 3  # number of test images per test digit


@dataclass(frozen=True)
class Digits:
    """Training digits (N, 1, 16, 16), and test images (M, 1, 24, 24) that are the same in every run."""

    digits: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """Load the data set from scikit-learn; the split and the test images do not depend on the run's seed."""
    data: Any = load_digits()
    digits = F.interpolate(torch.tensor(data.images)[:, None].float() / 16, scale_factor=2, mode="bilinear")
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(12345)
    order = torch.randperm(len(digits), generator=generator)
    test, train = order[:TEST].repeat(VIEWS), order[TEST:]
    return Digits(digits[train], labels[train], place(digits[test], generator), labels[test])


def place(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Place each digit (N, 1, 16, 16) at a random position of an image (N, 1, 24, 24), and add noise."""
    room = SIDE - digits.shape[-1] + 1
    images = torch.zeros(len(digits), 1, SIDE, SIDE)
    corners = torch.randint(room, (len(digits), 2), generator=generator)
    for image, digit, (y, x) in zip(images, digits, corners.tolist(), strict=True):
        image[:, y : y + digit.shape[-2], x : x + digit.shape[-1]] = digit
    return images + NOISE * torch.randn(images.shape, generator=generator)


def initialise(conv: nn.Conv2d) -> None:
    """Apply He initialisation, as for all networks of the benchmark, because not all convolutions have a BatchNorm."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class Block(nn.Module):
    """Residual block relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        more = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*layers, nn.ReLU(), *more)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Net(nn.Module):
    """A residual network of three stages of stride 2: (N, 1, 24, 24) -> (N, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        channels = 1
        for out in (width, 2 * width, 4 * width):
            first = nn.Conv2d(channels, out, 3, 2, 1, bias=False)
            self.stages.append(nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), Block(out)))
            channels = out
        self.fc = nn.Linear(channels, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                initialise(module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x).mean((2, 3)))
