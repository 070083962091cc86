"""Winograd's convolution against PyTorch's in float64, and the distance of oneDNN's from that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import winograd

pytestmark = pytest.mark.skipif(winograd.missing() is not None, reason=str(winograd.missing()))

CHANNELS = st.sampled_from([16, 32, 48, 64])
PADDING = st.tuples(*[st.integers(0, 3)] * 4)


def window(n: int, channels: int, height: int, width: int, margins: tuple[int, int, int, int]) -> Tensor:
    """A window of a larger channels-last map, whose other pixels are NaN."""
    top, bottom, left, right = margins
    shape = n, channels, top + height + bottom, left + width + right
    whole = torch.full(shape, torch.nan).contiguous(memory_format=torch.channels_last)
    part = whole[:, :, top : top + height, left : left + width]
    return part.copy_(torch.randn(n, channels, height, width))


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.tuples(st.integers(1, 2), CHANNELS, CHANNELS, st.integers(3, 30), st.integers(3, 30)),
    pad=PADDING,
    margins=PADDING,
    options=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**16),
)
def test_the_same_as_pytorch(sizes, pad, margins, options, seed):
    """Any size, padding and window of a map; weights in either memory order; with and without what is fused."""
    torch.manual_seed(seed)
    n, channels, filters, height, width = sizes
    biased, summed, relu, last = options
    top, bottom, left, right = pad
    x = window(n, channels, height, width, margins)
    weight = torch.randn(filters, channels, 3, 3)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    bias = torch.randn(2 * filters)[:: 1 + last][:filters] if biased else None
    padded = F.pad(x.double(), (left, right, top, bottom))
    exact = F.conv2d(padded, weight.double(), None if bias is None else bias.double())
    residual = window(*exact.shape, margins) if summed else None
    exact = exact if residual is None else exact + residual.double()
    y = winograd.conv3x3(x, winograd.pack(weight), filters, bias, residual, relu, pad)
    assert y is not None and y.shape == exact.shape and y.is_contiguous(memory_format=torch.channels_last)
    bound = 2e-6 * channels**0.5 * 3
    assert (y - (exact.relu() if relu else exact)).abs().max() <= bound * max(1, exact.std())

    dy = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last)
    back = 2 - top, 2 - bottom, 2 - left, 2 - right
    dx = winograd.conv3x3(dy, winograd.pack(weight, for_input=True), channels, pad=back)
    leaf = x.double().requires_grad_()
    F.conv2d(F.pad(leaf, (left, right, top, bottom)), weight.double()).backward(dy.double())
    assert dx is not None and leaf.grad is not None
    assert (dx - leaf.grad).abs().max() <= bound * 4 * max(1, leaf.grad.std())


@pytest.mark.parametrize(("channels", "filters"), [(32, 32), (64, 64), (64, 256), (256, 64)])
def test_its_error_is_below_that_of_onednn(channels, filters):
    """Of one convolution, over five seeds each: its root mean square, and its largest."""
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(1, channels, 48, 44).relu().contiguous(memory_format=torch.channels_last)
        weight = torch.randn(filters, channels, 3, 3)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        ours = winograd.conv3x3(x, winograd.pack(weight), filters)
        assert ours is not None
        stock = F.conv2d(x, weight, padding=1)
        assert (ours - exact).norm() <= (stock - exact).norm()
        assert (ours - exact).abs().max() <= 1.2 * (stock - exact).abs().max()


def test_the_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 41, 37).contiguous(memory_format=torch.channels_last), torch.randn(48, 64, 3, 3)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(winograd.conv3x3(x, winograd.pack(weight), 48))
    finally:
        torch.set_num_threads(threads)
    first = found[0]
    assert first is not None and all(other is not None and torch.equal(first, other) for other in found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_finite_is_told(value):
    """At every place, also in the last row and column, which a block of outputs has alone."""
    for place in [(0, 0), (10, 8), (20, 16), (5, 16)]:
        x = torch.randn(1, 32, 21, 17).contiguous(memory_format=torch.channels_last)
        packed = winograd.pack(torch.ones(32, 32, 3, 3))
        assert winograd.conv3x3(x, packed, 32) is not None
        x[:, :, place[0], place[1]] = value
        assert winograd.conv3x3(x, packed, 32) is None


def test_a_plan_counts_what_it_takes():
    """On tensors without values: the output, and the scratch that is there beside it."""
    x = torch.empty(1, 64, 40, 30, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty(32, 64, 3, 3, device="meta")
    packed = winograd.pack(weight)
    assert packed.is_meta and packed.numel() == winograd.pack(torch.empty(32, 64, 3, 3)).numel() == 16 * 64 * 32
    y = winograd.conv3x3(x, packed, 32)
    assert y is not None and y.is_meta and y.shape == (1, 32, 40, 30)


def test_a_residual_in_another_memory_order():
    x, weight, residual = torch.randn(1, 32, 8, 9), torch.randn(48, 32, 3, 3), torch.randn(1, 48, 8, 9)
    y = winograd.conv3x3(x, winograd.pack(weight), 48, residual=residual)
    assert y is not None
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1) + residual, rtol=0, atol=1e-3)


def test_a_residual_of_another_shape_is_refused():
    x, packed = torch.randn(1, 32, 8, 8), winograd.pack(torch.randn(32, 32, 3, 3))
    with pytest.raises(
        ValueError, match=r"residual \(1, 32, 1, 1\) must have the shape of the output, \(1, 32, 8, 8\)"
    ):
        winograd.conv3x3(x, packed, 32, residual=torch.randn(1, 32, 1, 1))
