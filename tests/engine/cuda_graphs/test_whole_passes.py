"""Captured whole passes give what passes op by op give, and read nothing but what lies at fixed addresses.

On the CPU a captured function is one that is called again, and every op of it is watched. What pass 1 makes is poisoned
before the next pass 1, and once pass 2 is through all of it that nothing refers to any more: a graph's memory is used
again.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import Watch, poison, storage
from exactness import LIMIT, errors, named, randomize, step, step_errors
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import PixelSource, accelerate, dense_loss
from gigamorph.engine.cuda_graphs import buffers, step_checks
from gigamorph.engine.execution import forward
from gigamorph.engine.planning.plan import Plan
from gigamorph.engine.tiling.scan import Scan


class Memory:
    """What the captures of one stage share: their buffers, and what they leave for one another."""

    def __init__(self, counts: Remembered):
        self.counts, self.buffers, self.works = counts, buffers.GraphBuffers(), 0
        self.watch = Watch(set())

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.counts.captured += 1
        if self.counts.refuse == self.counts.captured:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        first, self.works = not self.works, self.works + 1
        captured = run.__self__ if hasattr(run, "__self__") else run.func.__self__  # pyright: ignore
        addresses = {n: t.data_ptr() for n, t in captured.buffers.inputs.items()}

        def again() -> None:
            self.counts.replayed += 1
            assert addresses == {n: captured.buffers.inputs[n].data_ptr() for n in addresses}, "a buffer has moved"
            fixed = {storage(t) for t in captured.buffers.inputs.values()}
            if first:
                for tensor in self.watch.made:
                    if storage(tensor) not in fixed:
                        poison(tensor)
                self.watch = Watch(fixed)
            self.watch.allowed |= fixed
            with self.watch:
                run()
            if not first:
                self.forget(fixed)

        return again

    def forget(self, fixed: set[int]) -> None:
        """Poison what nothing refers to."""
        by_storage: dict[int, list[Tensor]] = {}
        made = self.watch.made
        self.watch.made = []
        while made:
            tensor = made.pop()
            by_storage.setdefault(storage(tensor), []).append(tensor)
            del tensor
        for place, tensors in by_storage.items():
            if place not in fixed and all(sys.getrefcount(tensors[n]) <= 2 for n in range(len(tensors))):
                poison(tensors[0])
            self.watch.made += tensors


class Remembered:
    def __init__(self) -> None:
        self.on, self.captured, self.replayed, self.refuse = True, 0, 0, 0

    def apart(self) -> Memory:
        return Memory(self)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        raise AssertionError("a tile is captured alone")


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Remembered:
    """Whole passes are replayed on the CPU while `on`."""
    executor = Remembered()
    monkeypatch.setattr(buffers, "executor", lambda device: executor if executor.on else None)
    monkeypatch.setattr(Plan, "replayed", property(lambda plan: False))
    monkeypatch.setattr(step_checks, "MOST_TILES", 0)
    return executor


class Net(nn.Module):
    """Stem with pooling, a residual block, two kinds of pooling over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.b = nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.b(F.relu(self.a(x) + x))
        return self.head(torch.cat((x.mean((2, 3)), F.adaptive_max_pool2d(x, 1).flatten(1)), 1))


def build() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net()).double().eval()


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def retain(monkeypatch: pytest.MonkeyPatch, tiles: int) -> None:
    monkeypatch.setattr(forward, "Scan", lambda **given: Scan(**{**given, "retained": tiles}))


@pytest.mark.parametrize(("tile", "retained"), [(120, 1), (120, 0), (48, 9), (48, 4), (48, 0)])
def test_steps_are_equal(
    remembered: Remembered, fused_with_stock_ops: None, monkeypatch: pytest.MonkeyPatch, tile: int, retained: int
) -> None:
    """Bit for bit: outputs, gradients, with other images and weights each time, then inference."""
    retain(monkeypatch, retained)
    nets = [accelerate(build(), tile=tile) for _ in range(2)]
    for number in range(5):
        x, found = image(101, 86) * (1 + number), []
        for net, remembered.on in zip(nets, (False, True), strict=True):
            if number < 4:
                made = step(net, x, seed=number, image_gradient=False)
                found.append(made.gradients | named(made.outputs))
            else:
                with torch.no_grad():
                    found.append(named([net(x) for _ in range(2)]))
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(1.01)
        assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True)), number  # pyright: ignore
    assert remembered.captured == 3, "two passes in training, one in inference"
    assert remembered.replayed == 3 * 2 + 1


def test_of_autocast_and_float32(remembered: Remembered, fused_with_stock_ops: None) -> None:
    nets, x = [accelerate(build().float(), tile=48) for _ in range(2)], image(101, 86).float()
    for number in range(3):
        found = []
        for net, remembered.on in zip(nets, (False, True), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = step(net, x + number, image_gradient=False)
            found.append(made.gradients | named(made.outputs))
        assert max(errors(*found).values()) == 0
    assert remembered.captured == 2


@pytest.mark.parametrize("retained", [0, 4])
def test_a_forward_that_waits_for_its_backward_is_left_alone(
    remembered: Remembered, monkeypatch: pytest.MonkeyPatch, retained: int
) -> None:
    retain(monkeypatch, retained)
    grads = []
    for remembered.on in (False, True):
        model = build()
        net = accelerate(model, tile=64)
        net(image(96, 96)).sum().backward()
        first, second = net(image(96, 96)).square().sum(), net(2 * image(96, 96) + 1).square().sum()
        second.backward()
        first.backward()
        net(image(96, 96) - 1).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert remembered.captured == 2 and remembered.replayed == 4
    assert max(errors(*grads).values()) == 0


@pytest.mark.parametrize("retained", [0, 4])
def test_a_second_backward_of_the_same_graph(
    remembered: Remembered, monkeypatch: pytest.MonkeyPatch, retained: int
) -> None:
    """Goes by the halos that pass 1 has left, while another forward runs op by op."""
    retain(monkeypatch, retained)
    model = build()
    net = accelerate(model, tile=64)
    for _ in range(3):
        found = []
        loss = net(image(96, 96)).square().sum()
        for keep in (True, False):
            model.zero_grad()
            loss.backward(retain_graph=keep)
            found.append({name: p.grad for name, p in model.named_parameters()})
            if keep:
                net(image(96, 96) * 3)
        assert max(errors(*found).values()) <= LIMIT
    assert remembered.captured == 2


def test_other_outputs_in_a_later_step(remembered: Remembered) -> None:
    """A gradient of another of the results is another backward, of the same pass 1."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x).mean((2, 3)), self.b(x).amax((2, 3))

    model = Two().double()
    net = accelerate(copy.deepcopy(model), tile=16)
    for asked in ((0, 1), (0, 1), (1,), (0,), (0, 1)):
        results = []
        for one in (model, net):
            one.zero_grad()
            outputs = one(image(40, 40))
            sum(outputs[n].square().sum() for n in asked).backward()  # pyright: ignore
            results.append({name: p.grad for name, p in one.named_parameters()})
        assert max(errors(*results).values()) <= LIMIT
        assert [g is None for g in results[0].values()] == [g is None for g in results[1].values()]
    assert remembered.captured == 4


@pytest.mark.parametrize("refuse", [1, 2])
def test_a_capture_that_fails_costs_speed(
    remembered: Remembered, caplog: pytest.LogCaptureFixture, refuse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either pass: the step is right, one warning says why, and no other is tried."""
    retain(monkeypatch, 4)
    remembered.refuse = refuse
    buffers.warn_once.cache_clear()
    model = build()
    wanted = step(copy.deepcopy(model), image(96, 96), image_gradient=False)
    net = accelerate(model, tile=64)
    with caplog.at_level("WARNING", "gigamorph"):
        for _ in range(4):
            assert max(step_errors(wanted, step(net, image(96, 96), image_gradient=False)).values()) <= LIMIT
    assert remembered.captured == refuse
    assert "not permitted" in caplog.text and len(caplog.records) == 1


def test_what_is_not_captured_whole(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets, images that want a gradient, random numbers, live norms, many tiles, networks too large."""
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)).double()
    monkeypatch.setattr(remembered, "apart", lambda: pytest.fail("captured"))

    def twice(net: nn.Module, x: Tensor) -> None:
        for _ in range(2):
            net(x).sum().backward()

    twice(accelerate(plain, memory_budget=2**30), image(60, 60))
    twice(accelerate(plain, tile=16), image(96, 96))
    twice(accelerate(plain, tile=64), image(96, 96).requires_grad_())
    for layer in (nn.Dropout(0.5), nn.BatchNorm2d(2)):
        twice(accelerate(nn.Sequential(plain[0], layer, plain[1]).double(), tile=64), image(96, 96))
    monkeypatch.setattr(forward.Forward, "_captured", forward.Forward._captured)
    monkeypatch.setattr("gigamorph.engine.execution.prepared.available_bytes", lambda device: 1000)
    twice(accelerate(plain, tile=64), image(96, 96))


def test_pixels_from_elsewhere_and_progress(remembered: Remembered) -> None:
    """An image that is read by region is read whole; every tile is told of."""

    class Source(PixelSource):
        shape, dtype = (1, 96, 96), torch.float64

        def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
            return image(96, 96)[0, :, top:bottom, left:right]

    told: list[list[tuple[Any, ...]]] = []
    net = accelerate(build(), tile=64)
    results = []
    for _ in range(3):
        events: list[tuple[Any, ...]] = []
        net.on_tile = lambda event, events=events: events.append((event.phase, event.done, event.total, event.pixels))
        output = net(Source())
        output.sum().backward()
        results.append(output.detach())
        told.append(events)
    assert remembered.captured == 2 and torch.equal(results[0], results[2])
    assert told[0] == told[1] == told[2] and len(told[0]) == 8


def test_the_captured_work_keeps_no_image_and_goes_with_another_size(remembered: Remembered) -> None:
    net, x = accelerate(build(), tile=64), image(96, 96)
    gone = weakref.ref(x)
    for _ in range(2):
        net(x).sum().backward()
    del x
    gc.collect()
    assert gone() is None
    (prepared,) = net._runner.programs
    (passes,) = prepared.whole.values()
    captured = weakref.ref(passes)
    del passes
    net(image(64, 64)).sum().backward()
    gc.collect()
    assert captured() is None


def test_other_weights_that_are_trained_and_other_settings(remembered: Remembered) -> None:
    model = build()
    net = accelerate(model, tile=64)
    for trained in (True, True, False, False, True):
        model.stem.requires_grad_(trained)  # pyright: ignore
        model.zero_grad()
        net(image(96, 96)).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert remembered.captured == 4


def test_losses_on_maps_are_one_by_one(remembered: Remembered) -> None:
    """Their labels are sources of the stage besides the image."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)).double()
    y = torch.randint(0, 3, (1, 96, 96))
    for _ in range(2):
        dense_loss(accelerate(model, tile=64), image(96, 96), y, nn.CrossEntropyLoss()).backward()
    assert remembered.captured == 0
