"""Reshapes and permutations in a row, of which those in between have no image axes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from exactness import assert_exact, step, step_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.errors import UnsupportedError
from gigamorph.engine.lowering.moves import _refined
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.lowering.ops.base import Whole

CHANNELS = 6


class Unfolded(nn.Module):
    """MobileViT's: pixels at the same place of 2 x 3 patches attend to each other; `between` looks in on the way."""

    def __init__(self, between: bool = False) -> None:
        super().__init__()
        self.between = between
        self.first, self.qkv = nn.Conv2d(2, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 3 * CHANNELS)
        self.last, self.head = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        rows, cols = h // 2, w // 3
        x = x.reshape(n * c * rows, 2, cols, 3).transpose(1, 2)
        if self.between:
            x = x + x.cumsum(0)
        x = x.reshape(n, c, rows * cols, 6).transpose(1, 3).reshape(n * 6, rows * cols, c)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = x.contiguous().view(n, 6, rows * cols, -1).transpose(1, 3).reshape(n * c * rows, cols, 2, 3)
        x = x.transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(x).mean((2, 3)))


def network(between: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Unfolded(between).double()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("tile", [(6, 9), (4, 6), 100])
def test_patches_that_are_unfolded_and_folded(n, tile):
    assert_exact(network(), torch.randn(n, 2, 12, 18, dtype=torch.float64), tile=tile)


def test_only_keys_and_values_are_whole():
    _, nodes = sort(capture(network(), (2, 2, 12, 18), torch.float64, torch.device("cpu")))
    taken = [node.op.name for node in nodes if isinstance(node, Whole)]
    assert sorted(taken) == ["contiguous", "contiguous", "flatten", "flatten"]  # K and V, flat


def test_what_looks_in_between_gets_the_calls_as_they_were_recorded():
    assert_exact(network(between=True), torch.randn(2, 2, 12, 18, dtype=torch.float64), tile=(6, 9), fallback="untiled")


class PaddedWindows(nn.Module):
    """Windows of a map that was filled up and flattened again, as FDAT's, beside the map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv = nn.Conv2d(2, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 3 * CHANNELS)
        self.last = nn.Conv2d(CHANNELS, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        flat, down, right = x.flatten(2).transpose(1, 2), -h % 4, -w % 4
        y = F.pad(flat.view(n, h, w, c), (0, 0, 0, right, 0, down)).view(n, -1, c)
        rows, cols = (h + down) // 4, (w + right) // 4
        y = y.view(n, rows, 4, cols, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, c)
        q, k, v = self.qkv(y).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).view(n, rows, cols, 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous()
        y = flat + y.view(n, h + down, w + right, c)[:, :h, :w].contiguous().view(n, h * w, c)
        return self.last(y.transpose(1, 2).view(n, c, h, w))


@pytest.mark.parametrize("n", [1, 2])
def test_windows_of_a_flattened_map(n):
    torch.manual_seed(0)
    assert_exact(PaddedWindows().double(), torch.randn(n, 2, 13, 18, dtype=torch.float64), tile=6)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_factors_of_two_shapes(factors, data):
    """Both are products of neighbouring factors."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(factors) - 1)))) & set(range(1, len(factors))))
    shape = [math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
    found = _refined(factors, shape)
    assert found is not None
    parts, groups = found
    flat = [one for own in parts for one in own]
    assert [math.prod(own) for own in parts] == factors
    assert [math.prod(flat[n] for n in own) for own in groups] == shape


def test_shapes_without_common_factors():
    assert _refined([4, 6], [3, 8]) is None


class Shifted(nn.Module):
    """A shift in both axes, and then something that nothing is known of."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 4, stride=4), last
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = torch.roll(y.sin(), (-2, -2), (1, 2))
        return self.last(torch.roll(y.sin(), (2, 2), (1, 2)))


@settings(deadline=None, max_examples=6)
@given(st.integers(4, 9), st.integers(4, 9), st.sampled_from([8, 12, 16]))
def test_a_shift_where_another_op_takes_its_map_whole(height: int, width: int, tile: int) -> None:
    """What goes round the ends was taken for a map of its own, and then was not there."""
    torch.manual_seed(0)
    model = Shifted(lambda y: y.sort(1).values.square().mean((1, 2)))
    x = torch.randn(2, 1, 4 * height, 4 * width, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="sort"):
        accelerate(model, tile=tile)(x)
    wanted, got = step(model, x), step(accelerate(model, tile=tile, fallback="untiled"), x)
    assert max(step_errors(wanted, got).values()) < 1e-12


@settings(deadline=None, max_examples=6)
@given(st.integers(4, 9), st.integers(4, 9), st.sampled_from([8, 12, 16]))
def test_the_mean_of_flattened_positions_by_a_pooling(height: int, width: int, tile: int) -> None:
    torch.manual_seed(0)
    model = Shifted(lambda y: F.adaptive_avg_pool1d(y.flatten(1, 2).transpose(1, 2), 1).flatten(1))
    x = torch.randn(2, 1, 4 * height, 4 * width, dtype=torch.float64)
    wanted, got = step(model, x), step(accelerate(model, tile=tile), x)
    assert max(step_errors(wanted, got).values()) < 1e-12
    cut = Shifted(lambda y: F.adaptive_avg_pool1d(y.flatten(1, 2).transpose(1, 2), 2).flatten(1))
    with pytest.raises(UnsupportedError, match="adaptive_avg_pool2d"):
        accelerate(cut, tile=tile)(x)
