"""Networks whose 3 x 3 convolutions are computed by Winograd's filtering: as near to float64 as stock PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import distance, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.kernels import winograd
from gigamorph.kernels.choice import override

pytestmark = pytest.mark.skipif(winograd.missing() is not None, reason=str(winograd.missing()))


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_LEAST_PIXELS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the maps that the kernel has been given."""
    found: list[tuple[int, ...]] = []
    own = winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda x, *a, **k: found.append(tuple(x.shape)) or own(x, *a, **k))
    return found


class Block(nn.Module):
    """Two convolutions, the first with a stride or not, a sum and means of a grid."""

    def __init__(self, live: bool = False, bias: bool = True, padding: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 5, stride=2, padding=2)
        self.first = nn.Conv2d(32, 48, 3, padding=padding, bias=bias)
        self.norm = nn.BatchNorm2d(48) if live else nn.Identity()
        self.second = nn.Conv2d(48, 32, 3, padding=2 - padding, bias=bias)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.second(F.relu(self.norm(self.first(x))))
        return F.adaptive_avg_pool2d(F.relu(x + y), 4)


def block(seed: int, live: bool = False, bias: bool = True, padding: int = 1) -> Block:
    torch.manual_seed(seed)
    return Block(live, bias, padding)


@settings(deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(20, 70), st.integers(20, 70)),
    tile=st.integers(8, 40),
    live=st.booleans(),
    bias=st.booleans(),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_steps_are_those_of_stock(size, tile, live, bias, padding, seed):
    """Outputs and all gradients in float32, within rounding of float64."""
    net, image = block(seed, live=live, bias=bias, padding=padding), torch.randn(2, 1, *size)
    exact = step(copy.deepcopy(net).double(), image.double())
    ours = distance(exact, step(accelerate(copy.deepcopy(net), tile=tile), image))
    assert max(ours) < 2e-5, ours


@pytest.mark.parametrize("live", [False, True])
def test_errors_are_no_larger_than_stocks(live, calls):
    """Medians of seven seeds: outputs and gradients together."""
    ours, stock = [], []
    for seed in range(7):
        net, image = block(seed, live=live), torch.randn(2, 1, 90, 70)
        exact = step(copy.deepcopy(net).double(), image.double())
        ours.append(distance(exact, step(accelerate(copy.deepcopy(net), tile=24), image)))
        stock.append(distance(exact, step(net, image)))
    assert calls
    middle = [torch.tensor(each).median(0).values for each in (ours, stock)]
    assert (middle[0] <= 1.1 * middle[1]).all(), middle


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(training, value, calls):
    """In the maps forward, and in the gradient of the image."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1))
    image = torch.randn(1, 1, 40, 33)
    image[..., 17, 20] = value
    leaves = [image.clone().requires_grad_(training) for _ in range(2)]
    with torch.set_grad_enabled(training):
        stock, ours = net(leaves[0]), accelerate(net, tile=16)(leaves[1])
    assert calls and torch.equal(ours.isfinite(), stock.isfinite())
    assert torch.allclose(ours[stock.isfinite()], stock[stock.isfinite()], atol=1e-5)
    if training:
        dy = torch.randn_like(stock)
        dy[..., 30, 5] = value
        for y in (stock, ours):
            y.backward(dy)
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert torch.equal(grads[0].isfinite(), grads[1].isfinite())


def test_where_it_computes(calls):
    """In float32 with oneDNN's leave, not with strides, groups or few channels, and not where stock is asked for."""
    net, image = block(0), torch.randn(1, 1, 64, 64)
    step(accelerate(net, tile=32), image)
    assert {shape[1] for shape in calls} == {32, 48}
    for other in ("double", "off", "stock"):
        calls.clear()
        twin = copy.deepcopy(net)
        with torch.backends.mkldnn.flags(enabled=other != "off"), override("stock" if other == "stock" else "auto"):
            twin = twin.double() if other == "double" else twin
            step(accelerate(twin, tile=32), image.double() if other == "double" else image)
        assert not calls, other
    others = [nn.Conv2d(32, 32, 3, stride=2), nn.Conv2d(32, 32, 3, dilation=2), nn.Conv2d(32, 32, 3, groups=2)]
    others += [nn.Conv2d(32, 24, 3), nn.Conv2d(32, 16, 3), nn.Conv2d(32, 32, 5), nn.Conv2d(32, 32, (3, 1))]
    for conv in others:
        tail = nn.Sequential(nn.Conv2d(1, 32, 1), conv, nn.AdaptiveAvgPool2d(1))
        step(accelerate(tail, tile=32), image)
        with torch.no_grad():
            accelerate(tail, tile=32)(image)
    assert not calls


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_what_wants_no_gradient_gets_none(frozen):
    net, image = block(3), torch.randn(1, 1, 50, 40)
    for name in ("weight", "bias") if frozen == "both" else (frozen,):
        getattr(net.second, name).requires_grad_(False)
    exact = step(copy.deepcopy(net).double(), image.double())
    ours = step(accelerate(net, tile=16), image)
    assert {n for n, g in ours.gradients.items() if g is None} == {n for n, g in exact.gradients.items() if g is None}
    assert max(distance(exact, ours)) < 2e-5
