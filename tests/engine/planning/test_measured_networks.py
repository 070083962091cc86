"""The memory of networks, measured, is what was predicted, and kept to; to all but ResNet-18 no constant was fitted."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from forked import Forked
from measured import measure, own_bytes
from torch import nn

ROWS = [  # network, norms in training or inference, budget
    ("resnet18", "frozen", 420_000_000),
    ("mobilenetv3_large_100", "live", 343_000_000),
    ("regnety_004", "inference", 64_000_000),
]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("name", "mode", "budget"), ROWS)
def test_predicted_is_measured_and_budgets_are_kept(name: str, mode: str, budget: int) -> None:
    """Each in a process of its own: in one after another the heap has room from those before."""
    process = Forked(measure, name, mode, budget)
    assert process.wait() == 0, process.error
    measured, predicted = json.loads(process.output)
    assert measured <= 1.05 * budget
    assert 0.88 <= predicted / measured <= 1.12, (predicted, measured)


def test_what_a_network_holds_is_with_masks_that_are_not_saved() -> None:
    net = nn.Linear(3, 2)
    net.register_buffer("mask", torch.zeros(50), persistent=False)
    assert own_bytes(net) == 4 * (3 * 2 + 2 + 50)
