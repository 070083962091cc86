"""LesionNet: a small network without normalisation layers, for small findings in large images.

It trains from scratch at batch size 1: residual branches start at zero (Fixup, Zhang et al. 2019), so no batch
statistics are needed. The stem's filters start with mean zero, so that the slow grey levels of tissue do not drown
fine detail. The pooling is a maximum, so that a finding of a few pixels is not averaged away in an image of millions.
Every operation before that pooling is local: a training step is one scan over the tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class FixupBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))); the second convolution starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, 1)
        self.conv2 = _conv(channels, channels, 3, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class LesionNet(nn.Module):
    """(N, in_channels, H, W) -> (N, num_classes).

    Args:
        num_classes: outputs.
        in_channels: image channels.
        width: channels after the stem; each later stage has twice as many.
        stages: number of halvings of the resolution, including the stem's; the output stride is ``2 ** stages``.
    """

    def __init__(self, num_classes: int = 2, in_channels: int = 1, width: int = 8, stages: int = 3) -> None:
        super().__init__()
        self.stem = _conv(in_channels, width, 5, 2)
        with torch.no_grad():
            self.stem.weight -= self.stem.weight.mean((2, 3), keepdim=True)
        self.stages = nn.Sequential()
        for _ in range(stages - 1):
            self.stages.append(nn.Sequential(_conv(width, 2 * width, 3, 2), nn.ReLU(), FixupBlock(2 * width)))
            width *= 2
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem(x)))
        return self.fc(x.amax((2, 3)))
