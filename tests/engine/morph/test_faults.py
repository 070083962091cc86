"""An error of the engine inside the check surfaces; it does not become a reason why channels cannot grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph import op_rules, tracer
from gigamorph.engine.morph.child_check import ChildCheck
from gigamorph.engine.morph.lookup import Bags, Join, PositionTable, SlabRows
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.parent_run import ParentRun
from gigamorph.engine.morph.planner import plan_growth
from gigamorph.engine.morph.spaces import find_spaces
from gigamorph.engine.morph.tracer import Fault
from gigamorph.engine.morph.widen import widen

X = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Something of every primitive step: linear ops, norms, a mean over channels, data movement, a write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = torch.zeros_like(x)
        y[:, :, 1:], y[:, :, :1] = x[:, :, 1:], 1.0
        x = self.body(torch.nn.functional.max_pool2d(x, 3, 1, 1) + y * y.flip(3))
        return self.head((x * x.mean(1, keepdim=True)).flatten(2).permute(0, 2, 1)).mean(1)


def planted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fail)


STEPS = "elementwise rows statistic linear parameter_label begin _move _setitem constant_vid group_count".split()
LOOKUPS = [(Join, "find"), (SlabRows, "find"), (Bags, "find"), (PositionTable, "find")]
PLACES = [(ChildCheck, step) for step in [*STEPS, "constant_vid", "group_count"]] + [
    (tracer, "output_labels"),
    *LOOKUPS,
]


@pytest.mark.parametrize("owner, name", PLACES)
@pytest.mark.parametrize("kind", [RuntimeError, KeyError, AssertionError])
def test_a_fault_is_no_reason_to_freeze(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, kind: type[Exception]
) -> None:
    net = Net()
    assert find_spaces(net, X).growable()
    planted(monkeypatch, owner, name, kind("planted"))
    for morph in (find_spaces, lambda n, x: widen(n, x, factor=2)):
        with pytest.raises(Fault, match=rf"^'\w+' in (module '\w+'|the model) could not.*{kind.__name__} .*planted"):
            morph(net, X)


@pytest.mark.parametrize("owner, name", [(ParentRun, "elementwise"), (ParentRun, "linear"), (op_rules, "_norm")])
def test_a_fault_in_the_parents_run_is_not_the_networks(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    planted(monkeypatch, owner, name, ValueError("planted"))
    with pytest.raises(Fault, match="ValueError planted; report this"):
        find_spaces(Net(), X)


def test_merge_and_plan_do_not_hide_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    child, _ = widen(net, X, factor=2)
    spaces = find_spaces(net, X)
    assert merge(child, X)[1].changes and len(spaces)

    calls = {"left": 0}
    real = ChildCheck.linear

    def late(self: ChildCheck, *args: Any) -> Any:
        calls["left"] -= 1
        if not calls["left"]:
            raise IndexError("planted")
        return real(self, *args)

    monkeypatch.setattr(ChildCheck, "linear", late)
    for count in (4, 7, 9):  # in finding the spaces, in the proof of the whole, in that of the child
        calls["left"] = count
        with pytest.raises(Fault, match="IndexError planted"):
            merge(child, X)
        assert calls["left"] == 0
    for count in (4, 7):
        calls["left"] = count
        with pytest.raises(Fault, match="IndexError planted"):
            plan_growth(net, X)


class Picky(nn.Module):
    """Its own code refuses another width, by an error of any kind."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.stem, self.head, self.error = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), error

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[1] != 4:
            raise self.error
        return self.head(x)


@pytest.mark.parametrize("error", [KeyError("mine"), AssertionError(), ValueError("mine"), MorphError("mine")])
def test_what_the_network_raises_freezes(error: Exception) -> None:
    space = find_spaces(Picky(error), X)["stem.weight:0"]
    assert "its forward fails at another width" in space.frozen and (str(error) or "AssertionError") in space.frozen
