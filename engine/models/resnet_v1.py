"""ResNet-50 as in Keras: the stride is in the first convolution of a block, not in the second."""

from __future__ import annotations

from torch import nn

from .resnet import Bottleneck, ResNet

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
