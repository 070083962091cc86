"""Gradients lie in memory as their parameters do, of which DistributedDataParallel warns otherwise."""

import pytest
import torch
from torch import nn

from gigamorph import accelerate


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_strides_of_gradients(training, memory_format):
    """1x1 kernels, depthwise kernels and one input channel have axes of one element, whose strides may be any."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    net = accelerate(network.train(training).to(memory_format=memory_format), tile=16)
    net(torch.rand(2, 1, 40, 33).to(memory_format=memory_format)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name
