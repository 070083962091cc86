"""`fallback="untiled"`: what a call of several pieces does once, whatever its recordings come to."""

from __future__ import annotations

import copy
import random
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from exactness import assert_exact, randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture import dynamo
from gigamorph.engine.capture.rollback import Rollback


class Branching(nn.Module):
    """Two pieces; the forward counts its calls, and its running statistics count them too."""

    def __init__(self, second: str = "") -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.second, self.calls, self.seen, self.scale = second, 0, [], 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        self.calls += 1
        self.seen.append(x.shape[0])
        if x.max() > 0:
            x = x * (1 + self.scale)
        if self.second == "inference":
            with torch.inference_mode():
                self.offset = torch.ones(2, 1, 1, dtype=x.dtype) * 3
            x = x + self.offset.clone()
        if self.second == "checkpoint":
            x = checkpoint(self.last, x, use_reentrant=False)
        return x.mean((2, 3))


def image(height: int = 20) -> Tensor:
    return torch.randn(1, 1, height, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_same(stock: Branching, ours: Branching, out: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(out, stock(x), rtol=1e-12, atol=1e-12)
    assert (ours.calls, ours.seen) == (stock.calls, stock.seen)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


def test_more_networks_of_a_class_than_dynamo_stores_recordings_of_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "GRAPHS", 6)
    monkeypatch.setattr(dynamo, "PIECES", 20)
    x = image()
    for _ in range(9):
        stock = Branching().double()
        ours = copy.deepcopy(stock)
        assert_same(stock, ours, accelerate(ours, tile=8, fallback="untiled")(x), x)


def test_more_values_than_recordings_are_stored_for_do_each_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "GRAPHS", 6)
    stock, x = Branching().double(), image()
    ours = copy.deepcopy(stock)
    net = accelerate(ours, tile=8, fallback="untiled")
    for number in range(10):
        stock.scale = ours.scale = float(number)
        assert_same(stock, ours, net(x), x)


@pytest.mark.parametrize("second", ["inference", "checkpoint"])
def test_a_piece_that_is_refused_leaves_nothing_of_those_before_it(second: str) -> None:
    ours = Branching(second).double()
    before, state = copy.deepcopy(ours), torch.get_rng_state()
    items = ours.seen
    net = accelerate(ours, tile=8, fallback="untiled")
    for height in (20, 23):
        with pytest.raises(UnsupportedError, match=r"inference_mode inside|running statistics.*torch.utils.checkpoint"):
            net(image(height))
        assert ours.calls == 0 and ours.seen is items == [] and "offset" not in vars(ours)
        assert all(torch.equal(b, before.get_buffer(n)) for n, b in ours.named_buffers())
        assert torch.equal(torch.get_rng_state(), state)


TABLE, COUNT = {"sizes": [0]}, 0


def _count_calls(seen: list[int] = []) -> None:  # noqa: B006
    seen.append(len(seen))
    _count_calls.calls = getattr(_count_calls, "calls", 0) + 1


class Writer(nn.Module):
    """Writes a value in its first piece; the second piece is refused."""

    total = 0
    everyone: ClassVar[list[int]] = []

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how, self.nested = nn.Conv2d(1, 1, 3, padding=1), how, {"of": [{1}]}
        self.space = types.SimpleNamespace(mean=None)

    def write(self, x: Tensor) -> None:
        global COUNT
        weight = self.conv.weight
        if self.how == "parameter in place":
            weight.data.clamp_(-0.01, 0.01)
        elif self.how == "parameter without gradients":
            with torch.no_grad():
                weight.mul_(2)
        elif self.how == "memory of a parameter":
            weight.data = weight.data.renorm(2, 0, 0.5)
        elif self.how == "whether a parameter wants gradients":
            weight.requires_grad_(False)
        elif self.how == "gradient of a parameter":
            weight.grad = torch.ones_like(weight)
        elif self.how == "attribute of a parameter":
            weight.seen = x.shape[-1]
        elif self.how == "global":
            COUNT += 1
        elif self.how == "items of a global":
            TABLE["sizes"].append(x.shape[-1])
            TABLE[x.shape] = x.shape[-1]
        elif self.how == "class":
            type(self).total += 1
            self.everyone.append(1)
        elif self.how == "nested items":
            self.nested["of"][0].add(2)
        elif self.how == "attribute of an object":
            self.space.mean = x.mean()
        elif self.how == "random numbers":
            self.drawn = random.random(), np.random.rand()
        else:
            _count_calls()

    def forward(self, x: Tensor) -> Tensor:
        self.write(x)
        x = self.conv(x)
        if x.max() > -1e9:
            with torch.inference_mode():
                offset = torch.ones(1, dtype=x.dtype) * 3
        return x + offset.clone()


@pytest.mark.parametrize(
    "how",
    [
        "parameter in place",
        "parameter without gradients",
        "memory of a parameter",
        "whether a parameter wants gradients",
        "gradient of a parameter",
        "attribute of a parameter",
        "global",
        "items of a global",
        "class",
        "nested items",
        "attribute of an object",
        "random numbers",
        "default and attribute of a function",
    ],
)
def test_a_refusal_restores_what_an_earlier_piece_has_written(how: str) -> None:
    net = Writer(how).double()

    def seen() -> str:
        weight, function = net.conv.weight, vars(_count_calls)
        wants = weight.requires_grad, weight.grad, getattr(weight, "seen", None)
        kept = weight.data_ptr(), weight.tolist(), wants, TABLE, COUNT, Writer.total, Writer.everyone, net.nested
        return repr((*kept, _count_calls.__defaults__, function, random.getstate(), np.random.get_state(), vars(net)))

    before, ours = seen(), accelerate(net, tile=8, fallback="untiled")
    with pytest.raises(UnsupportedError, match="inference_mode inside"):
        ours(image())
    assert seen() == before


@pytest.mark.parametrize("fallback", [None, "untiled"])
def test_a_weight_of_inference_mode_that_the_forward_replaces(fallback: str | None) -> None:
    class Renormalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            self.conv.weight.data = self.conv.weight.data.renorm(2, 0, 0.5)
            return self.conv(x).mean((2, 3))

    stock = Renormalized().double()
    ours, x = copy.deepcopy(stock), image()
    net = accelerate(ours, tile=8, fallback=fallback)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), stock(x), rtol=1e-12, atol=1e-12)
    for one in (net, stock):
        one(x).sum().backward()
    torch.testing.assert_close(ours.conv.weight.grad, stock.conv.weight.grad, rtol=1e-12, atol=1e-12)


def test_tensors_without_memory_are_left_alone() -> None:
    net = nn.Sequential(nn.LazyConv2d(3, 3), nn.Conv2d(1, 1, 3, device="meta"))
    net.sparse = torch.eye(3).to_sparse()
    Rollback(net).undo()


def test_an_array_that_is_read_in_inference_mode_is_refused_in_one_line() -> None:
    class Scaled(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.from_numpy(self.array)

    net = Scaled().double().eval()
    net.array = np.array([0.5, 2.0])
    stock, ours = copy.deepcopy(net), accelerate(net, tile=8, fallback="untiled")
    torch.testing.assert_close(ours(image()), stock(image()), rtol=1e-12, atol=1e-12)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="numpy arrays in inference mode"):
        ours(image())
    assert net.calls == 1
    torch.testing.assert_close(ours(image()), stock(image()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("written", ["view", "select", "transpose"])
def test_a_write_through_a_view_of_a_whole_map(written: str) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).clone()
            if written == "view":
                y.view(y.shape[0], -1)[:, 3] = 0.5
            elif written == "select":
                y.flatten(2).select(2, 5).mul_(0.5)
            else:
                y.flatten(2).transpose(1, 2)[:, 1] = 2.0
            return self.last(y).mean((2, 3))

    assert_exact(randomize(Writing()).double(), image(), tile=8, fallback="untiled")
