"""Forwards that branch by the image's values are exact, whichever way each image goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.dense import write_map

LIMIT = 1e-12


class Net(nn.Module):
    """`before` gets the image, `after` the first map; both may branch."""

    def __init__(self, before: Any = None, after: Any = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.before, self.after, self.dropout = before, after, dropout
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, 2), nn.Linear(4, 2)
        self.turns, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(self, x)
        y = self.norm(self.first(x)).relu()
        y = y if self.after is None else self.after(self, y)
        return self.head(F.dropout(self.second(y).mean((2, 3)), self.dropout, self.training))


def scaled(net: Any, x: Tensor) -> Tensor:
    if x.max() > 1:
        x = x / 255
    return x


def checked(net: Any, x: Tensor) -> Tensor:
    if not ~torch.isnan(x).any():  # as an `assert` does; pytest writes those of its tests anew
        raise AssertionError("holes in the image")
    if not (x >= 0).all():
        raise ValueError("a negative image")
    return x


def by_item(net: Any, x: Tensor) -> Tensor:
    return x * 3 if (x.mean() > 1).item() else x + 1


def counted(net: Any, x: Tensor) -> Tensor:
    """What the branch that is not taken changes must not be seen."""
    if x.sum() > 700:
        net.turns += 1
        net.seen.append(x.mean())
        return x * 0.5
    net.turns += 10
    return x


def three_ways(net: Any, x: Tensor) -> Tensor:
    if x.amax() > 250:
        return x / 255
    if x.amax() > 1:
        return x / 16
    return x


def until_small(net: Any, y: Tensor) -> Tensor:
    while y.abs().mean() > 0.3:
        y = y / 2
    return y


def finite(net: Any, y: Tensor) -> Tensor:
    if not torch.isfinite(y).all():
        raise RuntimeError("it has diverged")
    return y


def clipped(net: Any, y: Tensor) -> Tensor:
    return y.clamp(max=0.5) if y.mean() > 0.41 and y.std() > 0.1 else y * 2


CASES: dict[str, Net] = {
    "scaled": Net(scaled),
    "checked": Net(checked),
    "by item": Net(by_item),
    "counted": Net(counted),
    "three ways": Net(three_ways),
    "until small": Net(after=until_small),
    "finite": Net(after=finite),
    "clipped": Net(after=clipped),
    "before and after": Net(three_ways, clipped),
    "with dropout behind": Net(scaled, dropout=0.5),
    "norms that are frozen": Net(scaled, clipped).eval(),
}


def outcome(net: nn.Module, x: Tensor) -> Any:
    net.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    try:
        y = net(x)
    except (AssertionError, ValueError, RuntimeError) as error:
        return type(error), str(error)
    except UnsupportedError as error:  # the norm before has counted the image, which ours puts back
        return type(error.__cause__), str(error.__cause__)
    y.square().sum().backward()
    left = [y, *(p.grad for p in net.parameters()), *net.buffers(), *net.seen, torch.rand(1)]
    return [t.detach().clone() for t in left], net.turns


def agree(got: Any, wanted: Any) -> bool:
    if not isinstance(got[0], list) or not isinstance(wanted[0], list):
        return got == wanted
    pairs = list(zip(got[0], wanted[0], strict=True))
    return got[1] == wanted[1] and all(
        (a - b).double().norm() <= LIMIT * max(b.double().norm().item(), 1e-3) for a, b in pairs
    )


@pytest.mark.parametrize("name", CASES)
def test_each_image_goes_its_way(name: str) -> None:
    torch.manual_seed(0)
    stock = copy.deepcopy(CASES[name]).double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = accelerate(copy.deepcopy(stock), tile=(11, 16))
    for place, scale in enumerate((1, 255, 12, 1, -1, 255, 255, 1)):
        x = torch.rand(1, 1, 30, 27, dtype=torch.float64) * scale
        if place == 3:
            x[0, 0, 4, 5] = torch.nan
        before = [b.clone() for b in stock.buffers()]
        wanted, got = outcome(stock, x), outcome(ours, x)
        assert agree(got, wanted) or (place == 3 and name != "checked" and name != "finite"), (place, got, wanted)
        for net in (stock, ours):  # what a hole or an error has left in running statistics
            for buffer, value in zip(net.buffers(), before, strict=True):
                buffer.copy_(value)


@pytest.mark.parametrize(
    "call", [lambda net, x: net.evidence(x), lambda net, x: net([x, x[..., :20]]), lambda net, x: net(x)]
)
def test_other_ways_to_call(call: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    stock = Net(scaled).double().eval()
    x = torch.rand(1, 1, 30, 27, dtype=torch.float64)
    ours = accelerate(copy.deepcopy(stock), tile=16)
    with torch.no_grad():
        want = call(accelerate(copy.deepcopy(stock), tile=64), x)
        call(ours, x)  # the branch that is not taken is known first
        assert torch.allclose(call(ours, x * 200 + 50), call(ours, (x * 200 + 50) / 255), rtol=0, atol=1e-12)
        assert torch.allclose(call(ours, x), want, rtol=0, atol=1e-12)


def test_a_map_that_is_written_follows_its_image() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), Clip()).double()
    net = accelerate(copy.deepcopy(stock), tile=16)
    for scale in (1, 100, 1):
        x = torch.rand(1, 1, 40, 33, dtype=torch.float64) * scale
        out = torch.empty(1, 3, 40, 33, dtype=torch.float64)
        write_map(net, x, out)
        assert torch.allclose(out, stock(x), rtol=0, atol=1e-12)


class Clip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.amax() > 2 else x


def test_images_side_by_side_on_different_ways_are_refused_and_change_nothing() -> None:
    torch.manual_seed(0)
    net = accelerate(Net(scaled).double(), tile=16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(1, 1, 30, 27, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="branches by an image's values"):
        net([x, x[..., :20] * 255])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
