"""Autocast regions inside the forward: on maps, on pooled vectors, within autocast around it or not."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate


class Net(nn.Module):
    """Convolutions and norms of which some run in a region; `where` says which."""

    def __init__(self, where: str, enabled: bool):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm, self.live, self.head = nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.where, self.enabled = where, enabled

    def part(self, name: str, *modules: nn.Module, x: Tensor) -> Tensor:
        for module in modules:
            if name != self.where:
                x = module(x)
                continue
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
                x = module(x if self.enabled else x.to(self.head.weight.dtype))
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.part("convolutions", self.first, nn.ReLU(), self.second, x=x)
        x = self.part("norms", self.norm, self.live, x=x.to(self.head.weight.dtype))
        return self.part("vectors", self.head, x=F.relu(x).mean((2, 3))).to(self.head.weight.dtype)


def gradients(net: nn.Module, x: Tensor, around: bool) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        y = net(x)
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weight).sum(), list(net.parameters()))]


def distance(a: list[Tensor], b: list[Tensor]) -> list[float]:
    """Relative errors; gradients that are mathematically zero (biases in front of norms) against the largest."""
    floor = 1e-2 * max(q.norm().item() for q in b)
    return [((p - q).norm() / q.norm().clamp_min(floor)).item() for p, q in zip(a, b, strict=True)]


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("where", ["convolutions", "norms", "vectors"])
def test_as_close_to_float64_as_stock(where, enabled, around):
    torch.manual_seed(0)
    stock = Net(where, enabled)
    x = torch.randn(2, 2, 29, 24)
    exact = Net("nowhere", False).double()
    exact.load_state_dict(stock.state_dict())
    truth = [t.float() for t in gradients(exact, x.double(), False)] if not around else None
    fast = accelerate(copy.deepcopy(stock), tile=9)
    got, wanted = gradients(fast, x, around), gradients(stock, x, around)
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    low = enabled or around
    if truth is None:
        assert max(distance(got, wanted)) < 0.05  # sixteen bits
    else:
        own, stocks = distance(got, truth), distance(wanted, truth)
        assert all(a < 3 * b + (0.01 if low else 2e-5) for a, b in zip(own, stocks, strict=True)), (own, stocks)


def test_the_region_is_obeyed():
    """A product of large numbers overflows in float16 and not in float32."""

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                low = F.conv2d(x, torch.full((1, 1, 1, 1), 300.0))
            return torch.cat([low.float(), F.conv2d(x, torch.full((1, 1, 1, 1), 300.0))], 1)

    x = torch.full((1, 1, 12, 10), 300.0)
    got, wanted = accelerate(Large(), tile=5)(x), Large()(x)
    assert torch.equal(got, wanted) and wanted[:, 0].isinf().all() and wanted[:, 1].isfinite().all()
