"""What stays in memory where each image has another size."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gigamorph import accelerate
from gigamorph.engine.capture import trace
from gigamorph.engine.execution import programs
from gigamorph.engine.tiling.arena import arena


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def step(net: nn.Module, height: int, width: int) -> None:
    net(torch.rand(1, 1, height, width)).sum().backward()


def test_what_a_step_has_left_is_given_back_before_the_next_size_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records and plans came beside it: the memory exceeded its budget by half."""
    found = arena()
    if found is None:
        pytest.skip("no arena")
    net, left = accelerate(network()), []

    def capture(*args: Any, **kwargs: Any) -> Any:
        left.append(found.counts().spare)
        return trace.capture(*args, **kwargs)

    monkeypatch.setattr(programs, "capture", capture)
    step(net, 500, 500)
    assert found.counts().spare > 10 << 20
    step(net, 510, 500)
    assert len(left) == 2 and left[1] == 0


def test_shapes_that_pytorch_remembers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_CACHED_SHAPES", 60)
    net, sizes = accelerate(network(), tile=16), []
    FakeTensorMode.cache_clear()
    for number in range(12):
        step(net, 40 + number, 40)
        sizes.append(len(FakeTensorMode.cache))
    assert max(sizes) < 60 + sizes[0] < sum(sizes)
    assert any(after < before for before, after in itertools.pairwise(sizes))
