"""ResNet-18, -34 and -50 with torchvision's parameter names, for any number of input channels and any width.

ResNet-50 also as in Keras: the stride is in the first convolution of a block, not in the second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + skip)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride, as in torchvision's v1.5) and 1x1 convolutions and a skip connection."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + skip)


class ResNet(nn.Module):
    """(N, in_channels, H, W) -> (N, num_classes). Parameter names and shapes are torchvision's at ``width=64``."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self._channels = width
        self.layer1 = self._stage(block, width, depths[0], 1)
        self.layer2 = self._stage(block, 2 * width, depths[1], 2)
        self.layer3 = self._stage(block, 4 * width, depths[2], 2)
        self.layer4 = self._stage(block, 8 * width, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, block: type[BasicBlock] | type[Bottleneck], channels: int, depth: int, stride: int) -> nn.Module:
        blocks = []
        for index in range(depth):
            out_channels = channels * block.expansion
            downsample = None
            if stride != 1 or self._channels != out_channels:
                downsample = nn.Sequential(
                    nn.Conv2d(self._channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
                )
            blocks.append(block(self._channels, channels, stride if index == 0 else 1, downsample))
            self._channels, stride = out_channels, 1
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-18; see `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, width)


def resnet34(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-34; see `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, width)


def resnet50(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-50 (v1.5); see `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, width)


EPS, OLD_EPS = 1.001e-5, 1e-3
"""BatchNorm epsilon of Keras' ResNet-50 with new layer names (conv2_block1_1_conv) and old ones (res2a_branch2a)."""


class BottleneckV1(Bottleneck):
    """`Bottleneck` with the stride in the first 1x1 convolution (He et al., 2015, and Caffe)."""

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(in_channels, channels, 1, downsample)
        self.conv1.stride = (stride, stride)


def resnet50_v1(
    num_classes: int = 1000, in_channels: int = 3, width: int = 64, eps: float = EPS, pool_padding: int = 1
) -> ResNet:
    """Build ResNet-50 (v1) with Keras' BatchNorm settings; parameter names are those of `resnet50`.

    Args:
        width: channels of the first convolution.
        eps: epsilon of BatchNorm; see `EPS`.
        pool_padding: padding of the first pooling; 0 as in Keras 2.0, which has no layer pool1_pad.
    """
    net = ResNet(BottleneckV1, (3, 4, 6, 3), num_classes, in_channels, width)
    net.maxpool.padding = pool_padding
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = eps, 0.01  # Keras' momentum of 0.99
    return net
