"""Plans of steps that a GPU captures as a whole."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gigamorph import plan
from gigamorph.engine.cuda_graphs.step_checks import MARGIN
from gigamorph.engine.models import create_model
from gigamorph.engine.planning.plan import Plan

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "gpu_h100.json"
SIDE = 4096


@pytest.fixture(autouse=True)
def autocast(monkeypatch: pytest.MonkeyPatch):
    """That of a GPU which is not here."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def network(live: bool, name: str = "resnet50") -> nn.Module:
    net = create_model(name, num_classes=2, in_channels=1).train()
    for module in net.modules():
        if isinstance(module, _BatchNorm) and not live:
            module.eval()
    return net


def planned(net: nn.Module, budget: int | None = None, side: int = SIDE) -> Plan:
    return plan(net, (1, 1, side, side), budget, device="cuda")


alone = functools.cache(planned)  # without a budget


@pytest.mark.parametrize("row", ["resnet50 train 4096 ours_auto", "resnet50_live train 4096 ours_auto"])
def test_plans_bound_what_an_h100_took(row: str) -> None:
    """From above, by a tenth at most (PyTorch's allocator, with what graphs hold)."""
    measured = json.loads(RESULTS.read_text())["steps"][row]
    taken = measured["peak_bytes"] - measured["left_bytes"] - measured["image_bytes"]
    found = planned(network("live" in row))
    assert found.capture_bytes and list(found.tile) == measured["tile"]
    assert taken <= found.peak_bytes <= 1.1 * taken


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return network(live=False, name="resnet18")


@pytest.mark.parametrize("share", [0.45, 0.62, 0.9])
def test_a_tile_that_is_captured_goes_before_a_larger_one(small: nn.Module, share: float) -> None:
    """Larger ones fit as well, but there a GPU would wait for the host at each op."""
    found = planned(small, int(share * alone(small).peak_bytes))
    assert found.capture_bytes and not found.op_by_op and found.peak_bytes <= found.budget
    assert found.peak_bytes >= MARGIN * found.parts_bytes - 1


def test_many_tiles_are_replayed(small: nn.Module) -> None:
    found = planned(small, 2**31, side=16384)
    assert found.replayed and not (found.capture_bytes or found.op_by_op)
