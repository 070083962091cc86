"""benchmarks/morph_training.py: the run in small, what its checks stop, and the recorded summary."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import morph_training  # noqa: E402

from gigamorph.engine.morph.deepen import insert_residual  # noqa: E402
from gigamorph.engine.morph.widen import widen  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def data() -> morph_training.Digits:
    """A part of the digits, for speed."""
    full = morph_training.load()
    return morph_training.Digits(full.digits[:120], full.labels[:120], full.test_images[:60], full.test_labels[:60])


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((RESULTS / "morph_training.json").read_text())


@pytest.fixture
def parent(data: morph_training.Digits) -> nn.Module:
    torch.manual_seed(0)
    net = morph_training.Net(4)
    morph_training.train(net, torch.optim.AdamW(net.parameters()), 1, data, 0)
    return net


def test_a_run_in_small(data: morph_training.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(morph_training, "load", lambda: data)
    lines: list[str] = []
    result = json.loads(json.dumps(morph_training.run((0,), (2, 1), lines.append), allow_nan=False))
    runs = {"parent", "parent, trained on"} | {
        n for g in morph_training.GROWN for n in (g, *(f"{g}, {r}" for r in morph_training.RIVALS))
    }
    [s] = result["seeds"]
    curves = s["curves"]
    assert len(lines) == len(runs) and set(curves) == runs
    assert {name: curves[name][-1]["epoch"] for name in ("parent", "widened", "deepened")} == {
        "parent": 2,
        "widened": 3,
        "deepened": 3,
    }
    for name in morph_training.GROWN:
        end, rival = curves[name][-1], curves[f"{name}, from scratch, same epochs"][-1]
        assert end["seconds"] > curves["parent"][-1]["seconds"] + s["checks"][name]["seconds"]
        assert rival["epoch"] == end["epoch"]
        assert abs(curves[name][0]["test_loss"] / curves["parent"][-1]["test_loss"] - 1) < 1e-5
    assert len(morph_training.differences(result)) == 8


def test_training_is_deterministic(data: morph_training.Digits) -> None:
    def once() -> list[tuple[Any, ...]]:
        torch.manual_seed(1)
        net = morph_training.Net(4)
        points = morph_training.train(net, torch.optim.AdamW(net.parameters()), 2, data, 5)
        return [(p.epoch, p.train_loss, p.test_loss) for p in points]

    assert once() == once()


def test_a_network_from_scratch_has_the_child_s_shapes_and_none_of_its_weights(parent: nn.Module) -> None:
    child = morph_training.deepened(parent, 0)[-1][0]
    scratch = morph_training.from_scratch(child, 0)
    own, new = dict(child.named_parameters()), dict(scratch.named_parameters())
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in new.items()}
    assert not any(torch.equal(own[n], p) for n, p in new.items() if p.ndim > 1)
    assert all((p == 1).all() for n, p in new.items() if n.endswith(".a"))
    assert all(not b.any() for n, b in scratch.named_buffers() if n.endswith("running_mean"))


def test_the_check_passes_real_morphs(parent: nn.Module, data: morph_training.Digits) -> None:
    wide = morph_training.check(parent, morph_training.widened(parent, 0)[-1][0], data, 0)
    assert wide["jump"] < 1e-5 and wide["tied_filters"][0] > 50 and wide["tied_filters"][1] == 0
    deep = morph_training.check(parent, morph_training.deepened(parent, 0)[-1][0], data, 0)
    assert deep["jump"] == 0 and deep["new_tensors"] == 9  # weight, bias and a of each
    assert min(wide["share_with_gradient"], deep["share_with_gradient"]) > 0.9


def test_the_check_stops_a_jump_of_the_loss(parent: nn.Module, data: morph_training.Digits) -> None:
    child: Any = copy.deepcopy(morph_training.widened(parent, 0)[-1][0])
    with torch.no_grad():
        child.fc.bias[3] += 0.01
    with pytest.raises(RuntimeError, match="jumps"):
        morph_training.check(parent, child, data, 0)


def test_the_check_stops_copies_that_stay_copies(parent: nn.Module, data: morph_training.Digits) -> None:
    child, _ = widen(parent, morph_training.EXAMPLE, factor=2, split="kraft")
    with pytest.raises(RuntimeError, match="still equal"):
        morph_training.check(parent, child, data, 0)


def test_the_check_stops_what_gets_no_gradient(parent: nn.Module, data: morph_training.Digits) -> None:
    blocked, _ = insert_residual(parent, morph_training.EXAMPLE, "stages.0", norm=False)  # the first layer waits a step
    with pytest.raises(RuntimeError, match="no gradient"):
        morph_training.check(parent, blocked, data, 0)
    with pytest.raises(RuntimeError, match="nothing is new"):
        morph_training.check(parent, copy.deepcopy(parent), data, 0)


def test_the_recorded_summary_is_that_of_its_runs(recorded: dict[str, Any]) -> None:
    assert recorded["summary"] == morph_training.summary(recorded["seeds"])
    assert len(recorded["seeds"]) == 3 and recorded["settings"]["epochs"] == list(morph_training.EPOCHS)
    assert recorded["summary"]["largest_jump"] < 1e-5
