"""A plan's device, and where the network lies: any two of them go together, also where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gigamorph import plan
from gigamorph.engine.planning import preview
from gigamorph.engine.planning.preview import searching
from gigamorph.engine.planning.request import Request
from gigamorph.engine.tiling.memory import parse_bytes

SIZE, BUDGET = (1, 512, 512), 200 << 20
GPU_LEAST = 96 << 20  # what libraries take on any GPU


def network() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def on_gpu() -> nn.Module:
    """A network whose tensors lie on a GPU, without values: one need not be here."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    net = network()
    with FakeTensorMode():
        for module in net.modules():
            module._parameters = {
                n: p if p is None else nn.Parameter(moved(p), False) for n, p in module._parameters.items()
            }
            module._buffers = {n: b if b is None else moved(b) for n, b in module._buffers.items()}
    return net


# Gradients of tensors on a GPU need one, so these plans are of inference.
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_plan.py has real tensors there")
@pytest.mark.parametrize(("device", "gpu"), [(None, True), ("cuda", True), ("cpu", False)])
def test_a_network_on_a_gpu_is_recorded_there(device: str | None, gpu: bool) -> None:
    made = plan(on_gpu(), SIZE, BUDGET, tile=128, device=device, training=False)
    assert (made.library_bytes >= GPU_LEAST) == gpu
    assert made == plan(network(), SIZE, BUDGET, tile=128, device="cuda" if gpu else "cpu", training=False)
    with searching(on_gpu(), SIZE, Request(None, (128, 128), False), device=device) as search:
        assert search.plan_or_none(1) is None
        assert replace(search.plan(parse_bytes(BUDGET)), choices=made.choices) == replace(made, stock_bytes=None)


def test_a_network_on_the_cpu_is_recorded_there_for_a_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = plan(network(), SIZE, BUDGET, tile=128, device="cuda")
    monkeypatch.setattr(preview, "is_here", lambda device: True)
    assert plan(network(), SIZE, BUDGET, tile=128, device="cuda") == absent


@pytest.mark.parametrize(("device", "gpu"), [(None, False), ("cuda", True), ("cpu", False)])
def test_a_network_without_values_is_planned_for_any_device(device: str | None, gpu: bool) -> None:
    with torch.device("meta"):
        net = network()
    made = plan(net, SIZE, BUDGET, tile=128, device=device)
    assert (made.library_bytes >= GPU_LEAST) == gpu
    assert made.stock_bytes == plan(network(), SIZE, BUDGET, tile=128, device=device).stock_bytes


def test_autocast_of_the_device_holds_where_the_network_lies() -> None:
    """As in `gigamorph bench`, which asks about a network on the CPU under the GPU's autocast."""
    plain = plan(network(), SIZE, BUDGET, tile=128, device="cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert plan(network(), SIZE, BUDGET, tile=128, device="cuda") == plain, "the CPU's autocast is not the GPU's"
        assert torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        cast = plan(network(), SIZE, BUDGET, tile=128, device="cuda")
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)
    assert cast.stock_bytes is not None and plain.stock_bytes is not None
    assert cast.stock_bytes < 0.8 * plain.stock_bytes and cast.tile_bytes < plain.tile_bytes


def test_a_captured_step_that_stores_all_graphs_recomputes_nothing() -> None:
    """And with less memory, one that recomputes them."""
    net = nn.Sequential(nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24))
    with searching(net, (1, 1, 1024, 1024), Request(None, None, True), device="cuda") as search:
        ample = search.plan(8 << 30)
        assert ample.keeps_graphs and ample.capture_bytes and ample.work == 1
        tight = next(
            plan for share in range(99, 0, -1) if (plan := search.plan(share * ample.peak_bytes // 100)).work > 1
        )
        assert not tight.keeps_graphs and tight.peak_bytes < ample.peak_bytes
