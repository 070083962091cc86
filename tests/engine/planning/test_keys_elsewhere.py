"""Keys and values, which all positions ask, lie where the plan says, and are here while their stage is computed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate, plan
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.execution.offloaded import _Kept
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.planning.lifetimes import stored_peaks
from gigamorph.engine.planning.strategy import Strategy, every_strategy, strategies
from gigamorph.engine.tiling import stored_maps

SEARCH = sys.modules["gigamorph.engine.planning.search"]
WIDTH, HEADS, DEPTH = 8, 2, 3


class Block(nn.Module):
    """A block of a transformer on tokens (N, L, C), its attention written out or PyTorch's."""

    def __init__(self, written: bool, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2))
        y = (q @ k.mT).softmax(-1) @ v if self.written else F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Blocks on the positions of a map after a live norm, and on a class token where there is one."""

    def __init__(self, token: bool, depth: int = DEPTH, width: int = WIDTH):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 4, 4), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(Block(n % 2 == 0, width) for n in range(depth)))
        self.token = nn.Parameter(torch.randn(1, 1, width)) if token else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.blocks(x)
        return x.mean(1) if self.token is None else x[:, 0]


@pytest.mark.parametrize(
    ("token", "place", "number"), [(False, "host", 0), (True, "disk", 0), (False, "disk", 2), (True, "disk", 4)]
)
def test_gradients_are_those_of_keys_on_the_device(
    token: bool, place: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of choices that keep everything, and that compute segments again."""

    def elsewhere(*given: Any) -> Iterator[Strategy]:
        choices = [one for one in every_strategy(*given) if one.staged.place == "device"]
        chosen = choices[min(number, len(choices) - 1)]
        yield replace(chosen, staged=replace(chosen.staged, place=place))

    written: list[Tensor] = []
    write = _Kept.write
    monkeypatch.setattr(_Kept, "write", lambda kept, memory: (written.append(memory.detach()), write(kept, memory))[1])
    monkeypatch.setattr(stored_maps, "LEAST_BYTES", 1 << 12)
    monkeypatch.setattr(SEARCH, "strategies", elsewhere)
    torch.manual_seed(0)
    assert_exact(Transformer(token).double().train(), torch.randn(2, 1, 36, 44, dtype=torch.float64), tile=16)
    keys = 2 * WIDTH * (9 * 11 + token)
    assert sum(memory.numel() == keys for memory in written) >= 2 * (DEPTH - 1), "keys and values of blocks"


def test_one_step_goes_back_twice_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`retain_graph` keeps what lies elsewhere."""
    monkeypatch.setattr(stored_maps, "LEAST_BYTES", 1 << 12)
    choice = lambda *given: (one for one in every_strategy(*given) if one.staged.place == "disk")  # noqa: E731
    monkeypatch.setattr(SEARCH, "strategies", choice)
    net = accelerate(Transformer(True, 2).double(), tile=24)
    loss = net(torch.randn(1, 1, 36, 44, dtype=torch.float64)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    loss.backward()
    for one, both in zip(first, (p.grad for p in net.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(2 * one, both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("token", [False, True], ids=["positions", "token"])
def test_keys_elsewhere_are_counted_while_they_are_here(token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all blocks on the device; elsewhere those of one with their gradients, however many blocks there are."""
    monkeypatch.setattr(stored_maps, "LEAST_BYTES", 1 << 12)
    own = WIDTH * 32 * 32 * 8  # bytes of one map
    peaks = []
    for depth in (DEPTH, 2 * DEPTH):
        net = Transformer(token, depth).double()
        first = next(strategies(*sort(capture(net, (1, 1, 128, 128), torch.float64, "cpu")), True, False)).staged
        peaks.append(stored_peaks(first, True, first.wanted(False)))
    (here, away), (more, as_much) = peaks
    assert more - here > 2 * DEPTH * own and here > 2 * (DEPTH + 1) * own
    assert as_much - away < 1.1 * own and 4 * own <= away < 7 * own


def test_a_small_budget_keeps_keys_in_files() -> None:
    """The plan takes files before it computes anything twice, and says where the maps are."""
    net = Transformer(True, 8, width=64).eval()
    ample = plan(net, (384, 384), tile=32)
    spare = ample.retained_bytes + ample.heap_bytes
    frugal = plan(net, (384, 384), ample.peak_bytes - spare - int(0.5 * ample.stored_bytes), tile=32)
    assert (ample.maps, frugal.maps) == ("device", "disk") and "on disk" in str(frugal)
    assert frugal.stored_bytes < 0.25 * ample.stored_bytes


def test_keys_are_not_copied_as_kernels_are() -> None:
    """In float32 kernels are put in the memory order of maps; keys of four dimensions are none."""
    net = accelerate(Transformer(True), tile=16)
    orders = []
    real = torch.Tensor.contiguous

    def contiguous(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if kwargs.get("memory_format") == torch.channels_last and tensor.dim() == 4 and tensor.shape[-2:] == (100, 4):
            orders.append(tensor.shape)
        return real(tensor, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        net(torch.zeros(1, 1, 36, 44))
        patch.setattr(torch.Tensor, "contiguous", contiguous)
        net(torch.zeros(1, 1, 36, 44))
    assert not orders
