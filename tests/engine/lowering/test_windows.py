"""Attention in windows, tile by tile: windows as blocks of pixels, shifts that come round, masks by position."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_modules import Grid, Haloed, Windows, merge, partition
from exactness import assert_each_exact, assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.stages import lower

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from coverage_judge import judge


def swin(size: int, shift: int, **more: Any) -> nn.Module:
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
    ("height", "width", "tiles"), [(48, 36, [(12, 16)]), (29, 35, [(9, 14), 1000, 5])], ids=["multiples", "padded"]
)
def test_shifted_windows(height, width, tiles):
    """In several tiles, in one, and in tiles smaller than windows."""
    assert_each_exact(swin(4, 2), [(image(height, width), tile) for tile in tiles])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16), (16, 16), (9, 7)])
def test_one_window_along_an_axis(height, width, n):
    """(N, 4, 8, C) -> (N, 1, 4, 2, 4, C): the axis with one window is cut as the other is."""
    assert_exact(swin(4, 0), image(height, width, n), tile=(8, 12), inference=n == 2)


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


@settings(max_examples=4)
@given(
    size=st.integers(2, 5),
    shift=st.integers(1, 4),
    height=st.integers(20, 45),
    width=st.integers(20, 45),
    tile=st.tuples(st.integers(6, 30), st.integers(6, 30)),
    n=st.integers(1, 3),
    form=st.sampled_from(["added", "sdpa"]),
    live=st.booleans(),
)
def test_mask_repeated_for_each_image(size, shift, height, width, tile, n, form, live):
    """(windows, L, L) expanded to (N * windows, 1, L, L), and a bias for each pair added before: transformers' Swin."""
    model = swin(size, min(shift, size - 1), form=form, masked=-2.0)
    model.insert(1, randomize(nn.BatchNorm2d(4).double()))
    assert_exact(model.train(live), image(height, width, n), tile=tile)


class OwnMask(nn.Module):
    """Windows whose mask is a parameter with a value for each window of each image, not the same for all images."""

    def __init__(self, n: int, windows: int):
        super().__init__()
        self.mask = nn.Parameter(torch.randn(n * windows, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = partition(x.permute(0, 2, 3, 1), 2) * self.mask
        return merge(y, 2, *x.shape[2:]).permute(0, 3, 1, 2)


def test_mask_of_each_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), OwnMask(3, 140), nn.Conv2d(4, 3, 3)).double()
    assert_exact(model, image(20, 28, 3), tile=(6, 10))


def test_halo_attention():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Haloed(4), nn.Conv2d(4, 3, 3, padding=1)).double()
    assert_each_exact(model, [(image(24, 36), tile) for tile in ((8, 12), 5)])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (16, 8)])
def test_halo_attention_of_one_window(height, width):
    """Along an axis with one window, or both, keys and values are those of the whole map."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Haloed(4, 8, 3), nn.Conv2d(4, 3, 3, padding=1)).double()
    assert_each_exact(model, [(image(height, width), tile) for tile in (3, 100)])


@pytest.mark.parametrize(("height", "width", "stride"), [(8, 8, 1), (8, 8, 2), (16, 24, 1)])
def test_halo_attention_of_timm(height, width, stride):
    """With logits of relative positions."""
    layers = pytest.importorskip("timm.layers.halo_attn")
    torch.manual_seed(0)
    attention = layers.HaloAttn(4, 8, stride=stride, num_heads=2, dim_head=4, block_size=8, halo_size=2)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), attention, nn.Conv2d(8, 3, 3, padding=1)).double()
    assert_exact(model, image(height, width), tile=8)


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


class Each(nn.Module):
    """An op on the windows of an image, which lie among the batch: (N * windows, C, size, size)."""

    def __init__(self, size: int, op: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.size, self.op = size, op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        rows, cols = h // self.size, w // self.size
        x = x.view(n, c, rows, self.size, cols, self.size).permute(0, 2, 4, 1, 3, 5)
        x = self.op(x.reshape(-1, c, self.size, self.size))
        size = x.shape[2]
        return x.view(n, rows, cols, c, size, size).permute(0, 3, 1, 4, 2, 5).reshape(n, c, rows * size, cols * size)


class Places(nn.Module):
    """Maxima of each window, and where in it they lie."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool2d(x, 2, return_indices=True)
        return y * (1 + places)


IN_WINDOWS = {  # made after the seed; a bias in front of a live norm has no gradient but for rounding
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "strided": lambda: nn.Conv2d(4, 4, 3, 2, 1),
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1),
    "places": Places,
    "average pooling": lambda: nn.AvgPool2d(2),
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", IN_WINDOWS)
def test_ops_on_each_window(name, mode):
    torch.manual_seed(0)
    ends = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3)
    model = randomize(nn.Sequential(ends[0], Each(4, IN_WINDOWS[name]()), ends[1]).double())
    assert_exact(model.train(mode == "train"), image(20, 28), tile=(8, 12))


@settings(max_examples=5)
@given(
    size=st.integers(2, 6),
    rows=st.integers(1, 5),
    cols=st.integers(2, 5),
    n=st.integers(1, 3),
    tile=st.tuples(st.integers(3, 16), st.integers(3, 16)),
)
def test_convolution_and_norm_in_windows_of_any_size(size, rows, cols, n, tile):
    torch.manual_seed(0)
    each = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2, ceil_mode=True))
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Each(size, each), nn.Conv2d(4, 3, 2, padding=1)).double().train()
    assert_exact(model, image(rows * size, cols * size, n), tile=tile)


def test_windows_that_are_resized_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Each(4, nn.Upsample(scale_factor=2))).double()
    with pytest.raises(UnsupportedError, match="permuted map"):
        accelerate(model, tile=8)(image(16, 24))


class Turned(nn.Module):
    """Pools channels and columns: the rows lie among the batch, the columns do not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x.permute(2, 0, 1, 3), 2).permute(1, 2, 0, 3)


def test_rows_alone_among_the_batch_are_refused():
    with pytest.raises(UnsupportedError, match="permuted map"):
        accelerate(nn.Sequential(nn.Conv2d(2, 4, 1), Turned()).double(), tile=8)(image(16, 24))


def test_hieradet():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "stages": (1, 2, 2, 1), "global_att_blocks": (4,), "num_classes": 3}
    model = timm.create_model("hieradet_small", head_init_scale=1.0, **sizes).double().eval()
    assert_exact(model, torch.randn(1, 3, 96, 128, dtype=torch.float64), tile=48, inference=False)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_efficientvit(mode):
    """With live norms stock's own rounding is near the limit, so that its noise is looked at."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 128, "embed_dim": (16, 16), "key_dim": (4, 4), "num_heads": (2, 2)}
    model = randomize(timm.create_model("efficientvit_m0", depth=(1, 1), num_classes=3, **sizes)).double()
    x = torch.randn(2, 3, 141, 118, dtype=torch.float64)
    if mode == "eval":
        assert_exact(model.eval(), x, tile=64, inference=False)
        return
    found = judge(model.train(), x, lambda twin: accelerate(twin, tile=64), casts=False, limit=1e-12)
    assert found["good"], found
