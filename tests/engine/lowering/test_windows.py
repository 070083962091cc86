"""Attention in windows, tile by tile: windows as blocks of pixels, shifts that come round, masks by position."""

from __future__ import annotations

import pytest
import torch
from attention_modules import Grid, Haloed, Windows
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gigamorph.engine.capture.trace import capture
from gigamorph.engine.lowering.stages import lower


def swin(size: int, shift: int, **more: float) -> nn.Module:
    """Convolution, two blocks of windows of which the second is shifted, patch merging, two further blocks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, 2),
        Windows(4, size),
        Windows(4, size, shift, **more),
        nn.Conv2d(4, 4, 3, 2, 1),
        Windows(4, size),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


def image(height: int, width: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(48, 36, (12, 16)), (41, 59, (9, 14)), (35, 70, 1000), (28, 27, 5)],
    ids=["multiples", "padded", "one tile", "tiles smaller than windows"],
)
def test_shifted_windows(height, width, tile):
    assert_exact(swin(4, 2), image(height, width), tile=tile)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16), (16, 16), (9, 7)])
def test_one_window_along_an_axis(height, width, n):
    """(N, 4, 8, C) -> (N, 1, 4, 2, 4, C): the axis with one window is cut as the other is."""
    assert_exact(swin(4, 0), image(height, width, n), tile=(8, 12))


def test_what_comes_round_counts():
    """A mask of -2 lets the other end of the image through, whose rows every exact result must have."""
    assert_exact(swin(3, 1, masked=-2.0), image(42, 47), tile=(10, 13))
    assert_exact(swin(3, 1, masked=float("-inf")), image(42, 47), tile=(10, 13))


@settings(max_examples=3)
@given(
    size=st.integers(2, 5),
    shift=st.integers(0, 4),
    height=st.integers(20, 45),
    width=st.integers(20, 45),
    tile=st.tuples(st.integers(6, 30), st.integers(6, 30)),
)
def test_any_size(size, shift, height, width, tile):
    assert_exact(swin(size, min(shift, size - 1)), image(height, width, 1), tile=tile)


@pytest.mark.parametrize("tile", [(8, 12), 5])
def test_halo_attention(tile):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Haloed(4), nn.Conv2d(4, 3, 3, padding=1)).double()
    assert_exact(model, image(24, 36), tile=tile)


def test_windows_without_a_shift_are_one_stage():
    """Nothing is stored for them: a window is a block of pixels, as of a convolution with its stride."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Windows(4, 4), Windows(4, 4), nn.AdaptiveAvgPool2d(1)).double()
    staged = lower(capture(model, (1, 2, 50, 61), torch.float64, torch.device("cpu")))
    assert len(staged.stages) == 1
    assert staged.stages[0].stored == []


def test_grid_attention():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Grid(4), nn.Conv2d(4, 3, 3)).double()
    assert_exact(model, image(27, 36), tile=(7, 9))
