"""Two forwards before one backward, with maps that are computed again: statistics and buffers move on in between."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from exactness import LIMIT, errors, plan_again, randomize, take_state
from split_image import network
from sync_norms import with_segments
from torch import Tensor, nn

from gigamorph import accelerate

PLAN = sys.modules["gigamorph.engine.planning.search"]


def instance() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return randomize(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            norm,
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.AdaptiveAvgPool2d(1),
        ).double()
    )


def two_forwards(model: nn.Module, images: list[Tensor]) -> dict[str, Any]:
    torch.stack([model(x).square().sum() for x in images]).sum().backward()
    found: dict[str, Any] = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return (
        found | {name: b.clone() for name, b in model.named_buffers()} | {str(n): x.grad for n, x in enumerate(images)}
    )


@pytest.mark.parametrize("name", ["live", "cumulative", "excite, live", "instance"])
def test_two_forwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With maps stored, and computed again."""
    model = instance().train() if name == "instance" else network(name)
    fast = accelerate(copy.deepcopy(model), tile=11)
    images = [torch.randn(2, 2, 37, size, dtype=torch.float64) + size for size in (29, 29, 41)]
    stock = two_forwards(copy.deepcopy(model), [x.clone().requires_grad_() for x in images])
    for strategies in (PLAN.strategies, with_segments):
        monkeypatch.setattr(PLAN, "strategies", strategies)
        plan_again(fast)
        take_state(fast, model)
        fast.zero_grad()
        found = two_forwards(fast, [x.clone().requires_grad_() for x in images])
        wrong = {n: e for n, e in errors(stock, found).items() if not e < LIMIT}
        assert not wrong, strategies


def test_a_parameter_changed_in_between_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by stock PyTorch: the gradient would be that of another network."""
    monkeypatch.setattr(PLAN, "strategies", with_segments)
    net = network("live")
    output = accelerate(net, tile=11)(torch.randn(2, 2, 37, 29, dtype=torch.float64))
    with torch.no_grad():
        net.get_parameter("block.two.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
