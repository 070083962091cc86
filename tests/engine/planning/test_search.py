"""The search finds a fast choice of stored maps without making all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import BudgetError
from gigamorph.engine.capture.program import Program
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.planning import constants, strategy
from gigamorph.engine.planning.plan import Plan
from gigamorph.engine.planning.request import Request
from gigamorph.engine.planning.search import arrange


class Block(nn.Module):
    """An inverted residual block with squeeze and excite: its inner maps are the largest."""

    def __init__(self, width: int, expansion: int, stride: int):
        super().__init__()
        inner, self.short = width * expansion, stride == 1
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.ReLU())
        depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner)
        self.spread = nn.Sequential(depthwise, nn.BatchNorm2d(inner), nn.ReLU())
        self.gate = nn.Conv2d(inner, inner, 1)
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.spread(self.expand(x))
        y = self.project(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())
        return x + y if self.short else y


def network(strides: Sequence[int], expansion: int) -> nn.Sequential:
    blocks = [Block(8, expansion, stride) for stride in strides]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1)).train()


def plan_of(program: Program, budget: int | None) -> Plan:
    return arrange(program, Request(budget, None, True))[1]


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    strides=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=11, max_size=16),
    expansion=st.integers(2, 4),
    share=st.floats(0.12, 0.7),
)
def test_a_sample_of_the_choices_leads_to_the_best_of_all(strides: list[int], expansion: int, share: float) -> None:
    program = capture(network(strides, expansion), (1, 1, 2048, 1536), torch.float32, "cpu")
    budget = int(share * plan_of(program, None).peak_bytes)
    with contextlib.suppress(BudgetError):
        found = plan_of(program, budget)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "SAMPLE", 1000)
            patch.setattr(constants, "IN_ORDER", 1000)
            assert found.work <= 1.02 * plan_of(program, budget).work


def test_long_series_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 30 blocks has about 260 choices."""
    made: list[object] = []
    split = strategy.Divider.split
    monkeypatch.setattr(strategy.Divider, "split", lambda *given: made.append(given) or split(*given))
    program = capture(network([2, *[1] * 29], 3), (1, 1, 2048, 1536), torch.float32, "cpu")
    assert plan_of(program, 1500 << 20).choice > 0
    assert 20 < len(made) < 110
