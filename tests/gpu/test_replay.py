"""On a GPU: steps whose tiles are replayed as CUDA graphs equal steps whose tiles are computed op by op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import randomize
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.cuda_graphs import buffers, step_checks
from gigamorph.engine.models import create_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def gradients_of_step(net: nn.Module, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    net.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        output = net(x)
    output.float().square().sum().backward()
    # Copies: a backward that comes later adds to the gradients that are there.
    return [output.detach().clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_replayed_steps_equal_others(monkeypatch: pytest.MonkeyPatch, live: bool, autocast: bool) -> None:
    """ResNet-18, 6 x 6 tiles, three steps with SGD between them; the budget would never bind."""
    torch.manual_seed(0)
    model = randomize(create_model("resnet18", num_classes=8, in_channels=1)).cuda().train(live)
    x = torch.rand(1, 1, 768, 768, device="cuda")
    graphs = buffers.executor
    results: list[list[torch.Tensor]] = []
    captured: list[Any] = []
    capture = buffers.CudaGraphs.capture
    monkeypatch.setattr(buffers.CudaGraphs, "capture", lambda self, run: captured.append(1) or capture(self, run))
    for on in (False, True):
        monkeypatch.setattr(buffers, "executor", graphs if on else lambda device: None)
        net = accelerate(copy.deepcopy(model), tile=128)
        optimizer = torch.optim.SGD(net.parameters(), 1e-5)  # with more it diverges
        rounds = []
        for _ in range(3):
            rounds += [t.clone() for t in gradients_of_step(net, x, autocast)]
            optimizer.step()
        results.append(rounds)
        assert bool(captured) == on
    limit = 2e-2 if autocast else 1e-4  # stored maps and their gradients are read in another memory layout
    for plain, replayed in zip(*results, strict=True):
        assert (plain - replayed).double().norm() <= limit * max(plain.double().norm().item(), 1e-6)


def test_replayed_frozen_network_is_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = randomize(create_model("resnet18", num_classes=8, in_channels=1)).cuda().eval()
    x = torch.rand(1, 1, 768, 768, device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net = accelerate(copy.deepcopy(model), tile=128)
    replayed = [gradients_of_step(net, x, True) for _ in range(3)]  # the third is replayed throughout
    (prepared,) = net._programs
    benches = [bench for replays in prepared.replays.values() for bench in replays.benches.values()]
    assert benches and all(recording.replay for bench in benches for recording in bench.recordings.values())
    monkeypatch.setattr(buffers, "executor", lambda device: None)
    plain = gradients_of_step(accelerate(copy.deepcopy(model), tile=128), x, True)
    for one in replayed:
        assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))


def test_other_sizes_in_between() -> None:
    """Graphs are let go when the image size changes, their memory pool with them, and captured again."""
    torch.manual_seed(0)
    net = accelerate(randomize(create_model("resnet18", num_classes=8, in_channels=1)).cuda().eval(), tile=128)
    images = [torch.rand(1, 1, side, side, device="cuda") for side in (768, 640, 768, 640)]
    first = [gradients_of_step(net, x, False)[0] for x in images]
    for x, output in zip(images, first, strict=True):
        for _ in range(2):
            torch.testing.assert_close(gradients_of_step(net, x, False)[0], output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tile", [384, 768])
def test_whole_passes_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch, tile: int, autocast: bool) -> None:
    """Four tiles, and one: captured with their halos and retained graphs; also while another forward waits."""
    torch.manual_seed(0)
    model = randomize(create_model("resnet18", num_classes=8, in_channels=1)).cuda().eval()
    x = torch.rand(1, 1, 768, 768, device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(step_checks, "MOST_TILES", 0)
    net = accelerate(copy.deepcopy(model), tile=tile)
    found = [gradients_of_step(net, x, autocast) for _ in range(2)]
    (prepared,) = net._programs
    (passes,) = prepared.whole.values()
    assert not passes.failed
    waiting = net(x * 2)
    found += [gradients_of_step(net, x, autocast) for _ in range(2)]
    waiting.sum().backward()
    found += [gradients_of_step(net, x, autocast) for _ in range(2)]
    monkeypatch.setattr(buffers, "executor", lambda device: None)
    plain = gradients_of_step(accelerate(copy.deepcopy(model), tile=tile), x, autocast)
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))


@pytest.mark.parametrize("live", [False, True])
def test_whole_steps_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    """All that a step does in one graph, with norms folded or a stage each; other forwards between, two backwards."""
    torch.manual_seed(0)
    model = randomize(create_model("resnet18", num_classes=8, in_channels=1)).cuda().train(live)
    x = torch.rand(2, 1, 512, 448, device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    graphs = buffers.executor
    nets = [accelerate(copy.deepcopy(model)) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), 1e-6) for net in nets]  # with more it diverges

    def both(act: Callable[[nn.Module], Any]) -> None:
        found = []
        for net, on in zip(nets, (False, True), strict=True):
            monkeypatch.setattr(buffers, "executor", graphs if on else lambda device: None)
            made = act(net)
            found.append([*(made or []), *(b.clone() for b in net.buffers())])
        pairs = enumerate(zip(*found, strict=True))
        differ = {i: ((a - b).abs().max().item(), tuple(a.shape)) for i, (a, b) in pairs if not torch.equal(a, b)}
        assert not differ

    def twice(net: nn.Module) -> list[torch.Tensor]:
        net.zero_grad(set_to_none=True)
        output = net(x)
        output.square().sum().backward(retain_graph=True)
        output.sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    def waiting(net: nn.Module) -> list[torch.Tensor]:
        net.zero_grad(set_to_none=True)
        first, second = net(x), net(x * 2)
        (first.square().sum() + second.sum()).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    for number in range(4):
        both(lambda net, n=number: gradients_of_step(net, x * (1 + n), True))
        for optimizer in optimizers:
            optimizer.step()
    (prepared,) = nets[1]._programs
    assert prepared.steps and not prepared.steps[0].failed and prepared.steps[0]._work is not None
    for act in (twice, waiting, twice):
        both(act)
