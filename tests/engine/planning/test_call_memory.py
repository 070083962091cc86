"""What calls on whole maps take beside what they read and make, against the tensors of such calls in stock PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.program import Op
from gigamorph.engine.planning.call_memory import CallMemory, call_memory
from gigamorph.engine.planning.simulate import StorageMeter
from gigamorph.engine.versions import release

RELEASE = release(torch.__version__)
SIDE = 256
MAP = 8 * SIDE * SIDE * 4

HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "quantile": lambda y: y.flatten(2).quantile(0.9, dim=2),
    "quantiles": lambda y: y.flatten(1).quantile(torch.tensor([0.1, 0.5]), dim=1).T,
    "topk": lambda y: y.flatten(2).topk(50, 2)[0].mean(2),
    "lp_pool": lambda y: F.lp_pool2d(y, 2, 3, 2).mean((2, 3)),
    "gather": lambda y: y.flatten(2).gather(2, y.mean(1).flatten(1).topk(5, 1)[1][:, None].expand(-1, 8, -1)).mean(2),
}


class Net(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


def calls_of(net: Any, side: int) -> tuple[Any, list[CallMemory]]:
    """What was planned for an image, and what the calls between its stages take."""
    net(torch.rand(1, 1, side, side)).sum().backward()
    (prepared,) = net._runner.programs
    staged, wanted = prepared.staged, prepared.staged.wanted(False)
    steps = (step for step in staged.steps if isinstance(step, Op))
    return prepared, [call_memory(step, staged.program.values, True, wanted) for step in steps]


def allocated(head: Callable[[Tensor], Tensor]) -> int:
    """What the backward of stock makes, all that it reads being there until its end."""
    y = torch.rand(1, 8, SIDE, SIDE, requires_grad=True)
    with StorageMeter() as meter:
        out = head(y).sum()
        before = meter.peak = meter.alive
        out.backward(retain_graph=True)
    return meter.peak - before


@pytest.mark.parametrize("name", [name for name in HEADS if RELEASE > (2, 12) or not name.startswith("quantile")])
def test_as_many_bytes_as_in_stock(name: str) -> None:
    """All that is there at the peak of the backward beside the map: its gradient, and what was not counted before."""
    prepared, found = calls_of(accelerate(Net(HEADS[name]), fallback="untiled"), SIDE)
    y = torch.rand(1, 8, SIDE, SIDE, requires_grad=True)
    with StorageMeter() as meter:
        meter.ignore(y)
        out = HEADS[name](y)
        kept = meter.peak = meter.alive
        out.sum().backward()
    assert sum(one.kept for one in found) == pytest.approx(kept, abs=0.05 * MAP)
    backward = max(one.backward for one in found)
    assert kept + MAP + backward == pytest.approx(meter.peak, rel=0.05)
    assert prepared.plan.stored_bytes >= MAP + meter.peak - 0.05 * MAP
    assert 0.99 * allocated(HEADS[name]) <= prepared.calls_backward <= 1.1 * allocated(HEADS[name])


def test_the_numbers_that_kernels_allocate_inside_are_those_of_the_largest_row() -> None:
    _, found = calls_of(accelerate(Net(HEADS["topk"])), SIDE)
    assert max(one.forward for one in found) == 16 * SIDE * SIDE


def test_inference_is_not_taken_for_training() -> None:
    prepared, training = calls_of(accelerate(Net(HEADS["lp_pool"]), fallback="untiled"), SIDE)
    staged = prepared.staged
    values, wanted = staged.program.values, staged.wanted(False)
    inference = [call_memory(step, values, False, wanted) for step in staged.steps if isinstance(step, Op)]
    assert sum(one.kept for one in training) > 0 == sum(one.kept for one in inference)


@pytest.mark.skipif(RELEASE < (2, 12), reason="PyTorch 2.11 cannot record a quantile")
def test_small_calls_count_for_nothing() -> None:
    prepared, found = calls_of(accelerate(Net(HEADS["quantile"])), 32)
    assert set(found) == {CallMemory()} and prepared.calls_backward == 0
