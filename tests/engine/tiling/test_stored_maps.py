"""Maps that exist whole: their memory goes back in time, and files take their place where the budget asks for it."""

from __future__ import annotations

import copy
import errno
import gc
import os
import sys
import tempfile
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize, step, step_errors
from torch import Tensor, nn

from gigamorph import GigamorphError, accelerate, plan
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.planning.strategy import Strategy, every_strategy
from gigamorph.engine.tiling import stored_maps as maps_module
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, used_bytes
from gigamorph.engine.tiling.scan import Scan

PLAN = sys.modules["gigamorph.engine.planning.search"]  # the package's attribute of that name is the function
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages do not go back")


class Residual(nn.Module):
    """A stored map that two stages read, and segments."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList([self.block(channels) for _ in range(3)])
        self.head = nn.Linear(channels, 3)

    @staticmethod
    def block(channels: int) -> nn.Module:
        convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
        return nn.Sequential(convs[0], nn.BatchNorm2d(channels), nn.ReLU(), convs[1], nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(params=["all maps", "segments"])
def on_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Only a choice that keeps maps on disk, small maps too; the names of those taken."""
    taken: list[str] = []

    def choose(*args: Any) -> list[Strategy]:
        every = list(every_strategy(*args))
        away = [
            s for s in every if s.staged.place == "disk" and bool(s.staged.segments) == (request.param == "segments")
        ]
        taken.extend(s.name for s in away[:1])
        return away[:1] or every[:1]

    monkeypatch.setattr(PLAN, "strategies", choose)
    monkeypatch.setattr(maps_module, "LEAST_BYTES", 1)
    return taken


def network() -> nn.Module:
    return randomize(Residual().double()).train()


@pytest.mark.parametrize("tile", [16, 64])
def test_maps_on_disk_are_exact(on_disk: list[str], tile: int) -> None:
    assert_exact(network(), torch.randn(2, 1, 61, 53, dtype=torch.float64), tile=tile)
    assert on_disk


def test_maps_on_disk_are_exact_for_a_graph_that_is_kept(on_disk: list[str]) -> None:
    """Both backwards of a graph give the gradients of stock PyTorch."""
    stock, x = network(), torch.randn(2, 1, 61, 53, dtype=torch.float64)
    fast = accelerate(copy.deepcopy(stock), tile=16)
    for net in (stock, fast):
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for (name, want), have in zip(stock.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad, rtol=1e-12, atol=1e-12, msg=name)


@linux
def test_files_are_gone_after_a_step(on_disk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()  # what earlier tests have left
    others = set(maps_module._PAGES)  # of networks that other tests keep
    made: list[int] = []
    allocate = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, *a: (made.append(fd), allocate(fd, *a))[1])
    loss = accelerate(network(), tile=16)(torch.randn(1, 1, 61, 53, dtype=torch.float64)).sum()
    assert made and not list(tmp_path.glob("gigamorph*"))  # they have no name from the start
    loss.backward()
    del loss
    assert set(maps_module._PAGES) <= others
    names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum("gigamorph-map" in name for name in names) <= len(others)


def test_a_full_disk_is_told_in_one_line(on_disk: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    net, x = accelerate(network(), tile=16), torch.randn(1, 1, 61, 53, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(GigamorphError, match=r"cannot store another .* TMPDIR") as caught:
            net(x)
        assert "\n" not in str(caught.value)
        patch.undo()
        loss = net(x).sum()
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(GigamorphError, match=r"cannot store another .* of halos or maps"):
            loss.backward()
    assert max(step_errors(step(copy.deepcopy(net._network), x), step(net, x)).values()) < 1e-12


def test_the_plan_takes_the_disk_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    net = resnet18(width=16, in_channels=1).train()
    found = plan(net, (1024, 1024), "40MiB")
    assert found.maps == "disk" and found.away_bytes > found.stored_bytes
    assert "on disk" in str(found) and found.choices[found.choice].name.endswith("; on disk")
    assert plan(net, (1024, 1024), "60MiB").maps == "device"
    monkeypatch.setattr(PLAN.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    assert not any(choice.name.endswith("; on disk") for choice in plan(net, (1024, 1024)).choices)


@linux
def test_rows_that_nobody_will_read_go_back() -> None:
    pattern = torch.ones(1, 4, 8, 16).contiguous(memory_format=torch.channels_last)
    made = maps_module.new_map(pattern, (1, 4, 512, 256))
    made.fill_(1)
    maps_module.let_rows_go(made, (2, 3), 100)
    assert made[:, :, :100].eq(1).all() and made[:, :, 101:].eq(0).all()  # a row is a page


@linux
def test_a_file_takes_no_memory_once_it_is_let_go() -> None:
    made = maps_module.new_map(torch.ones(1, 8, 1, 1), (1, 8, 1024, 1024), "disk")
    before = used_bytes()
    made.fill_(1)
    assert used_bytes() - before > 30e6
    maps_module.let_files_go([made])
    assert used_bytes() - before < 5e6
    assert made.eq(1).all()


@linux
def test_a_step_with_maps_on_disk_keeps_to_its_budget() -> None:
    fast = accelerate(resnet18(width=16, in_channels=1).train(), memory_budget="50MiB")
    image = torch.randn(1, 1, 1024, 1024)
    accelerate(copy.deepcopy(fast._network))(image[:, :, :64, :64]).sum().backward()  # loads what is loaded once
    held = sum(t.nbytes for t in fast.state_dict().values())
    for _ in range(2):
        fast.zero_grad()
        before = used_bytes()
        reset_peak()
        fast(image).sum().backward()
        assert peak_bytes() - before + held < 50 * 2**20


def test_nothing_of_a_step_stays() -> None:
    """Not even of the first one, which records the network; the garbage collector is not needed."""
    seen: list[weakref.ref[Scan]] = []
    begin = Scan.__init__

    def remember(self: Scan, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        seen.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scan, "__init__", remember)
            accelerate(Residual(), memory_budget="60MiB")(torch.randn(1, 1, 64, 64)).sum().backward()
    finally:
        gc.enable()
    assert seen and not any(ref() is not None for ref in seen)
