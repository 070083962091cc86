"""What is told before a run: a budget by which a step would be faster, where planning another is quick."""

import re

import pytest
import torch
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.train.fit import larger_budget

SHAPE = (1, 1, 768, 768)


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def planned(budget):
    net = accelerate(network(), budget)
    return net, net.plan_for(SHAPE)


def test_a_larger_budget_is_told_where_a_step_computes_less_with_it():
    least, found = accelerate(network(), tile=128).plan_for(SHAPE).peak_bytes, 0
    for times in (1, 2, 3, 4, 6):
        net, plan = planned(times * least)
        for line in larger_budget(net, SHAPE, plan):
            form = r"--memory-budget (\d+)MiB would make a step about (\S+) x faster, .*"
            told, faster = re.fullmatch(form, line).groups()
            assert times * least < int(told) * 2**20 <= 4 * times * least
            _, other = planned(int(told) * 2**20)
            assert plan.work / other.work == pytest.approx(float(faster), abs=0.051) and other.fits
            found += 1
    assert found >= 2
    net, plan = planned(2**32)
    assert plan.work < 1.1 and not list(larger_budget(net, SHAPE, plan))
