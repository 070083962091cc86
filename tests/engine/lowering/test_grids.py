"""Reductions to a grid, to rows and to columns, by tiles; and what is made of them for each position again."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from around import Around, image, tied
from exactness import assert_each_exact, assert_exact, step, take_state
from grid_modules import MODULES
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.geometry import Cells
from gigamorph.engine.lowering.stages import ProgramStage, lower


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Around(MODULES[name]())


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    # Statistics of two values would have gradients that are all rounding: three images.
    x = image(3, 2, 19, 14)
    assert_each_exact(network(name).double(), [(x, tile) for tile in ((5, 4), (3, 30), 64)])


def gate(function):
    """A map times what is made of it."""
    return lambda x: x * function(x)


def up(x: Tensor, like: Tensor, mode: str = "bilinear") -> Tensor:
    return F.interpolate(x, like.shape[2:], mode=mode)


FUNCTIONS = {
    "mean, dropped": gate(lambda x: x.mean(3)[..., None]),
    "mean of columns and channels": gate(lambda x: x.mean((1, 2), keepdim=True)),
    "sum": gate(lambda x: x.sum(2, keepdim=True)),
    "amax of ties": gate(lambda x: x.relu().amax(3, keepdim=True)),
    "amin": gate(lambda x: x.amin(2, keepdim=True)),
    "max with unread indices": gate(lambda x: tied(x).max(3, keepdim=True)[0]),
    "min with unread indices": gate(lambda x: tied(x).min(2, keepdim=True).values),
    "max of all positions": gate(lambda x: tied(x).flatten(2).max(2)[0][..., None, None]),
    "maximum of maxima": gate(lambda x: x.max(3)[0].max(2)[0][..., None, None]),
    "pooled maxima of ties": gate(lambda x: F.adaptive_max_pool2d(tied(x), (None, 1))),
    "var": lambda x: (x - x.mean(3, keepdim=True)) / (x.var(3, keepdim=True) + 1e-5).sqrt(),
    "std over channels as well": gate(lambda x: x.std((1, 3), keepdim=True)),
    "var_mean": lambda x: (x - torch.var_mean(x, 2, keepdim=True)[1]) * torch.var_mean(x, 2, keepdim=True)[0],
    "norm": gate(lambda x: x.norm(dim=3, keepdim=True)),
    "logsumexp": lambda x: x - x.logsumexp(3, keepdim=True),
    "softmax": lambda x: x * x.softmax(3) + x.log_softmax(-2),
    "normalize": lambda x: F.normalize(x, dim=2),
    "of a permuted map": lambda x: (x.permute(0, 2, 3, 1) * x.permute(0, 2, 3, 1).mean(2, True)).permute(0, 3, 1, 2),
    "sum of strips": gate(lambda x: F.relu(x.mean(3, keepdim=True) + x.mean(2, keepdim=True))),
    "outer product": gate(lambda x: (x.mean(3, keepdim=True) @ x.mean(2, keepdim=True)).sigmoid()),
    "expand": gate(lambda x: x.mean(3, keepdim=True).expand(-1, -1, -1, x.shape[3]).tanh()),
    "expand_as": gate(lambda x: x.mean(2, keepdim=True).expand_as(x).tanh()),
    "repeat": gate(lambda x: x.mean(3, keepdim=True).repeat(1, 1, 1, x.shape[3])),
    "a grid larger than the map": gate(lambda x: up(F.adaptive_avg_pool2d(x, (25, 20)), x, "nearest")),
    "cells that share rows": gate(lambda x: up(F.adaptive_avg_pool2d(x, (9, 7)).tanh(), x)),
    "cells of rows": gate(lambda x: up(F.adaptive_avg_pool2d(x, (None, 6)), x)),
    "maxima in cells of rows": gate(lambda x: up(F.adaptive_max_pool2d(tied(x), (None, 6)), x)),
    "maxima in cells": gate(lambda x: up(F.adaptive_max_pool2d(tied(x), (4, 6)), x)),
    "a grid that divides": gate(lambda x: up(F.adaptive_avg_pool2d(x[:, :, :18, :12], (9, 6)), x, "nearest")),
    "the same size": gate(lambda x: F.adaptive_avg_pool2d(x, (None, None))),
    "an output that stays": gate(lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0].mean((2, 3), True)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    net = Around(FUNCTIONS[name]).double()
    assert_exact(net, image(), tile=(5, 4))
    assert largest_small(net, 190, 140) <= 6 * 190


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), head

    def forward(self, x: Tensor):
        return self.head(self.conv(x))


@pytest.mark.parametrize(
    "head",
    [
        lambda x: (x.mean(3), x.amax(2), x.max(3), x.var(2)),
        lambda x: [F.adaptive_max_pool2d(x, k).flatten(1) for k in (1, 2, 4)],
        lambda x: F.adaptive_max_pool2d(x, (3, 2), return_indices=True),
        lambda x: F.adaptive_avg_pool2d(x, (None, 1)).expand_as(x),
        lambda x: up(F.adaptive_avg_pool2d(x, 3), x).flatten(1).cumsum(1),
    ],
    ids=["strips", "grids", "indices", "a strip spread", "a whole map of what is spread"],
)
def test_heads(head):
    assert_exact(Head(head).double(), image(), tile=(5, 4))


def test_a_fine_grid_that_divides_the_rows_alone():
    net = Head(lambda x: F.adaptive_avg_pool2d(x, (33, 33)).tanh().mean((2, 3))).double()
    assert_exact(net, image(1, 2, 66, 35), tile=(40, 64))


def largest_small(model: nn.Module, height: int, width: int) -> int:
    """The most values, for each image and channel, of what is neither image nor read tile by tile."""
    network = lower(capture(model, (2, 2, height, width), torch.float64, "cpu"))
    values = network.program.values
    made = [v for step in network.steps if not isinstance(step, ProgramStage) for v in step.outputs]
    stored = [v for stage in network.stages for v in (*stage.stored, *(o for r in stage.reductions for o in r.outputs))]
    lost = {v for step in network.steps if not isinstance(step, ProgramStage) for v in step.inputs}
    return max((math.prod(values[v].shape[2:]) for v in (*made, *(v for v in stored if v in lost))), default=0)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_grows_but_rows_and_columns(name):
    assert largest_small(network(name).double(), 190, 140) <= 4 * 190  # channels


@pytest.mark.parametrize("name", ["coordinate attention", "pyramid"])
def test_float32(name):
    """No further from float64 than stock is; over a few images, for what rounds how in one of them is chance."""
    errors: dict[str, list[tuple[float, float]]] = {}
    fast = accelerate(network(name), tile=8)
    for seed in range(5):
        net, x = network(name, seed), image(3, 2, 19, 14, seed=seed)
        truth = step(net.double(), x)
        stock = step(net.float(), x.float())
        take_state(fast, net)
        tiled = step(fast, x.float())
        for key, expected in truth.gradients.items():
            scale = max(expected.norm(), 1e-3 * max(g.norm() for g in truth.gradients.values()))
            of_each = [float((found.gradients[key] - expected).norm() / scale) for found in (stock, tiled)]
            errors.setdefault(key, []).append((of_each[0], of_each[1]))
    medians = {
        key: tuple(statistics.median(of_one) for of_one in zip(*each, strict=True)) for key, each in errors.items()
    }
    assert all(tiled <= max(4 * stock, 1e-6) for stock, tiled in medians.values()), medians
    assert statistics.geometric_mean(tiled / stock for stock, tiled in medians.values()) <= 1.25, medians


@pytest.mark.parametrize("size", [1, 5, 6, 7, 30])
@pytest.mark.parametrize("count", [1, 3, 6, 7, 30])
@pytest.mark.parametrize("first", [0, 2])
def test_cells(size, count, first):
    """Which cells a range of indices touches, against the indices that `adaptive_avg_pool1d` averages."""
    if first >= size:
        return
    pooled = F.adaptive_avg_pool1d(torch.eye(size)[:, None], count)[:, 0]  # of each index, its part of each cell
    cells = Cells(size, count, first)
    for lo in range(size - first):
        for hi in range(lo + 1, size - first + 1):
            start, end = cells.touched(lo, hi)
            inside = pooled[first + lo : first + hi]
            assert inside.sum(0).nonzero().flatten().tolist() == list(range(start, end))
            parts = [list(range(a, b)) for a, b in cells.parts(lo, hi)]
            assert parts == [inside[:, cell].nonzero().flatten().tolist() for cell in range(start, end)]
