"""lightstream as a peer: its best tile, its split, and (where it is installed) that it computes what stock does."""

import pytest
import torch
from torch import nn

from gigamorph import BudgetError, UnsupportedError
from gigamorph.engine.bench import lightstream
from gigamorph.engine.bench.results import OK, BenchTask
from gigamorph.engine.bench.step import StepOptions, measure
from gigamorph.engine.bench.work import build
from gigamorph.engine.models import create_model

RESNET = BenchTask("resnet18", (1, 3, 1536, 1536))


@pytest.fixture(scope="module")
def resnet():
    return build(RESNET)


@pytest.fixture(scope="module")
def records():
    """Recordings by size and mode: each search for a tile would make the same two of ResNet-18."""
    return {}


@pytest.fixture
def one_recording(resnet, records, monkeypatch):
    capture = lightstream.capture

    def recorded(network, shape, *args):
        assert network is resnet
        key = shape, torch.is_grad_enabled(), args
        if key not in records:
            records[key] = capture(network, shape, *args)
        return records[key]

    monkeypatch.setattr(lightstream, "capture", recorded)


def test_the_best_tile_goes_through_the_fewest_pixels(resnet, one_recording):
    # Facts: an overlap of 977 leaves 288 of 1280 pixels, so two tiles each way; all of 1024 and more leave nothing.
    assert lightstream.work(1280, 977, (1536, 1536)) == (2 * 1280) ** 2
    assert lightstream.work(1536, 977, (1536, 1536)) == 1536**2
    task, network = RESNET, resnet
    (tile,) = lightstream.tiles_to_try(network, task, 800_000_000)
    assert 977 + 32 < tile < 1536
    smaller = range(1024, tile, 32)
    assert all(lightstream.work(tile, 977, (1536, 1536)) <= lightstream.work(o, 977, (1536, 1536)) for o in smaller)
    # Tiles of 1088 would go through 18 times the pixels.
    assert lightstream.work(1088, 977, (1536, 1536)) > 17 * 1536**2
    assert lightstream.tiles_to_try(network, task, 560_000_000) == [1536]
    assert lightstream.tiles_to_try(network, BenchTask("resnet18", (1, 3, 1024, 1024)), 100_000_000) == [1024]


def test_within_a_budget_there_is_a_tile_or_a_reason(resnet, one_recording):
    task, network = RESNET, resnet
    # Tiles of 1280 go through 2.8 times the pixels, those of 1152 through 9 times.
    tile = lightstream.tile_within(network, task, 800_000_000)
    assert lightstream.tiles_to_try(network, task, 800_000_000) == [tile] and tile < 1536
    assert lightstream.tile_within(network, task, 10**12) == 1536
    for budget in (100_000_000, 560_000_000):
        with pytest.raises(BudgetError, match="overlap is 977 pixels"):
            lightstream.tile_within(network, task, budget)
    inference = BenchTask("resnet18", (1, 3, 1536, 1536), training=False)
    assert lightstream.tile_within(network, inference, 560_000_000) <= 1536


def test_tiles_of_an_unknown_network_grow_until_one_works():
    tries = lightstream.tiles_to_try(create_model("lesionnet"), BenchTask("lesionnet", (1, 1, 512, 512)), 20_000_000)
    assert tries == sorted(tries) and tries[-1] == 512 and all(tile % 32 == 0 for tile in tries)
    with pytest.raises(UnsupportedError, match="500 x 512"):
        lightstream.tiles_to_try(create_model("lesionnet"), BenchTask("lesionnet", (1, 1, 500, 512)), 20_000_000)


def test_the_norms_are_what_it_does_not_train():
    network = create_model("resnet18", in_channels=3)
    names = lightstream.norm_parameters(network)
    assert len(names) == 40 and "bn1.weight" in names and not any("conv" in name for name in names)


def test_a_network_that_is_no_sequence_is_refused():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.conv(x * x).mean((2, 3)))

    pytest.importorskip("lightstream")
    with pytest.raises(UnsupportedError, match="not a sequence"):
        lightstream.streaming_step(Squares(), BenchTask("-", (1, 1, 64, 64)), 64)


def test_it_computes_what_stock_does_where_it_is_installed():
    pytest.importorskip("lightstream")
    task = BenchTask("resnet18", (1, 3, 1088, 1088))
    network = build(task)
    assert isinstance(network, nn.Module) and torch.is_grad_enabled()
    _, row = measure(task, StepOptions(("stock", "lightstream"), rounds=1, box=1e-3), {})
    assert row.status == OK and row.check is not None and row.check.missing == 40, row.reason
