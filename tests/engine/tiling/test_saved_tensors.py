"""What autograd saves of a tile: each map once."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from exactness import errors, step
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.planning import simulate
from gigamorph.engine.tiling.halos import Rect, cut, shift
from gigamorph.engine.tiling.saved_tensors import SavedTensors
from gigamorph.engine.tiling.stage import TiledStage


def chain(stride: int = 1) -> nn.Sequential:
    """Convolutions of 3 x 3 and ReLUs, the last map pooled."""
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1, stride=stride), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("place", [(1, 1), (0, 0), (0, 2)])  # also at the border, where padding is uneven
@pytest.mark.parametrize("stride", [1, 2])  # windows of stride 2 leave rows of a block to the next tile
def test_a_map_is_held_once(stride: int, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a retained tile holds: a window for each convolution, and the last ReLU's result."""
    staged = lower(capture(chain(stride), (1, 1, 1024, 1024), torch.float32, "cpu"))
    prepare(staged, True)
    (stage,) = staged.stages
    tiled = TiledStage(stage, (256, 256))
    monkeypatch.setattr(simulate, "heaviest_tile", lambda _: place)
    _, held = simulate.tile_peak(stage, tiled, True, staged.trainable())
    maps = [local.op.outputs[0] for local in stage.locals if local.op.name.startswith("relu")]
    i, j = place
    blocks = [math.prod(b - a for a, b in (tiled.rows.block(v, i), tiled.cols.block(v, j))) for v in maps]
    assert len(blocks) == 4
    assert 8 * 4 * sum(blocks) < held < 1.1 * 8 * 4 * sum(blocks) + 2 * 4 * 260**2  # the image, and padded


class Readers(nn.Module):
    """Maps that several ops read, some with windows, and one whose values only its gradient's slope asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.even, self.point = nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        y = (self.wide(x) + x).relu()
        z = (self.even(y).sigmoid() * self.point(y).tanh()).relu()
        return torch.cat([torch.max_pool2d(z, 3, 2, 1).mean((2, 3)), y.amax((2, 3)), x.mean((2, 3))], 1)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("size", [(74, 62), (64, 96)])
def test_gradients_do_not_change(live: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of a map is worth the bookkeeping."""
    monkeypatch.setattr("gigamorph.engine.tiling.saved_tensors._SMALL", 0)
    torch.manual_seed(0)
    net, x = Readers().double().train(live), torch.randn(2, 2, *size, dtype=torch.float64)
    for tile, budget in ((16, None), (23, None), ((17, 40), "40MiB")):
        expected, found = step(net, x), step(accelerate(net, tile=tile, memory_budget=budget), x)
        assert max(errors(expected.gradients, found.gradients).values()) < 1e-12
        assert (expected.image - found.image).norm() < 1e-12 * expected.image.norm()  # pyright: ignore


def test_where_hooks_are_switched_off() -> None:
    net, x = chain().double(), torch.randn(1, 1, 40, 40, dtype=torch.float64)
    expected = step(net, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("switched off"):
        found = step(accelerate(net, tile=16), x)
    assert max(errors(expected.gradients, found.gradients).values()) < 1e-12


@pytest.mark.parametrize("inside", [(0, 40, 0, 50), (0, 39, 1, 49), (2, 38, 0, 48)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_block_is_put_together_again(inside: Rect, memory_format: torch.memory_format) -> None:
    """Of a block that a window has in part, the rest is kept; the block itself may be overwritten."""
    saved, axes, place = SavedTensors(), (2, 3), shift(inside, inside[0] - 2, inside[2] - 3)
    x = torch.randn(1, 8, 40, 50).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(1, 8, 40, 50).to(memory_format=memory_format)
    with saved.record():
        block = x.relu()
        window = torch.zeros(1, 8, 45, 55).to(memory_format=memory_format)
        cut(window, axes, place).copy_(cut(block.detach(), axes, inside))
        saved.lies_in(block, axes, inside, window, place)
    block.data.fill_(float("nan"))
    (grad,) = torch.autograd.grad(block, x, weight)
    assert torch.equal(grad, weight * (x > 0)) and grad.stride() == x.stride()


@pytest.mark.parametrize("small", [0, 1 << 40])
def test_a_graph_that_is_dropped_leaves_nothing(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before a backward; what holds itself through autograd's nodes would stay for good."""
    monkeypatch.setattr("gigamorph.engine.tiling.saved_tensors._SMALL", small)
    kept: list[weakref.ref[Tensor]] = []
    pack = SavedTensors._pack

    def noted(self: SavedTensors, tensor: Tensor):
        kept.append(weakref.ref(tensor))
        return pack(self, tensor)

    monkeypatch.setattr(SavedTensors, "_pack", noted)
    net = accelerate(chain(), memory_budget="60MiB")
    loss = net(torch.randn(1, 1, 64, 64)).sum()
    assert any(reference() is not None for reference in kept)
    del loss
    gc.collect()
    alive = [tensor for reference in kept if (tensor := reference()) is not None]
    assert {id(tensor) for tensor in alive} <= {id(tensor) for tensor in net.parameters()}
