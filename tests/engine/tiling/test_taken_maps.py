"""Blocks and gradients that become maps as they lie, as on a GPU: nothing is copied, and nothing is changed by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_net import Program, examples, programs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigamorph import accelerate
from gigamorph.engine.execution.forward import Forward
from gigamorph.engine.tiling import backward, stored_maps

CHECKS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(autouse=True)
def without_pages():
    """Maps as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (stored_maps, backward):
            patch.setattr(module, "on_pages", lambda device: False)
        yield patch


@pytest.fixture(params=[False, True], ids=["computed again", "graphs kept"])
def kept(request: pytest.FixtureRequest, without_pages: pytest.MonkeyPatch) -> bool:
    if request.param:
        without_pages.setattr(Forward, "_retained", lambda self, index: self.prepared.stages[index].tiles)
    return request.param


class Net(nn.Module):
    """Live norms, a map that two stages read, a gate, and a map that is handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.main = nn.Sequential(
            nn.Conv2d(6, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )
        self.gate = nn.Conv2d(6, 6, 1)
        self.last = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = torch.relu(self.main(x) + x)
        y = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.last(y).mean((2, 3)), y


class Copies(TorchDispatchMode):
    """Counts copies of maps."""

    sees_tiles = True

    maps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::copy_" and args[0].dim() == 4 and min(args[0].shape[2:]) > 3:
            self.maps += 1
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(3)
    return randomize(Net()).double().train()


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("images", [1, 2])
def test_is_exact(kept: bool, tile: int, images: int) -> None:
    image = torch.randn(images, 1, 61, 54, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_exact(network(), image, tile=tile)


@settings(max_examples=examples(8), **CHECKS)
@given(programs(), st.booleans())
def test_random_networks(program: Program, retain: bool) -> None:
    model = program.build()
    image = torch.randn(program.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assume(all(leaf.isfinite().all() for leaf in tree_leaves(model(image))))
    with pytest.MonkeyPatch.context() as patch:
        if retain:
            patch.setattr(Forward, "_retained", lambda self, index: self.prepared.stages[index].tiles)
        assert_exact(model, image, tile=max(program.shape))


def test_what_stages_alone_read_is_not_copied(kept: bool) -> None:
    net, image = accelerate(network(), tile=64), torch.randn(1, 1, 61, 54, dtype=torch.float64)
    with Copies() as copies:
        logits, _ = net(image)
        logits.sum().backward()
    # But the map that is handed out, where its graph is kept, and its gradient.
    assert copies.maps == 1 + kept


def test_what_is_handed_out_may_be_changed(kept: bool) -> None:
    """What a graph keeps does not change with it."""
    image = torch.randn(1, 1, 61, 54, dtype=torch.float64)
    found, expected = (step(wrap, image) for wrap in (lambda net: accelerate(net, tile=64), lambda net: net))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-10)


def step(wrap: Any, image: Tensor) -> dict[str, Tensor]:
    model = network()
    logits, y = wrap(model)(image)
    with torch.no_grad():
        y.data.zero_()
    logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
