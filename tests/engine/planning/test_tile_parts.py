"""Training steps of one stage in parts: less memory than any tile of all layers, the same numbers."""

import copy
import re
import sys

import pytest
import torch
from exactness import LIMIT, randomize, step, step_errors
from torch import nn

from gigamorph import accelerate, create_model, plan
from gigamorph.engine.accelerate import freeze_batch_norm
from gigamorph.engine.capture.program import Program
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.errors import BudgetError
from gigamorph.engine.execution.programs import Programs
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.planning.strategy import strategies

PLAN = sys.modules["gigamorph.engine.planning.search"]  # the package's attribute of that name is the function
SIZE = (1024, 832)


def frozen(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = randomize(create_model(name, num_classes=2, in_channels=1).train())
    freeze_batch_norm(net)
    return net


def least(net: nn.Module) -> int:
    """The budget that a training step is told to need, in bytes."""
    budget = "1MiB"
    for _ in range(4):  # what there is without any tile, then what tiles need
        try:
            return plan(net, SIZE, budget).budget or 0
        except BudgetError as refusal:
            budget = " ".join(re.split("at least|alone need", str(refusal))[1].split()[:2]).strip(",")
    raise AssertionError(budget)


def choices(program: Program, kind: str) -> list:
    for value in program.values:
        value.device = torch.device(kind)
    return list(strategies(*sort(program), True, False))


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_frozen_norms_need_hardly_more_than_those_of_the_whole_image(name: str) -> None:
    """They are to save memory, and needed more than twice as much: all layers were one stage."""
    program = capture(frozen(name), (1, 1, *SIZE), torch.float32, "cpu")
    assert len(choices(program, "cuda")) == 1  # nothing of parts was measured there
    first, *parts = choices(program, "cpu")
    assert len(first.staged.stages) == 1 and len({len(part.staged.stages) for part in parts}) > 3
    assert all(part.staged.place == "disk" and part.cost > first.cost for part in parts)
    live = create_model(name, num_classes=2, in_channels=1).train()
    assert least(frozen(name)) < 1.25 * least(live)


@pytest.mark.parametrize("name", ["resnet18?width=8", "unet?width=4"])
def test_parts_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = frozen(name).double()
    image = torch.randn(2, 1, 131, 150, dtype=torch.float64)
    expected, tiled = step(net, image), accelerate(copy.deepcopy(net), tile=(32, 40))
    for number in (1, 4, -1):
        monkeypatch.setattr(PLAN, "strategies", lambda *given, n=number: [list(strategies(*given))[n]])
        tiled._runner.programs = Programs()  # the same recording is planned again
        assert max(step_errors(expected, step(tiled, image)).values()) <= LIMIT
        (prepared,) = tiled._runner.programs
        assert len(prepared.stages) > 1 and prepared.plan.maps == "disk"
