"""Hooks on a forward's own tensors, and gradients with respect to maps that it hands out (Grad-CAM)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.trace import capture
from gigamorph.engine.lowering.sorting import sort
from gigamorph.engine.planning.strategy import strategies

PLAN = sys.modules["gigamorph.engine.planning.search"]
LIMIT = 1e-12


class Net(nn.Module):
    """Two blocks around `middle`, pooling and a classifier."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.middle, self.seen, self.kept = middle, [], None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.middle(self, self.first(x)).clone())).relu().mean((2, 3)))


def scaled(net: Any, x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad * 0.5)
    return x


def reversed_gradient(net: Any, x: Tensor) -> Tensor:
    y = x * 1
    y.register_hook(lambda grad: -0.1 * grad)
    return y


def masked(net: Any, x: Tensor) -> Tensor:
    mask = (x > 0).to(x.dtype)
    x.register_hook(lambda grad: grad * mask)
    return x


def gated_by_a_vector(net: Any, x: Tensor) -> Tensor:
    gate = x.mean((2, 3), keepdim=True).sigmoid()
    gate.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    return x * gate


def collected(net: Any, x: Tensor) -> Tensor:
    x.register_hook(lambda grad: net.seen.append(grad))
    return x


def in_order(net: Any, x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad + 1)
    x.register_hook(lambda grad: grad * 2)
    x.register_hook(lambda grad: net.seen.append(grad))
    return x


def taken_back(net: Any, x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad * 3)
    x.register_hook(lambda grad: grad * 0).remove()
    return x


def before_a_write(net: Any, x: Tensor) -> Tensor:
    x = x * 1
    x.register_hook(lambda grad: net.seen.append(grad))
    x.mul_(3)
    x.register_hook(lambda grad: net.seen.append(grad))
    return x


def retained(net: Any, x: Tensor) -> Tensor:
    x.retain_grad()
    net.kept = x
    return x


def retained_before_a_write(net: Any, x: Tensor) -> Tensor:
    x = x * 1
    x.retain_grad()
    net.kept = F.relu(x, inplace=True)
    return x


def retained_by_nobody(net: Any, x: Tensor) -> Tensor:
    x.retain_grad()
    return x


def on_both(net: Any, x: Tensor) -> Tensor:
    """Of two maps of one pass, in the order of their calls in the backward: the later one first."""
    a, b = x * 2, x.sin()
    a.register_hook(lambda grad: net.seen.append(grad))
    b.register_hook(lambda grad: net.seen.append(grad))
    return a + b


def of_one_that_is_not_used(net: Any, x: Tensor) -> Tensor:
    (x * 2).register_hook(lambda grad: net.seen.append(grad))
    x.register_hook(lambda grad: net.seen.append(grad))
    return x


MIDDLES = [
    *(scaled, reversed_gradient, masked, gated_by_a_vector, collected, in_order, taken_back, before_a_write),
    *(retained, retained_before_a_write, retained_by_nobody, on_both, of_one_that_is_not_used),
]


def close(got: Any, wanted: Any) -> bool:
    if wanted is None or got is None:
        return got is wanted
    return got.shape == wanted.shape and bool((got - wanted).norm() <= LIMIT * max(wanted.norm().item(), 1e-3))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("middle", MIDDLES, ids=lambda middle: middle.__name__)
def test_hooks_of_the_forward(middle: Callable[[Any, Tensor], Tensor], live: bool) -> None:
    torch.manual_seed(0)
    stock = randomize(Net(middle)).double().train(live)
    ours = accelerate(copy.deepcopy(stock), tile=(7, 9))
    for _ in range(3):
        x = torch.randn(2, 1, 23, 19, dtype=torch.float64)
        for net in (stock, ours):
            net.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
        for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
            assert close(a.grad, b.grad), name
        assert len(ours.seen) == len(stock.seen)
        assert all(close(a, b) for a, b in zip(ours.seen, stock.seen, strict=True))
        assert (ours.kept is None) == (stock.kept is None)
        assert stock.kept is None or close(ours.kept.grad, stock.kept.grad)


class GradCam:
    """Activations and gradients of layers, collected as widespread Grad-CAM packages do."""

    def __init__(self, network: nn.Module, layers: list[nn.Module]) -> None:
        self.network, self.activations, self.gradients = network, [], []
        for layer in layers:
            layer.register_forward_hook(self.save_activation)
            layer.register_forward_hook(self.save_gradient)

    def save_activation(self, _module: nn.Module, _given: Any, output: Tensor) -> None:
        self.activations.append(output.cpu().detach())

    def save_gradient(self, _module: nn.Module, _given: Any, output: Tensor) -> None:
        if not hasattr(output, "requires_grad") or not output.requires_grad:
            return

        def store(grad: Tensor) -> None:
            self.gradients = [grad.cpu().detach(), *self.gradients]

        output.register_hook(store)

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.activations, self.gradients = [], []
        self.network.zero_grad()
        self.network(x)[:, 1].sum().backward(retain_graph=True)
        return [*self.activations, *self.gradients]


class Chain(nn.Sequential):
    """Live norms, so that a step has many stages, strategies and segments; what its layers give is kept by hooks."""

    def __init__(self) -> None:
        parts = [
            module
            for c in range(1, 6)
            for module in (nn.Conv2d(c, c + 1, 3, 1 + (c == 2), bias=False), nn.BatchNorm2d(c + 1), nn.SiLU())
        ]
        super().__init__(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize("live", [False, True])
def test_grad_cam_packages(live: bool) -> None:
    torch.manual_seed(1)
    stock = randomize(Chain()).double().train(live)
    ours = accelerate(copy.deepcopy(stock), tile=16)
    stock_cam, our_cam = (GradCam(net, [net.get_submodule(n) for n in ("5", "8", "14")]) for net in (stock, ours))
    for size in ((41, 37), (41, 37), (30, 52)):
        x = torch.randn(1, 1, *size, dtype=torch.float64)
        wanted, got = stock_cam(x), our_cam(x)
        assert len(got) == len(wanted) == 6 and all(close(a, b) for a, b in zip(got, wanted, strict=True))


def watched(net: nn.Module, layers: tuple[str, ...]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for name in layers:
        net.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: kept.update({name: y}))
    return kept


def test_gradients_of_kept_maps_in_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that are computed again must not hold a map that was handed out."""
    torch.manual_seed(2)
    layers = ("1", "2", "6", "8", "11", "14")
    stock = randomize(Chain()).double().train()
    x = torch.randn(2, 1, 45, 38, dtype=torch.float64)
    kept = watched(stock, layers)
    score = stock(x)[:, 1].sum() + kept["6"].square().sum()
    wanted = torch.autograd.grad(score, [*kept.values(), *stock.parameters()])
    probe = copy.deepcopy(stock)
    program = capture(probe, (2, 1, 45, 38), torch.float64, "cpu")
    number = len(list(strategies(*sort(program), training=True, image_grad=False)))
    assert number > 3
    for chosen in range(number):
        net = copy.deepcopy(stock)
        for module in net.modules():
            module._forward_hooks.clear()
        kept = watched(net, layers)
        monkeypatch.setattr(PLAN, "strategies", lambda *a, n=chosen: list(strategies(*a))[: n + 1][-1:])
        score = accelerate(net, tile=16)(x)[:, 1].sum() + kept["6"].square().sum()
        got = torch.autograd.grad(score, [*kept.values(), *net.parameters()])
        assert all(close(a, b) for a, b in zip(got, wanted, strict=True)), chosen


def test_hooks_of_outputs_that_no_gradient_reaches() -> None:
    torch.manual_seed(3)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x).mean((2, 3)), self.b(x)

    net = accelerate(Two().double(), tile=8)
    first, second = net(torch.randn(1, 1, 20, 20, dtype=torch.float64))
    calls: list[Tensor] = []
    second.register_hook(calls.append)
    first.sum().backward()
    assert not calls and net.b.weight.grad is None
