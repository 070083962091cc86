"""Average pooling along the flattened positions of an image: runs of them in the order of its rows."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.cuda_graphs.signature import translates
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.tiling.stage import TiledStage


class Pooled(nn.Module):
    """Attention to keys and values that are means of runs of positions, normalised (NextViT: Li et al., 2022)."""

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.pool, self.norm = nn.AvgPool1d(length, length), nn.BatchNorm1d(channels)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        few = self.norm(self.pool(y.transpose(1, 2))).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.q(y), *self.kv(few).chunk(2, -1))
        return x + y.transpose(1, 2).reshape(x.shape)


def network(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), middle, nn.Conv2d(4, 3, 3)).double())


def image(height: int, width: int, n: int = 2) -> Tensor:
    return torch.randn(n, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=6)
@given(
    height=st.integers(3, 13),
    width=st.integers(3, 13),
    length=st.integers(1, 9),
    n=st.integers(2, 3),
    tile=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    live=st.booleans(),
)
def test_runs_of_any_length(height, width, length, n, tile, live):
    assert_exact(network(Pooled(4, length)).train(live), image(height, width, n), tile=tile)


def test_a_tile_holds_parts_of_runs():
    """Of 7 x 11 positions in runs of 16, of which the last 13 positions are in none."""
    assert_exact(network(Pooled(4, 16)).train(), image(7, 11), tile=(3, 4))


class Own(nn.Module):
    """Another way of pooling flattened positions, multiplied into the map."""

    def __init__(self, **options: object):
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool1d(x.flatten(2), **self.options)  # pyright: ignore[reportArgumentType]
        return x * y.mean(2)[..., None, None]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 2, "stride": 3},
        {"kernel_size": 4, "padding": 2},
        {"kernel_size": 4, "ceil_mode": True},
    ],
    ids=["overlap", "gaps", "padding", "a shorter last run"],
)
def test_other_windows_are_refused(options):
    with pytest.raises(UnsupportedError, match="no padding and no overlapping windows"):
        accelerate(network(Own(**options)), tile=5)(image(9, 11))


class Along(nn.Module):
    """Pooling along channels, or along the columns of each row."""

    def __init__(self, columns: bool):
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        if self.columns:
            return x + F.avg_pool1d(x.flatten(1, 2), 2).mean(2).unflatten(1, x.shape[1:3])[..., None]
        y = F.avg_pool1d(x.flatten(2).transpose(1, 2), 2).repeat_interleave(2, 2)
        return x + y.transpose(1, 2).reshape(x.shape)


def test_along_channels_it_is_per_pixel():
    assert_exact(network(Along(False)), image(9, 11), tile=4)


def test_along_one_image_axis_it_is_refused():
    with pytest.raises(UnsupportedError):
        accelerate(network(Along(True)), tile=5)(image(9, 12))


def test_no_tile_is_replayed_at_another_place():
    """Which runs a block's positions belong to depends on where it lies."""
    staged = lower(capture(network(Pooled(4, 4)).eval(), (1, 2, 12, 12), torch.float64, torch.device("cpu")))
    told = [stage for stage in staged.stages if any(local.op.name == "flat_runs" for local in stage.locals)]
    assert len(told) == 1
    assert not translates(TiledStage(told[0], (4, 4)))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nextvit(mode):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=3, drop_path_rate=0.0)
    x = torch.randn(2, 3, 75, 91, dtype=torch.float64)
    assert_exact(randomize(model).double().train(mode == "train"), x, tile=32, inference=False)
