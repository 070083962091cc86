"""Random layers: what pass 1 drew is what pass 2 differentiates, and small draws are stock PyTorch's own."""

import copy
import sys
from itertools import chain

import pytest
import torch
from exactness import assert_exact
from sync_norms import with_segments
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import GigamorphError, accelerate
from gigamorph.engine.execution.checkpoint import Checkpointed
from gigamorph.engine.lowering.ops import Local
from gigamorph.engine.lowering.ops.base import RULES


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [0.3, 0.5])
@pytest.mark.parametrize("tile", [(7, 5), (16, 64)])
def test_gradient_of_the_mask_that_was_drawn(p, tile):
    """The network is linear in the image, so output and gradient both show the mask, pixel by pixel."""
    net = accelerate(nn.Sequential(nn.Dropout(p)).train(), tile=tile)
    ones = torch.ones(2, 3, 23, 19, dtype=torch.float64, requires_grad=True)
    drawn = net(ones)
    drawn.sum().backward()
    assert torch.equal(ones.grad, drawn.detach())
    assert set(drawn.detach().unique().tolist()) == {0.0, 1 / (1 - p)}
    assert abs((drawn == 0).double().mean().item() - p) < 0.05
    mask = (drawn != 0).double().flatten(2)
    assert not torch.equal(mask[0, 0], mask[0, 1]) and not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 2)])
def test_tiles_draw_different_masks(rows, columns):
    net = accelerate(nn.Sequential(nn.Dropout(0.5)).train(), tile=8)
    drawn = net(torch.ones(1, 1, 8 * rows, 8 * columns))[0, 0]
    tiles = [tile for strip in drawn.split(8) for tile in strip.split(8, 1)]
    assert len(tiles) == 8 and all(not torch.equal(a, b) for i, a in enumerate(tiles) for b in tiles[:i])


def test_gradients_by_finite_differences():
    """Through convolutions, where halos hand masked values to the next tile."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Tanh(),
            nn.Dropout(0.4),
            nn.Conv2d(2, 2, 3, 2, 1),
            nn.AlphaDropout(0.3),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
        )
        .double()
        .train()
    )
    net = accelerate(model, tile=(4, 6))

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return net(x).sum()

    x = image(1, 1, 13, 11).requires_grad_()
    loss(x).backward()
    direction = image(*x.shape)
    with torch.no_grad():
        slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    assert torch.allclose(slope, (x.grad * direction).sum(), rtol=1e-7)
    weight = model[0].weight
    nudge = image(*weight.shape)
    with torch.no_grad():
        weight += 1e-6 * nudge
        above = loss(x)
        weight -= 2e-6 * nudge
        slope = (above - loss(x)) / 2e-6
    assert torch.allclose(slope, (weight.grad * nudge).sum(), rtol=1e-7)


def test_what_is_computed_again_between_two_stored_maps_draws_the_same(monkeypatch):
    ran, run = [], Checkpointed.run
    monkeypatch.setattr(Checkpointed, "run", staticmethod(lambda *given: (ran.append(1), run(*given))))
    monkeypatch.setattr(sys.modules["gigamorph.engine.planning.search"], "strategies", with_segments)
    torch.manual_seed(0)
    layers = [
        (nn.Conv2d(n, 3, 3, s, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.4)) for n, s in ((1, 1), (3, 2), (3, 1))
    ]
    net = accelerate(nn.Sequential(*chain(*layers), nn.AdaptiveAvgPool2d(1)).double().train(), tile=(4, 6))

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return net(x).square().sum()

    x, direction = image(2, 1, 26, 22).requires_grad_(), image(2, 1, 26, 22)
    loss(x).backward()
    with torch.no_grad():
        slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    assert ran and torch.allclose(slope, (x.grad * direction).sum(), rtol=1e-6)


def test_draws_follow_the_seed_and_move_the_generator():
    net = accelerate(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5)).train(), tile=5)
    x = torch.randn(1, 1, 12, 12)
    torch.manual_seed(7)
    first, second = net(x), net(x)
    torch.manual_seed(7)
    assert torch.equal(net(x), first)
    assert not torch.equal(first, second)


def test_backward_leaves_the_generator_alone():
    net = accelerate(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)).train(), tile=5)
    loss = net(torch.randn(1, 1, 12, 12)).sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())


class DropPath(nn.Module):
    """Stochastic depth as timm (`new_empty`) and torchvision (`torch.empty`) write it."""

    def __init__(self, like_timm: bool):
        super().__init__()
        self.like_timm = like_timm
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        shape = (x.shape[0], 1, 1, 1)
        keep = y.new_empty(shape) if self.like_timm else torch.empty(shape, dtype=y.dtype, device=y.device)
        keep = keep.bernoulli_(0.5)
        keep.div_(0.5)
        return x + y * keep


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Dropout2d(0.5),
        lambda: DropPath(True),
        lambda: DropPath(False),
        lambda: nn.Sequential(nn.Dropout2d(0.4), nn.Conv2d(4, 4, 3), DropPath(True), nn.Dropout2d(0.2)),
    ],
    ids=["Dropout2d", "drop_path", "StochasticDepth", "several"],
)
def test_small_draws_are_stock_pytorchs(layer):
    """Channel dropout and stochastic depth draw the same numbers in the same order under the same seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), layer(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)).double().train()
    assert_exact(model, image(6, 2, 17, 23), tile=(5, 8), seed=11)


def test_a_channel_dropouts_mask_in_the_plan():
    """It is a small, whatever the tile; it once counted as a map, which a tile's run on fake tensors could not read."""
    net = accelerate(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout2d(), nn.AdaptiveAvgPool2d(1)), memory_budget="64MiB")
    chosen = net.plan_for((1, 1, 1500, 1500))
    assert chosen.tiles > (1, 1) and chosen.peak_bytes < 64 << 20


@pytest.mark.parametrize("name", ["drop_path", "StochasticDepth"])
def test_library_stochastic_depth(name):
    if name == "drop_path":
        layer = pytest.importorskip("timm").layers.DropPath(0.5)
    else:
        layer = pytest.importorskip("torchvision").ops.StochasticDepth(0.5, "row")
    model = nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert_exact(model.double().train(), image(6, 2, 17, 23), tile=(5, 8), seed=11)


def test_head_dropout_is_stock_pytorchs():
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    assert_exact(model.double().train(), image(4, 2, 17, 23), tile=6, seed=5)


def test_no_draws_in_evaluation():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout2d(F.dropout(self.conv(x), 0.5, self.training), 0.5, self.training).mean((2, 3))

    model = Functional().double().eval()
    before = torch.get_rng_state()
    assert_exact(copy.deepcopy(model), image(2, 2, 17, 23), tile=(5, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_that_no_reader_of_a_tile_needs():
    """A tile whose block is read by later tiles alone was not drawn again, and those after it drew its numbers."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.conv = nn.Parameter(torch.ones(())), nn.Conv2d(1, 1, 3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = F.dropout(x, 0.5), F.dropout(x * self.scale, 0.5)
            return self.conv(first).mean((2, 3)), second

    for tile in (1, 2, 3, 8):
        net = accelerate(Two().double(), tile=tile)
        second = net(image(1, 1, 20, 19))[1]
        (grad,) = torch.autograd.grad(second.square().sum() / 2, [net.scale])
        torch.testing.assert_close(grad, second.square().sum())


def test_draws_of_others_in_the_middle_of_a_tile_are_noticed(monkeypatch):
    """Between the passes anybody may draw; among a tile's own draws it would make another mask, and is refused."""
    plain, others = RULES["tanh"], []

    def rule(op, maps) -> Local:
        local = plain(op, maps)
        run = local.run
        local.run = lambda env, block: ([torch.rand(n) for n in others], run(env, block))[1]
        return local

    monkeypatch.setitem(RULES, "tanh", rule)
    net = accelerate(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.Tanh()).double(), tile=8)
    loss = net(image(1, 1, 20, 19)).sum()
    torch.rand(3)
    loss.backward()
    loss = net(image(1, 1, 20, 19)).sum()
    others.append(1)  # as if by a thread
    with pytest.raises(GigamorphError, match="another thread drew"):
        loss.backward()
