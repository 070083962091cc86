"""Borders of runs: copies of one class stay in order where maps are concatenated, halved, flipped or rearranged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.morph.atoms import Atoms, Borders
from gigamorph.engine.morph.spaces import find_spaces
from gigamorph.engine.morph.widen import widen

X = torch.zeros(1, 3, 8, 8)


def joined() -> tuple[Atoms, Borders, list[np.ndarray]]:
    """Axes of 3, 2, 5 and 5 channels, all of one class."""
    atoms = Atoms()
    axes = [atoms.new(n) for n in (3, 2, 5, 5)]
    for axis in axes:
        atoms.unite(axis, np.full_like(axis, axes[0][0]), "")
    return atoms, Borders(atoms), axes


def test_the_seam_of_two_axes_is_a_border_of_all_that_meet() -> None:
    _, borders, (a, b, c, d) = joined()
    borders.meet(d, c)  # before the seam is known
    borders.meet(np.concatenate([a, b]), c)
    assert borders.find()[c].tolist() == borders.find()[d].tolist() == [False, False, True, False, False]
    assert not borders.find()[a][:-1].any()


def test_a_flip_has_no_border_but_a_repetition_has() -> None:
    _, borders, (a, _b, c, d) = joined()
    borders.meet(c[::-1], d)
    assert not borders.find().any()
    borders.meet(np.concatenate([a, a[:2]]), d)
    assert borders.find()[d].tolist() == [False, False, True, False, False]
    assert borders.find()[c].tolist() == [False, True, False, False, False]


def test_channels_of_several_classes_need_no_borders() -> None:
    atoms = Atoms()
    a, b, c = atoms.new(1), atoms.new(1), atoms.new(2)
    borders = Borders(atoms)
    atoms.unite(np.concatenate([a, b]), c, "")
    borders.meet(np.concatenate([a, b]), c)
    assert not borders.find().any()


class Net(nn.Module):
    """Two maps, LayerNorm over them and over each, then `middle`."""

    def __init__(self, middle: Callable[[Any, Tensor, Tensor], Tensor], channels: int):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.both = nn.LayerNorm(6)
        self.one = nn.LayerNorm(4)
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.middle = middle
        self.head = nn.Linear(channels, 2)
        for p in [*self.both.parameters(), *self.one.parameters(), *self.norm.parameters()]:
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        a = a + self.one(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.norm(self.depth(self.middle(self, a, b)))
        return self.head(F.relu(x).mean((2, 3)))


def both(net: Any, a: Tensor, b: Tensor) -> Tensor:
    return net.both(torch.cat([a, b], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def halves(_net: Any, a: Tensor, _b: Tensor) -> Tensor:
    one, other = a.chunk(2, 1)
    return one * other.sigmoid()


@pytest.mark.parametrize(
    "middle, channels",
    [
        (both, 6),
        (lambda _n, a, _b: torch.cat([a, a.relu()], 1), 8),
        (lambda n, a, b: torch.cat([b, both(n, a, b), a.tanh()], 1), 12),
        (halves, 2),
        (lambda _n, a, _b: torch.cat([half.relu() for half in a.chunk(2, 1)], 1), 4),
        (lambda _n, a, _b: a.flip(1), 4),
        (lambda n, a, b: both(n, a, b) * torch.cat([b, a], 1), 6),
    ],
)
@pytest.mark.parametrize("factor", [2, 3])
def test_networks_of_united_maps_grow(
    middle: Callable[[Any, Tensor, Tensor], Tensor], channels: int, factor: int
) -> None:
    model = Net(middle, channels)
    assert {s.frozen for s in find_spaces(model, X)} == {"", "an output of the network"}
    child, report = widen(model, X, factor=factor)
    assert child.depth.groups == factor * channels and report.difference.float64 < 1e-12
