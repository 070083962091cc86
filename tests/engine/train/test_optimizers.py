"""Optimizers and schedules by name, rates by depth, and the average of the weights."""

import math
from dataclasses import replace

import pytest
import torch
from squares import Squares
from torch import nn

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.optimizers import factor_of, find_optimizer, make_optimizer
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage
from gigamorph.engine.train.statistics import Average

STAGE = Stage("s", 4, 0.1, weight_decay=0.01)


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adamw", {"betas": [0.8, 0.9]}, torch.optim.AdamW),
        ("NAdam", {}, torch.optim.NAdam),
        ("RMSprop", {"alpha": 0.9}, torch.optim.RMSprop),
        ("sgd", {"nesterov": False}, torch.optim.SGD),
        ("timm:lion", {}, None),
        ("timm:lamb", {}, None),
        ("timm:muon", {}, None),
    ],
)
def test_optimizers_by_name_decay_weights_alone(name, options, expected):
    made = make_optimizer(net(), replace(STAGE, optimizer=name, optimizer_options=options))
    assert expected is None or type(made) is expected
    assert [(len(g["params"]), g["weight_decay"], g["lr"]) for g in made.param_groups] == [
        (2, 0.01, 0.1),
        (4, 0.0, 0.1),
    ]
    for name, value in options.items():
        assert made.param_groups[0][name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamwx"}, "unknown optimizer 'adamwx'; use one of adadelta"),
        ({"optimizer": "lbfgs"}, "cannot use optimizer 'lbfgs' because it evaluates the loss several times"),
        ({"optimizer": "Muon"}, "optimizer 'Muon' because it accepts only matrices.*; timm:muon flattens"),
        ({"optimizer": "timm:xyzzy"}, r"unknown optimizer 'timm:xyzzy'; timm has \d+; see .*list_optimizers"),
        ({"optimizer": "timm:lamp"}, r"unknown optimizer 'timm:lamp'; timm has \d+; did you mean lamb, "),
        ({"optimizer": "rprop"}, "'rprop' has no weight decay"),
        ({"optimizer_options": {"beta": 1}}, "cannot make optimizer 'adam' with beta=1: .*unexpected keyword"),
        ({"optimizer_options": {"weight_decay": 1}}, "cannot set weight_decay in the options .*; set optimizer.weight"),
        ({"optimizer_options": {"lr": 1}}, "cannot set lr in the options of .*; set optimizer.lr"),
    ],
)
def test_optimizers_that_cannot_be(change, message):
    with pytest.raises(GigamorphError, match=message):
        make_optimizer(net(), replace(STAGE, **change))


def test_every_optimizer_of_torch_that_is_named_can_be_found():
    with pytest.raises(GigamorphError) as caught:
        find_optimizer("?")
    names = str(caught.value).partition("use one of ")[2].partition(", or timm")[0].split(", ")
    assert "muon" not in names
    assert len(names) > 8 and all(find_optimizer(name).__name__.lower() == name for name in names)


def test_rates_by_depth():
    made = make_optimizer(net(), replace(STAGE, layer_decay=0.5, rates=(("4.bias", 7.0),)))
    model = net()
    names = [name for name, _ in model.named_parameters()]
    made = make_optimizer(model, replace(STAGE, layer_decay=0.5, rates=(("4.bias", 7.0),)))
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found == dict(zip(names, (0.025, 0.025, 0.05, 0.05, 0.1, 7.0), strict=True))


def stepped(make, steps, every):
    """What PyTorch itself makes of the stage's rate, as a share of it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=STAGE.lr)
    scheduler, found = make(optimizer), []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / STAGE.lr)
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return found


S = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("name", "options", "make", "every"),
    [
        ("StepLR", {"step_size": 2}, lambda o: S.StepLR(o, 2), 3),
        ("multisteplr", {"milestones": [1, 3]}, lambda o: S.MultiStepLR(o, [1, 3]), 3),
        ("ExponentialLR", {"gamma": 0.5}, lambda o: S.ExponentialLR(o, 0.5), 3),
        ("CosineAnnealingLR", {}, lambda o: S.CosineAnnealingLR(o, 4), 3),
        ("PolynomialLR", {"power": 2}, lambda o: S.PolynomialLR(o, 4, 2), 3),
        ("OneCycleLR", {}, lambda o: S.OneCycleLR(o, 0.1, 12, cycle_momentum=False), 1),
        # Rates among the options are rates, as in PyTorch, and no shares of the stage's.
        ("CosineAnnealingLR", {"eta_min": 0.01}, lambda o: S.CosineAnnealingLR(o, 4, 0.01), 3),
        ("OneCycleLR", {"max_lr": 0.3}, lambda o: S.OneCycleLR(o, 0.3, 12, cycle_momentum=False), 1),
        (
            "CyclicLR",
            {"base_lr": 0.02, "max_lr": 0.2, "step_size_up": 2},
            lambda o: S.CyclicLR(o, 0.02, 0.2, 2, cycle_momentum=False),
            1,
        ),
    ],
)
def test_schedules_of_torch_are_torchs_in_any_order_of_asking(name, options, make, every):
    stage = replace(STAGE, schedule=name, schedule_options=options, warmup=0.0)
    factor, expected = factor_of(stage, 3), stepped(make, 12, every)
    assert [factor(step) for step in range(12)] == pytest.approx(expected, rel=1e-12)
    assert factor(2) == pytest.approx(expected[2], rel=1e-12)
    assert factor_of(stage, 3)(7) == pytest.approx(expected[7], rel=1e-12)  # as after resuming


def test_own_schedules_and_timms_and_their_warm_up():
    assert [factor_of(replace(STAGE, schedule="constant"), 5)(step) for step in (0, 19)] == [1.0, 1.0]
    linear = factor_of(replace(STAGE, schedule="linear", warmup=0.25), 5)
    assert [linear(step) for step in (0, 4, 5, 10, 20)] == pytest.approx([0.2, 1.0, 1.0, 2 / 3, 0.0])
    cosine = factor_of(replace(STAGE, schedule="cosine"), 5)
    assert cosine(0) == 0.5 and cosine(11) == pytest.approx(0.5)
    timm = factor_of(replace(STAGE, schedule="timm:cosine", warmup=0.1), 5)
    assert timm(0) == 0.5 and timm(10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    floor = factor_of(replace(STAGE, schedule="timm:cosine", schedule_options={"min_lr": 0.01}, warmup=0.0), 5)
    assert floor(19) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 19 / 20)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosinus"}, "unknown schedule 'cosinus'; use one of constant, cosine, linear, ConstantLR"),
        ({"schedule": "StepLR"}, "cannot make schedule 'StepLR' with no options: .*step_size"),
        ({"schedule": "LambdaLR"}, "unknown schedule"),
        ({"schedule": "timm:plateau"}, "cannot make schedule 'timm:plateau' with no options"),
        ({"schedule": "cosine", "schedule_options": {"T_max": 3}}, "has no options; remove T_max"),
        ({"warmup": 1.0}, "warmup must be a fraction of the steps, at least 0 and below 1, not 1.0"),
    ],
)
def test_schedules_that_cannot_be(change, message):
    with pytest.raises(GigamorphError, match=message):
        factor_of(replace(STAGE, **change), 3)


def test_average_of_weights_by_hand():
    model = nn.Linear(2, 1).double()
    average, expected = Average(model, 0.9), model.weight.detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            model.weight += step
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    raw = model.weight.detach().clone()
    with average.swapped():
        assert torch.allclose(model.weight, expected, rtol=1e-14)
    assert torch.equal(model.weight, raw)


def test_the_average_is_what_is_scored_and_kept_and_survives_a_kill(tmp_path):
    stages = [Stage("all", 3, 3e-2, batch_size=3, average=0.8)]
    whole, killed = Squares(), Squares(fail_at=7)
    run_stages(whole, stages, Run(tmp_path / "whole", seed=4))
    last, best = (load_checkpoint(tmp_path / "whole" / name) for name in ("last.ckpt", "best.ckpt"))
    assert last["gigamorph"]["average"]["steps"] == 9
    weights = {name.removeprefix("net."): value for name, value in best["state_dict"].items()}
    assert all(torch.equal(value, weights[name]) for name, value in whole.module.state_dict().items())
    if best["gigamorph"]["state"]["epoch"] == 3:
        kept = last["gigamorph"]["average"]["values"]
        assert all(torch.equal(kept[name], weights[name]) for name in kept)
    assert any(not torch.equal(weights[name.removeprefix("net.")], value) for name, value in last["state_dict"].items())
    with pytest.raises(RuntimeError, match="killed"):
        run_stages(killed, stages, Run(tmp_path / "parts", seed=4))
    run_stages(again := Squares(), stages, Run(tmp_path / "parts", seed=4, resume=True))
    assert all(torch.equal(value, weights[name]) for name, value in again.module.state_dict().items())
