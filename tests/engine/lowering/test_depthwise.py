"""engine/lowering/ops/depthwise.py: sums of shifted maps are PyTorch's convolution, and its gradients."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gigamorph.engine.lowering.ops.depthwise import conv2d

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(PAIRS, PAIRS, st.tuples(st.integers(0, 3), st.integers(0, 3)), PAIRS, st.integers(0, 3), st.booleans())
def test_the_same_as_pytorch(kernel, stride, padding, dilation, batch, bias):
    torch.manual_seed(0)
    shapes = (batch, 5, 9, 8), (5, 1, *kernel), (5,)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes[: 3 if bias else 2]]
    given_to = (*tensors, *([] if bias else [None]), stride, padding, dilation, 5)
    wanted, got = F.conv2d(*given_to), conv2d(*given_to)
    assert got.shape == wanted.shape
    dy = torch.randn_like(wanted)
    pairs = [(wanted, got), *zip(*(torch.autograd.grad(y, tensors, dy) for y in (wanted, got)), strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(conv2d(*given_to), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_others_are_pytorchs_own(dtype):
    """Of another dtype, with more than one channel to a group, or large."""
    torch.manual_seed(0)
    cases = [(4, 4, 1, 8), (4, 8, 2, 8), (4, 4, 4, 40), (1, 1, 1, 8)] + [(4, 4, 4, 8)] * (dtype is torch.float32)
    for channels, filters, groups, side in cases:
        x, weight = torch.randn(2, channels, side, side, dtype=dtype), torch.randn(filters, channels // groups, 3, 3)
        place = weight.to(dtype), None, (1, 1), (1, 1), (1, 1), groups
        assert torch.equal(conv2d(x, *place), F.conv2d(x, *place))


def test_many_channels_of_a_small_tile_take_less_time():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2048, 4, 4, dtype=torch.float64), torch.randn(2048, 1, 3, 3, dtype=torch.float64)
    place, least = (weight, None, (1, 1), (1, 1), (1, 1), 2048), []
    for function in (F.conv2d, conv2d):
        seconds = []
        for _ in range(5):
            began = time.process_time()
            function(x, *place)
            seconds.append(time.process_time() - began)
        least.append(min(seconds))
    assert least[1] < least[0]  # 0.8 of 5.0 ms
