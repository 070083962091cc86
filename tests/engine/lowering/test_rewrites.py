"""Rewrites of the graph: frozen BatchNorm folded into convolutions, activations and sums in place."""

import pytest
import torch
from exactness import assert_exact, randomize
from torch import nn
from torch.nn import functional as F

from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.folding import fold_batch_norm
from gigamorph.engine.lowering.rewrites import in_place_runs
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.tiling.stage import TiledStage


def stage_of(net: nn.Module, size: int = 40):
    (stage,) = lower(capture(net, (1, 2, size, size), torch.float64, "cpu")).stages
    fold_batch_norm(stage)
    return stage


def names(stage) -> list[str]:
    return [local.op.name for local in stage.locals]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_folding_is_exact_for_every_gradient(bias, affine, groups):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1, bias=bias, groups=groups),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=bias),
        nn.BatchNorm2d(4, affine=affine, eps=1e-2),
        nn.AdaptiveAvgPool2d(1),
    )
    net = randomize(net).double().eval()
    assert "batch_norm" not in names(stage_of(net))
    assert_exact(net, torch.randn(2, 2, 45, 38, dtype=torch.float64), tile=16)


class TwoReaders(nn.Module):
    """The convolution's output is read by the norm and by a second branch, so it must stay."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return (self.norm(y) * y).mean((2, 3))


class PooledToo(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y).mean((2, 3)) + y.amax((2, 3))


@pytest.mark.parametrize("kind", [TwoReaders, PooledToo])
def test_a_convolution_with_other_readers_keeps_its_norm(kind):
    net = randomize(kind()).double().eval()
    assert "batch_norm" in names(stage_of(net))
    assert_exact(net, torch.randn(1, 2, 33, 29, dtype=torch.float64), tile=8)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = F.relu(self.b(x))
        return F.relu(self.a(x) + x).mean((2, 3))


def test_in_place_only_where_no_later_tile_needs_the_input():
    net = Residual().double().eval()
    stage = stage_of(net)
    tiled = TiledStage(stage, (8, 8))
    skip = stage.locals[1].op.outputs[0]  # relu(b(x)): its rows wait for the convolution
    assert skip in tiled.with_halo
    runs = in_place_runs(stage, set(tiled.with_halo))
    overwritten = {local.op.outputs[0]: local for local in stage.locals if local.op.outputs[0] in runs}
    assert len(overwritten) == 3  # both activations and the sum
    everything = {v for local in stage.locals for v in local.op.outputs}
    assert in_place_runs(stage, everything) == {}
    assert_exact(net, torch.randn(1, 2, 35, 31, dtype=torch.float64), tile=8)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        return (F.relu(y) + torch.sigmoid(y)).mean((2, 3))


def test_a_map_with_two_readers_is_not_overwritten():
    net = UsedTwice().double()
    stage = stage_of(net)
    relu = next(local for local in stage.locals if local.op.name == "relu")
    assert relu.op.outputs[0] not in in_place_runs(stage, set())
    assert_exact(net, torch.randn(1, 2, 20, 20, dtype=torch.float64), tile=7)
