"""Volumes (N, C, D, H, W) against stock in float64: tiles along height and width, all of the depth in each."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate


class Squeeze(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.down, self.up = nn.Conv3d(channels, 2, 1), nn.Conv3d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3, 4), keepdim=True)))).sigmoid()


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm3d(channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class BySlice(nn.Module):
    """Slices in the batch, as encoders of slices have them."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, depth = x.shape[0], x.shape[2]
        y = self.conv(x.transpose(1, 2).flatten(0, 1)).relu()
        return y.unflatten(0, (n, depth)).transpose(1, 2)


class AndBack(nn.Module):
    """Down and up again by interpolation, joined with what it was."""

    def __init__(self, channels: int, mode: str):
        super().__init__()
        self.conv, self.mode = nn.Conv3d(channels, channels, 3, 2, 1), mode
        self.join = nn.Conv3d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        corners = {"align_corners": False} if self.mode == "trilinear" else {}
        y = F.interpolate(self.conv(x).relu(), size=x.shape[2:], mode=self.mode, **corners)
        return F.gelu(self.join(torch.cat([x, y], 1)))


def with_activation(layer: nn.Module) -> nn.Module:
    """The gradient of a bias before a norm is zero, and its computed value noise."""
    return nn.Sequential(layer, nn.GELU())


def size(largest: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*3 * [st.integers(1, largest)])


@st.composite
def convolutions(draw: st.DrawFn, channels: int) -> nn.Module:
    kernel, stride, dilation = draw(size(3)), draw(size(2)), draw(size(2))
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    groups = draw(st.sampled_from([1, channels]))
    return with_activation(nn.Conv3d(channels, channels, kernel, stride, padding, dilation, groups))


@st.composite
def same_convolutions(draw: st.DrawFn, channels: int) -> nn.Module:
    padding = draw(st.sampled_from(["same", "valid"]))
    return with_activation(nn.Conv3d(channels, channels, draw(size(4)), padding=padding))


@st.composite
def pools(draw: st.DrawFn) -> nn.Module:
    kernel, stride = draw(size(3)), draw(size(3))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil = draw(st.booleans())
    if draw(st.booleans()):
        return nn.MaxPool3d(kernel, stride, padding, ceil_mode=ceil)
    divisor = draw(st.sampled_from([None, None, 5]))
    return nn.AvgPool3d(kernel, stride, padding, ceil, draw(st.booleans()), divisor)


@st.composite
def transposed(draw: st.DrawFn, channels: int) -> nn.Module:
    kernel, stride = draw(size(3)), draw(size(3))
    padding = tuple(draw(st.integers(0, (k - 1) // 2)) for k in kernel)
    more = tuple(draw(st.integers(0, s - 1)) for s in stride)
    return with_activation(nn.ConvTranspose3d(channels, channels, kernel, stride, padding, more))


@st.composite
def resized(draw: st.DrawFn) -> nn.Module:
    mode = draw(st.sampled_from(["trilinear", "nearest", "nearest-exact"]))
    corners = draw(st.booleans()) if mode == "trilinear" else None
    if draw(st.booleans()):
        return nn.Upsample(
            scale_factor=draw(st.sampled_from([2, (1, 2, 2), (2, 1.5, 1.3)])), mode=mode, align_corners=corners
        )
    return nn.Upsample(size=tuple(draw(st.integers(3, 20)) for _ in range(3)), mode=mode, align_corners=corners)


def layers(channels: int) -> st.SearchStrategy[nn.Module]:
    plain = [
        *(nn.ReLU, nn.GELU, lambda: nn.LeakyReLU(0.1), lambda: nn.BatchNorm3d(channels), lambda: Squeeze(channels)),
        *(lambda: nn.GroupNorm(2, channels), lambda: nn.InstanceNorm3d(channels, affine=True)),
        *(lambda: Residual(channels), lambda: BySlice(channels), lambda: nn.Dropout3d(0.0)),
        *(lambda: AndBack(channels, "trilinear"), lambda: AndBack(channels, "nearest")),
        *(lambda: nn.ConstantPad3d((1, 2, 0, 1, 2, 0), 0.5), lambda: nn.ReplicationPad3d((2, 1, 1, 0, 1, 1))),
        lambda: nn.AdaptiveAvgPool3d((2, None, None)),
    ]
    made = st.sampled_from(plain).map(lambda make: make())
    return st.one_of(
        made, convolutions(channels), same_convolutions(channels), pools(), transposed(channels), resized()
    )


def heads(channels: int) -> st.SearchStrategy[nn.Module]:
    """With an activation first: the mean of a normalised map has no gradient."""
    pooled = [1, (2, 1, 1)]
    return st.sampled_from(pooled).map(
        lambda to: nn.Sequential(nn.GELU(), nn.AdaptiveAvgPool3d(to), nn.Flatten(), nn.LazyLinear(3))
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), training=st.booleans())
def test_random_networks_are_exact(data, training):
    channels = 4
    body = data.draw(st.lists(layers(channels), min_size=1, max_size=5))
    head = data.draw(st.one_of(st.none(), heads(channels)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    net = nn.Sequential(
        nn.Conv3d(1, channels, 3, padding=1, bias=False), *body, *([] if head is None else [head])
    ).double()
    depth, height, width = data.draw(st.tuples(st.integers(3, 7), st.integers(11, 30), st.integers(11, 30)))
    x = torch.randn(data.draw(st.integers(1, 2)), 1, depth, height, width, dtype=torch.float64)
    try:
        with torch.no_grad():
            out = net.eval()(x)
    except (RuntimeError, ValueError):
        return  # too small for these layers
    if out.numel() > 400_000 or 0 in out.shape:
        return
    assert_exact(randomize(net).train(training), x, tile=data.draw(st.integers(4, 16)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool3d(x, 2, return_indices=True)[1] + x[:, :, ::2, ::2, ::2],
        lambda x: F.interpolate(x, size=(3, 20, 18), mode="area"),
    ],
)
def test_others_are_refused(function):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x * 2)

    with pytest.raises(UnsupportedError, match=r"rule|volume"):
        accelerate(Net(), tile=8)(torch.randn(1, 1, 6, 24, 20, dtype=torch.float64))


@pytest.mark.parametrize(
    "pool", [lambda x: F.adaptive_max_pool3d(x, 1), lambda x: x.amax((2, 3, 4)), lambda x: x.max(2)[0]]
)
def test_maxima(pool):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return pool(self.conv(x))

    assert_exact(Net().double(), torch.randn(1, 1, 6, 40, 36, dtype=torch.float64), tile=16)


def test_dropout_of_channels_draws_as_pytorch():
    net = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.Dropout3d(0.5), nn.Conv3d(6, 2, 3)).double()
    x, results = torch.randn(2, 1, 5, 24, 20, dtype=torch.float64), []
    for one in (net, accelerate(net, tile=8)):
        torch.manual_seed(3)
        results.append(one(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_an_encoder_of_slices_with_an_lstm_over_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.over, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, _, depth, *_ = x.shape
            y = self.encoder(x.transpose(1, 2).flatten(0, 1)).mean((2, 3))
            return self.head(self.over(y.view(n, depth, -1))[0].amax(1))

    assert_exact(Net().double(), torch.randn(2, 1, 5, 40, 36, dtype=torch.float64), tile=16)
