"""Strides: what the network hands out lies in memory as stock's does, whatever the order of the image and its dtype.

Losses flatten predictions by `view`, which only some orders allow; some forwards ask an image for its order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gigamorph import accelerate

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a crop": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one channel for all": lambda x: x[:, :1].expand_as(x),
}


class Maps(nn.Module):
    """Gives maps of several kinds, keeps one, and asks for its image's order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 2, 2)
        self.kept: Any = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x)).relu()
        self.kept = y * 2
        z = self.up(y)
        scale = 2.0 if x.is_contiguous() else x.stride(1) / 7
        last = y.permute(0, 2, 3, 1)
        return {"map": z * scale, "last": last, "copied": last.contiguous(), "pooled": y.mean((2, 3)), "half": y[:, :2]}


@settings(max_examples=12, deadline=None)
@given(
    order=st.sampled_from(list(ORDERS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    training=st.booleans(),
    by_channels=st.booleans(),
    tile=st.sampled_from([8, 17, 64]),
    images=st.integers(1, 2),
)
def test_results_lie_in_memory_as_stocks(
    order: str, dtype: torch.dtype, training: bool, by_channels: bool, tile: int, images: int
) -> None:
    torch.manual_seed(0)
    stock = Maps().to(dtype).train(training)
    if by_channels:
        stock = stock.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    net = accelerate(copy.deepcopy(stock), tile=tile)
    x = ORDERS[order](torch.randn(images, 2, 22, 26, dtype=dtype))
    expected, got = stock(x), net(x)
    for name in ("map", "last", "copied", "pooled"):  # a part of a map is a view in stock
        assert got[name].stride() == expected[name].stride(), name
    assert net.kept.stride() == stock.kept.stride()
    if dtype == torch.float64:
        assert max(errors(dict(expected), dict(got)).values()) < 1e-12


@pytest.mark.parametrize("grad", [False, True])
def test_a_loss_by_view(grad: bool) -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net, x = accelerate(copy.deepcopy(stock), tile=24), torch.randn(2, 3, 61, 83)
    with torch.set_grad_enabled(grad):
        expected, got = (torch.sigmoid(one(x)).view(2, -1).square().sum() for one in (stock, net))
    assert torch.allclose(expected, got)
    if grad:
        expected.backward()
        got.backward()
        assert torch.allclose(stock[0].weight.grad, net[0].weight.grad, atol=1e-4)  # pyright: ignore


def test_a_network_that_is_turned_between_calls() -> None:
    stock = nn.Conv2d(3, 4, 3)
    net, x = accelerate(copy.deepcopy(stock), tile=24), torch.randn(2, 3, 61, 83)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        assert stock.to(memory_format=memory_format)(x).stride() == net.to(memory_format=memory_format)(x).stride()  # pyright: ignore


class Same(nn.Module):
    """Attention with itself is another branch than with others, as in many implementations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, query: Tensor, key: Tensor, scale: Tensor, other: Tensor) -> Tensor:
        y = self.conv(query) if key is query else self.conv(query) - self.conv(key)
        return (y * scale.sum() if other is scale else y + other.mean()).mean((2, 3))


def test_one_tensor_as_several_arguments() -> None:
    stock = Same().double()
    net = accelerate(copy.deepcopy(stock), tile=16)
    x, z = torch.randn(2, 1, 2, 40, 33, dtype=torch.float64)
    a, b = torch.randn(2, 5, dtype=torch.float64)
    for args in ((x, x, a, a), (x, z, a, a), (x, z, a, b), (x, x, a, b), (x, x.clone(), a, a.clone())):
        found = []
        for one in (stock, net):
            one.zero_grad()
            leaves = [t.clone().requires_grad_() for t in (x, z)]
            given = [leaves[0] if t is x else leaves[1] if t is z else t for t in args]
            y = one(*given)
            y.square().sum().backward()
            found.append({"y": y.detach(), "x": leaves[0].grad, "z": leaves[1].grad, "w": one.conv.weight.grad})
        assert max(errors(*found).values()) < 1e-12


class _Outputs(TorchDispatchMode):
    """Notes the outputs of convolutions, and the gradients that ReLUs get beside their outputs."""

    sees_tiles = True

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.maps.append(result)
        if func is torch.ops.aten.threshold_backward.default:
            self.maps += args[:2]
        return result


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_of_grey_images_lie_as_those_of_coloured_ones(channels: int) -> None:
    """A convolution of one channel has no order of its own; its ReLU took six times as long where it was another."""
    first, second = nn.Conv2d(channels, 8, 3, 2), nn.Conv2d(8, 8, 3)
    stock = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveMaxPool2d(1))
    net, seen = accelerate(stock, tile=(150, 341)), _Outputs()
    x = torch.randn(1, channels, 300, 341)  # in strips, whose pixels are the image as it lies
    net(x).sum().backward()
    with seen:
        net(x).sum().backward()
    assert len(seen.maps) > 10
    assert all(t.stride(1) == 1 for t in seen.maps if t.shape[1] > 1 and t.numel())
