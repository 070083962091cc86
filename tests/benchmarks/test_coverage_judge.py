"""The census's judgement: rounding is told from errors, tensor by tensor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gigamorph import accelerate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from coverage_judge import judge

LIMIT = 1e-12


class Net(nn.Module):
    """Two paths; one of them, with `rough`, makes its rounding that many times as large."""

    def __init__(self, rough: float = 0.0):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(2, 4, 3, bias=False)
        self.norm, self.rough = nn.BatchNorm2d(4), rough

    def split(self, x: Tensor) -> Tensor:
        return self.coarse(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        coarse = (self.split(x) * (1 + self.rough)).sin()
        fine = self.norm(self.fine(x)).sigmoid() * (1 + self.rough)
        return fine.mean((2, 3)), coarse.square().mean((2, 3))


class OtherOrder(Net):
    """The same sums in another order."""

    def split(self, x: Tensor) -> Tensor:
        first, second = (nn.functional.conv2d(x[:, c : c + 1], self.coarse.weight[:, c : c + 1]) for c in (1, 0))
        return first + second


def judged(rough: float, fast: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net(rough).double().train()
    return judge(model, torch.randn(2, 2, 21, 17, dtype=torch.float64), fast, casts=False, limit=LIMIT)


def off_by(share: float, name: str) -> Any:
    """Makes networks whose parameter has a gradient that is off by a share, by name."""

    def make(twin: Net) -> nn.Module:
        twin.get_parameter(name).register_hook(lambda grad: grad * (1 + share))
        return accelerate(twin, tile=8)

    return make


def reordered(twin: Net) -> nn.Module:
    twin.__class__ = OtherOrder
    return twin


def test_the_engine_is_exact():
    found = judged(0.0, lambda twin: accelerate(twin, tile=8))
    assert found["good"] and found["error"] <= LIMIT and "notes" not in found
    assert set(found["float32"]) == {"outputs", "gradients"} and max(found["float32"].values()) < 10


def test_another_order_of_rough_sums_is_rounding():
    found = judged(1e6, reordered)
    assert found["good"] and found["error"] > LIMIT and "times stock's own noise" in found["notes"]


def test_noise_does_not_excuse_everything():
    """A stock step that moves this much is wrong itself, or its rounding says nothing."""
    found = judged(1e10, reordered)
    assert not found["good"] and found["error"] > 1e-9


def test_an_error_is_no_rounding():
    for rough in (0.0, 1e6):  # the noise of one tensor is no excuse for another
        found = judged(rough, off_by(1e-10, "fine.weight"))
        assert not found["good"] and found["worst"] == "fine.weight" and found["error"] > 9e-11


def test_an_error_of_a_buffer():
    def make(twin: Net) -> nn.Module:
        fast = accelerate(twin, tile=8)
        original = fast.forward

        def forward(x: Tensor) -> Any:
            result = original(x)
            with torch.no_grad():
                twin.norm.running_var.mul_(1 + 1e-9)  # pyright: ignore[reportOptionalMemberAccess]
            return result

        fast.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
        return fast

    found = judged(0.0, make)
    assert not found["good"] and found["worst"] == "norm.running_var"
