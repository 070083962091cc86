"""Networks of a few layers, as the factories that options and checkpoints name: `tiny_nets:normed`."""

from __future__ import annotations

from torch import nn

from gigamorph.engine.models.resnet import BasicBlock, ResNet


def normed(num_classes: int = 2, in_channels: int = 1) -> nn.Sequential:
    """Two convolutions with strides, and a norm whose statistics training updates."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def wide(num_classes: int = 1000, in_channels: int = 1) -> nn.Sequential:
    """The stem of ResNet-18 and a convolution: of maps as large as its own, which take most of its memory."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def resnet(num_classes: int = 2, in_channels: int = 1) -> ResNet:
    """Two residual blocks, of which the second has a stride and a convolution beside it."""
    return ResNet(BasicBlock, (1, 0, 0, 1), num_classes, in_channels, width=8)
