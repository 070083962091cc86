"""Stored maps in the host's memory and in files, on a GPU."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from exactness import step, step_errors

from gigamorph import accelerate
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.planning.strategy import every_strategy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PLAN = sys.modules["gigamorph.engine.planning.search"]  # the package's attribute of that name is the function


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_maps_elsewhere_are_exact(place: str, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:

    def choose(*args):
        found = (s for s in every_strategy(*args) if s.staged.place == place and bool(s.staged.segments) == ranges)
        return [next(found)]

    monkeypatch.setattr(PLAN, "strategies", choose)
    net = resnet18(width=8, in_channels=1).double().cuda().train()
    image = torch.randn(2, 1, 193, 161, dtype=torch.float64, device="cuda")
    fast = accelerate(copy.deepcopy(net), tile=64)
    assert max(step_errors(step(net, image), step(fast, image)).values()) < 1e-12
