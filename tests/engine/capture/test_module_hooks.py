"""Full backward hooks of modules are refused in a whole graph; in pieces they see and change what stock has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from exactness import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import GigamorphError, UnsupportedError, accelerate

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
LIMIT = 1e-12


class Two(nn.Module):
    """Several arguments, one of them no tensor, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.conv(x) * factor + y, y * 2, x.detach()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.act, self.down = nn.SiLU(), nn.Conv2d(4, 4, 3, 2, 1, bias=False)
        self.two, self.norm, self.head = Two(), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.stem(x)))
        a, b, _ = self.two(y, 0.5, y.sin())
        return self.head(self.act(self.norm(a + b)).mean((2, 3)))


PLACES = ["", "stem", "stem.0", "act", "down", "two", "two.conv", "norm", "head"]


def seen(module: nn.Module, log: list[Any]) -> None:
    module.register_full_backward_hook(lambda _module, inside, outside: log.append((inside, outside)))


def halved(module: nn.Module, log: list[Any]) -> None:
    module.register_full_backward_pre_hook(lambda _module, outside: _each(outside, lambda grad: grad * 0.5))


def clamped(module: nn.Module, log: list[Any]) -> None:
    module.register_full_backward_hook(
        lambda _module, inside, _outside: _each(inside, lambda grad: grad.clamp(max=1e-3))
    )


def _scaled(factor: float, _module: nn.Module, inside: Any, _outside: Any) -> Any:
    return _each(inside, lambda grad: grad * factor)


def _each(grads: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(None if grad is None else change(grad) for grad in grads)


@settings(max_examples=6)
@given(
    hooks=st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from([seen, halved, clamped])), min_size=1, max_size=3
    ),
    live=st.booleans(),
    image_grad=st.booleans(),
    tile=st.tuples(st.integers(6, 40), st.integers(6, 40)),
)
def test_hooks_on_modules(hooks, live: bool, image_grad: bool, tile: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stock = randomize(Net()).double().train(live)
    twin = copy.deepcopy(stock)
    logs: list[list[Any]] = [[], []]
    for net, log in ((stock, logs[0]), (twin, logs[1])):
        for name, register in hooks:
            register(net.get_submodule(name), log)
    ours = accelerate(twin, tile=tile, fallback="untiled")
    for size in ((33, 29), (21, 40), (33, 29)):
        image = torch.randn(2, 1, *size, dtype=torch.float64)
        found = []
        for net in (stock, ours):
            net.zero_grad(set_to_none=True)
            leaf = image.clone().requires_grad_(image_grad)
            net(leaf).square().sum().backward()
            found.append([leaf.grad, *(p.grad for p in net.parameters())])
        for log, grads in zip(logs, found, strict=True):
            grads += [grad for inside, outside in log for grad in (*inside, *outside)]
            log.clear()
        assert len(found[0]) == len(found[1])
        largest = max(grad.norm().item() for grad in found[0] if grad is not None)
        for want, got in zip(*found, strict=True):
            assert (want is None) == (got is None)
            assert want is None or (got - want).norm() <= LIMIT * max(want.norm().item(), 1e-3 * largest)


@pytest.mark.parametrize("register", [seen, halved, clamped])
def test_hooks_in_a_whole_graph_are_refused(register) -> None:
    net = Net().double()
    register(net.down, [])
    with pytest.raises(UnsupportedError, match=r"test_module_hooks.py:\d+ \(in forward\) .* hooks") as caught:
        accelerate(net, tile=9)(torch.randn(1, 1, 20, 20, dtype=torch.float64))
    assert "\n" not in str(caught.value) and 'fallback="untiled"' in str(caught.value)


def test_a_write_in_place_behind_a_hook_fails_as_in_stock() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)).double()
    net[0].register_full_backward_hook(lambda *_: None)
    image = torch.randn(1, 1, 20, 20, dtype=torch.float64)
    for each in (net, accelerate(copy.deepcopy(net), tile=8, fallback="untiled")):
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            each(image)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["stem", "stem.0", "act", "two.conv", "head"])
def test_the_first_hook_of_a_module_counts_from_the_next_call_on(place: str, kind: str) -> None:
    stock = randomize(Net()).double().eval()
    ours, image = accelerate(copy.deepcopy(stock), tile=16), torch.randn(1, 1, 30, 30, dtype=torch.float64)
    for net in (stock, ours):
        net(image)

    def tripled(_module: nn.Module, given: Any, *results: Tensor) -> Any:
        return results[0] * 3 if results else (given[0] * 3,)

    handles = [getattr(net.get_submodule(place), kind)(tripled) for net in (stock, ours)]
    torch.testing.assert_close(ours(image), stock(image), rtol=1e-11, atol=1e-11)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours(image), stock(image), rtol=1e-11, atol=1e-11)


def test_hooks_that_come_and_go() -> None:
    torch.manual_seed(0)
    stock = Net().double()
    ours = accelerate(copy.deepcopy(stock), tile=16, fallback="untiled")
    image = torch.randn(1, 1, 30, 30, dtype=torch.float64)
    for factor in (1.0, 3.0, 0.1):
        grads = []
        for net in (stock, ours):
            net.zero_grad(set_to_none=True)
            handle = net.down.register_full_backward_hook(partial(_scaled, factor))
            net(image).sum().backward()
            grads.append([p.grad for p in net.parameters()])
            handle.remove()
        largest = max(grad.norm().item() for grad in grads[0])
        for want, got in zip(*grads, strict=True):
            assert (got - want).norm() <= LIMIT * max(want.norm().item(), 1e-3 * largest)


class Aside(nn.Module):
    """A norm that sees a second map, of which only its running statistics know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aside, self.norm = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result = self.norm(self.conv(x))
        self.norm(self.aside(y))
        return result.square().mean((2, 3))


def test_what_a_loss_does_not_reach_gets_no_gradient_of_zeros() -> None:
    """AdamW would let parameters with one decay."""
    stock = Aside().double()
    stock.norm.register_full_backward_hook(lambda *_: None)
    for net in (stock, accelerate(copy.deepcopy(stock), tile=8, fallback="untiled")):
        x, y = torch.randn(2, 2, 1, 20, 20, dtype=torch.float64).requires_grad_().unbind()
        y.retain_grad()
        net(x, y).sum().backward()
        given = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
        assert y.grad is None and given == {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}


class Heads(nn.Module):
    """Two branches, of which a loss may ask one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(wide, 3, 3) for wide in (1, 1, 3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.c(self.a(x)).mean((2, 3)), self.d(self.b(x)).mean((2, 3))


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_of_modules_that_a_loss_does_not_reach_are_not_called(kind: str) -> None:
    """One stage reads what both give; the hook of the other was called with None."""
    stock = Heads().double()
    calls: list[tuple[str, float]] = []
    for name in "cd":
        register = getattr(stock.get_submodule(name), f"register_full_backward_{kind}")
        register(lambda _module, *grads, name=name: calls.append((name, grads[-1][0].sum().item())))
    found = []
    for net in (stock, accelerate(copy.deepcopy(stock), tile=8, fallback="untiled")):
        net(torch.ones(1, 1, 20, 20, dtype=torch.float64))[0].sum().backward()
        found.append({name for name, parameter in net.named_parameters() if parameter.grad is not None})
    assert [name for name, _ in calls] == ["c", "c"] and calls[0][1] == pytest.approx(calls[1][1], rel=1e-12)
    assert found[0] == found[1] == {"a.weight", "a.bias", "c.weight", "c.bias"}


def test_a_hooked_module_that_the_loss_does_not_reach_is_refused_or_left_alone() -> None:
    """Autograd would call the hook of a piece's input, and give zeros to the weights before it instead of None."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.before, self.hooked = (nn.Conv2d(n, 2, 3, padding=1) for n in (1, 2, 2))
            self.heads = nn.ModuleList([nn.Conv2d(2, 1, 1)])
            self.hooked.register_full_backward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> list[Tensor]:
            first = self.first(x)
            x = self.hooked(self.before(first)) * 2

            def each(head: nn.Module) -> Tensor:  # it keeps `x`
                return head(first if x is not None else x)

            return [each(head) for head in self.heads]

    stock = Dead().double()
    fast = accelerate(copy.deepcopy(stock), tile=8, fallback="untiled")
    x = torch.randn(1, 1, 20, 17, dtype=torch.float64)
    stock(x)[0].sum().backward()
    assert stock.before.weight.grad is None
    try:
        fast(x)[0].sum().backward()
    except GigamorphError as error:
        assert "is made by BackwardHookFunction, and this loss does not reach it" in str(error)
    else:  # since PyTorch 2.15 the piece does not return the map that the inner function keeps
        assert torch.__version__ >= "2.15" and fast.before.weight.grad is None
