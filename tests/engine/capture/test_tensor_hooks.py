"""Hooks on a forward's own tensors, and gradients with respect to maps that it hands out (Grad-CAM)."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import plan_again, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import GigamorphError, UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.nodes import sort
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
    *(scaled, reversed_gradient, masked, gated_by_a_vector, collected, in_order, before_a_write),
    *(retained, retained_before_a_write, retained_by_nobody, on_both, of_one_that_is_not_used),
]


# TorchDynamo refuses hooks that change what is outside of them, and `retain_grad`; in pieces they are exact.
IN_PIECES = (collected, in_order, before_a_write, retained, retained_before_a_write, retained_by_nobody, on_both)


def refused(
    net: nn.Module, match: str = r"test_tensor_hooks.py:\d+ \(in .*\) cannot be recorded by TorchDynamo"
) -> None:
    with pytest.raises(UnsupportedError, match=match) as caught:
        accelerate(net, tile=9)(torch.randn(1, 1, 36, 28, dtype=torch.float64))
    assert "\n" not in str(caught.value)


def close(got: Any, wanted: Any) -> bool:
    if wanted is None or got is None:
        return got is wanted
    return got.shape == wanted.shape and bool((got - wanted).norm() <= LIMIT * max(wanted.norm().item(), 1e-3))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("middle", MIDDLES, ids=lambda middle: middle.__name__)
def test_hooks_of_the_forward(middle: Callable[[Any, Tensor], Tensor], live: bool) -> None:
    torch.manual_seed(0)
    stock = randomize(Net(middle)).double().train(live)
    pieces = middle in (*IN_PIECES, of_one_that_is_not_used)
    if pieces:
        refused(copy.deepcopy(stock))
    ours = accelerate(copy.deepcopy(stock), tile=(7, 9), fallback="untiled" if pieces else None)
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


@pytest.mark.parametrize("fallback", [None, "untiled"])
def test_a_hook_that_the_forward_takes_back_is_refused(fallback: str | None) -> None:
    net = accelerate(Net(taken_back).double(), tile=9, fallback=fallback)
    with pytest.raises(UnsupportedError, match=r"test_tensor_hooks.py:\d+ .*(hook removal|AssertionError;)") as caught:
        net(torch.randn(1, 1, 23, 19, dtype=torch.float64))
    assert "\n" not in str(caught.value)


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
    ours = accelerate(copy.deepcopy(stock), tile=16, fallback="untiled")
    alone = copy.deepcopy(stock)
    GradCam(alone, [alone.get_submodule("5")])
    refused(alone)
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
    net = copy.deepcopy(stock)
    kept = watched(stock, layers)
    score = stock(x)[:, 1].sum() + kept["6"].square().sum()
    wanted = torch.autograd.grad(score, [*kept.values(), *stock.parameters()])
    probe = copy.deepcopy(stock)
    program = capture(probe, (2, 1, 45, 38), torch.float64, "cpu")
    number = len(list(strategies(*sort(program), training=True, image_grad=False)))
    assert number > 3
    kept, fast = watched(net, layers), accelerate(net, tile=16)
    for chosen in range(number):
        plan_again(fast)
        monkeypatch.setattr(PLAN, "strategies", lambda *a, n=chosen: list(strategies(*a))[: n + 1][-1:])
        score = fast(x)[:, 1].sum() + kept["6"].square().sum()
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


@pytest.mark.parametrize("fallback", [None, "untiled"])
def test_hooks_of_maps_that_no_gradient_reaches(fallback: str | None) -> None:
    """One stage reads both maps, and has a gradient for one of them."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, z = self.a(x), self.b(x)
            y.register_hook(lambda grad: grad * 0.5)
            z.register_hook(lambda grad: grad * 0.25)
            return y.mean((2, 3)), z.mean((2, 3))

    stock = Pair().double()
    found = []
    for net in (stock, accelerate(copy.deepcopy(stock), tile=8, fallback=fallback)):
        net(torch.ones(1, 1, 20, 20, dtype=torch.float64))[0].sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    assert found[1][2:] == [None, None]
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-12, atol=0)


def test_a_hook_between_pieces_that_no_gradient_reaches_is_refused() -> None:
    """Autograd would call it with None, because the stage behind both maps has a gradient for one of them."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3), []

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, z = self.a(x), self.b(x)
            z.register_hook(lambda grad: self.calls.append("z") or grad * 0.5)
            return y.mean((2, 3)), z.mean((2, 3))

    refused(Pair().double())
    net = accelerate(Pair().double(), tile=8, fallback="untiled")
    with pytest.raises(GigamorphError, match="a map of an earlier piece of the network has a hook"):
        net(torch.ones(1, 1, 20, 20, dtype=torch.float64))[0].sum().backward()


# -- what a hook's function holds ------------------------------------------------------------------------------------


def _factory(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * factor


def _nested(factor: Tensor) -> Callable[[Tensor], Tensor]:
    def inner() -> Tensor:
        return factor

    return lambda grad: grad * inner()


def by_closure(net: Any, x: Tensor) -> None:
    factor = net.factor
    x.register_hook(lambda grad: grad * factor)


def by_pair(net: Any, x: Tensor) -> None:
    pair = (net.factor, 2)
    x.register_hook(lambda grad: grad * pair[0] * pair[1])


def assigning(net: Any, x: Tensor) -> None:
    def hook(grad: Tensor) -> Tensor:
        net.factor = 0.9 * net.factor + 0.1
        return grad * net.factor

    x.register_hook(hook)


HELD: dict[str, Callable[[Any, Tensor], Any]] = {
    "closure": by_closure,
    "pair": by_pair,
    "assigning": assigning,
    "default": lambda net, x: x.register_hook(lambda grad, factor=net.factor: grad * factor),
    "made default": lambda net, x: x.register_hook(lambda grad, x=x: grad * (x > 0)),
    "factory": lambda net, x: x.register_hook(_factory(net.factor)),
    "nested": lambda net, x: x.register_hook(_nested(net.factor)),
    "partial": lambda net, x: x.register_hook(functools.partial(torch.mul, net.factor)),
    "method of a list": lambda net, x: x.register_hook(net.seen.append),
}


HELD_IN_PIECES = ("assigning", "method of a list")


@pytest.mark.parametrize("name", HELD)
def test_functions_hold_the_tensors_of_their_call(name: str) -> None:
    """Also those of the network, which may have others in the next call."""

    def middle(net: Any, x: Tensor) -> Tensor:
        HELD[name](net, x)
        return x

    torch.manual_seed(0)
    stock = Net(middle).double().eval()
    stock.register_buffer("factor", torch.ones((), dtype=torch.float64))
    ours = accelerate(copy.deepcopy(stock), tile=9, fallback="untiled" if name in HELD_IN_PIECES else None)
    if name in HELD_IN_PIECES:
        refused(copy.deepcopy(stock))
    for factor in (1.0, 2.0, 3.0):
        x = torch.randn(1, 1, 23, 19, dtype=torch.float64)
        for net in (stock, ours):
            net.zero_grad(set_to_none=True)
            net.factor = torch.tensor(factor, dtype=torch.float64)
            net(x).sum().backward()
        assert all(close(a.grad, b.grad) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
        assert close(ours.factor, stock.factor) and len(ours.seen) == len(stock.seen)


# -- tensors that are computed in another form -----------------------------------------------------------------------


class Flat(nn.Module):
    """Keeps a flattened map, and hooks it if asked."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.conv, self.head, self.hooked, self.kept = nn.Conv2d(1, 4, 4, 4), nn.Linear(4, 2), hooked, None

    def forward(self, x: Tensor) -> Tensor:
        z = self.kept = self.conv(x).flatten(2)
        if self.hooked and torch.is_grad_enabled():
            z.register_hook(lambda grad: grad / grad.norm(dim=-1, keepdim=True))
        return self.head((z * z.softmax(-1)).sum(-1))


class Tokens(nn.Module):
    """A class token before the positions, as ViTs have it."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.conv, self.token, self.head = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 2)
        self.hooked, self.kept, self.attention, self.seen = hooked, None, None, []

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = self.kept = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        a = self.attention = (x @ x.transpose(1, 2)).softmax(-1)
        if self.hooked and torch.is_grad_enabled():
            x.register_hook(lambda grad: grad * 3)
            a.register_hook(self.seen.append)
        return self.head((x + a @ x)[:, 0])


class Spread(nn.Module):
    """A pooled vector that is spread over the image."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.conv, self.head, self.hooked, self.kept = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(8, 2, 1), hooked, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        pooled = self.kept = F.interpolate(F.adaptive_avg_pool2d(x, 1), size=x.shape[2:], mode="bilinear")
        if self.hooked and torch.is_grad_enabled():
            pooled.register_hook(lambda grad: 3 * grad)
        return self.head(torch.cat([x, pooled], 1)).mean((2, 3))


@pytest.mark.parametrize("kind", [Flat, Tokens, Spread])
def test_what_is_computed_in_another_form_is_never_half_differentiated(kind: type[nn.Module]) -> None:
    """It is kept as it is in stock; its gradients are exact, or told not to be there; its hooks too."""
    x = torch.randn(1, 1, 36, 28, dtype=torch.float64)
    for hooked in (False, True):
        torch.manual_seed(0)
        stock = kind(hooked).double()
        ours = accelerate(copy.deepcopy(stock), tile=12)
        with torch.no_grad():
            wanted, got = stock(x), ours(x)
        assert close(got, wanted) and close(ours.kept, stock.kept)
        wanted = torch.autograd.grad(stock(x)[0, 0], [stock.kept, *stock.parameters()], allow_unused=True)
        try:
            output = ours(x)
        except UnsupportedError as error:
            reasons = ["another form", "a tensor hook on", "TorchDynamo"]
            # PyTorch 2.11 and 2.12 record the hook as a function of its own.
            reasons += ["rule for 'autograd.Function'"] if torch.__version__ < "2.13" else []
            assert hooked and any(reason in str(error) for reason in reasons)
            continue
        got = torch.autograd.grad(output[0, 0], [ours.kept, *ours.parameters()], allow_unused=True)
        assert all(close(a, b) for a, b in zip(got[1:], wanted[1:], strict=True))
        assert got[0] is None or close(got[0], wanted[0])
        assert len(getattr(ours, "seen", [])) == len(getattr(stock, "seen", []))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.down, self.head = nn.Conv2d(1, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.b(self.a(x).relu()) * self.down(x).sigmoid()).relu().mean((2, 3)))


def test_lists_that_hooks_of_branches_fill() -> None:
    """In the order of stock's backward: else they pair one layer's map with another's gradient."""
    torch.manual_seed(0)
    stock = Branches().double()
    ours = accelerate(copy.deepcopy(stock), tile=12, fallback="untiled")
    x = torch.randn(1, 1, 30, 30, dtype=torch.float64)
    cams = [GradCam(net, [net.a, net.b, net.down]) for net in (stock, ours)]
    wanted, got = cams[0](x), cams[1](x)
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_graph_of_a_tensor_is_not_looked_at() -> None:
    def middle(net: Any, x: Tensor) -> Tensor:
        x.grad_fn.register_prehook(lambda grads: (grads[0] * 5,))
        return x

    refused(Net(middle).double())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomalies_may_be_looked_for() -> None:
    net = accelerate(Net(lambda _net, x: x).double(), tile=9, memory_budget="300MiB")
    with torch.autograd.detect_anomaly():
        net(torch.randn(1, 1, 23, 19, dtype=torch.float64)).sum().backward()
    assert net.first.weight.grad is not None
