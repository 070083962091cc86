"""Optimizer state: training commutes with the morph, gradients follow the adjoint rule, the default parts copies."""

from __future__ import annotations

import copy
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from morph_networks import NETWORKS, X, build, doubled, outputs, relative, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.decompose import decompose, insert_module, split_parallel
from gigamorph.engine.morph.deepen import insert_identity
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.head import grow_head, split_class
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.optimizer import gradient_shares, grow_ema, grow_optimizer
from gigamorph.engine.morph.spaces import find_spaces
from gigamorph.engine.morph.step import Report
from gigamorph.engine.morph.widen import WidenStep, widen

LIMIT = 100.0  # times the network's own sensitivity to a relative perturbation of 2^-52 of its parameters


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: Adam(p, lr=3e-3, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=3e-3, weight_decay=0.1, eps=1e-4),
}


def twin(model: nn.Module, optimizer: Optimizer, make: Callable[[Any], Optimizer]) -> tuple[nn.Module, Optimizer]:
    """A copy of both."""
    other = copy.deepcopy(model)
    again = make(other.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, again


def sensitivity(model: nn.Module, optimizer: Optimizer, make: Callable[[Any], Optimizer], side: int = 8) -> float:
    """Change of the outputs after 10 steps if the parameters are changed by 2^-52 of themselves."""
    worst, want = 0.0, None
    for seed in range(4):
        other, again = twin(model, optimizer, make)
        if seed:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in other.parameters():
                    p *= 1 + 2.0**-52 * torch.randint(-1, 2, p.shape, generator=generator).double()
        train(other, again, 10, start=5, side=side)
        if want is None:
            want = outputs(other, side)
        worst = max(worst, relative(outputs(other, side), want))
    return worst


@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(NETWORKS, ("nesterov", "adamw")), *itertools.product(("residual",), ("sgd", "adam"))],
)
def test_training_commutes(name: str, kind: str) -> None:
    """5 steps of the parent, widening, 10 steps of both: the child is still the parent."""
    make, model = OPTIMIZERS[kind], build(name)
    optimizer = make(model.parameters())
    train(model, optimizer, 5)
    groups = "wider" if name == "groups" else "more"
    counts = doubled(model, groups=groups)
    assert counts
    child, report = widen(model, X.double(), counts, split="kraft", groups=groups)
    grown = grow_optimizer(optimizer, model, child, report, lr="commute")
    limit = LIMIT * sensitivity(model, optimizer, make)
    train(model, optimizer, 10, start=5)
    train(child, grown, 10, start=5)
    assert relative(outputs(child), outputs(model)) <= limit < 1e-6
    # The same without the factors or without the state is far off, so that the limit tells them apart.
    plain = make(child.parameters())
    train(child, plain, 2, start=15)
    train(model, optimizer, 2, start=15)
    assert relative(outputs(child), outputs(model)) > 1e-4


# Small ones of real families; all but the first only on request, as for random programs. Not MobileNetV2: in ten steps
# of SGD it turns a relative change of 2^-52 into one of 3e-2, which says nothing of the grown one's equal difference.
REAL: dict[str, dict[str, Any]] = {
    "test_efficientnet": {},
    "test_resnet": {},
    "test_convnext": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "regnety_002": {},
    "convnext_atto": {},
    "resnet10t": {},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in REAL for kind in ("sgd", "adamw")]
    if "GIGAMORPH_PROGRAMS" in os.environ
    else [("test_efficientnet", "adamw")],
)
def test_training_of_real_networks_commutes(name: str, kind: str) -> None:
    """Acceptance A4: SGD with momentum and decay, and AdamW."""
    timm, side = pytest.importorskip("timm"), 32
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **REAL[name]).double()
    rates = {"sgd": {"lr": 1e-3}, "adamw": {"lr": 1e-4}}

    def make(parameters: Any) -> Optimizer:
        optimizer = OPTIMIZERS[kind](parameters)
        for group in optimizer.param_groups:
            group |= rates[kind]
        return optimizer

    optimizer = make(model.parameters())
    train(model, optimizer, 2, side=side)
    x = torch.zeros(1, 3, side, side, dtype=torch.float64)
    child, report = widen(model, x, doubled(model, side=side), split="kraft")
    assert report.parameters[1] > 2 * report.parameters[0]
    grown = grow_optimizer(optimizer, model, child, report, lr="commute")
    limit = LIMIT * sensitivity(model, optimizer, make, side)
    before = outputs(model, side)
    train(model, optimizer, 10, start=5, side=side)
    train(child, grown, 10, start=5, side=side)
    want = outputs(model, side)
    error = relative(outputs(child, side), want)
    print(f"{name} {kind}: {error:.1e}, own sensitivity {limit / LIMIT:.1e}")
    assert error <= limit < 1e-9 and relative(want, before) > 1e-2


def test_training_commutes_with_different_powers() -> None:
    make, model = OPTIMIZERS["adamw"], build("residual")
    optimizer = make(model.parameters())
    train(model, optimizer, 5)
    factors = (1, 2, 4)
    counts = {k: factors[i % 3] * w // 2 for i, (k, w) in enumerate(doubled(model).items())}
    child, report = widen(model, X.double(), counts, split="kraft")
    grown = grow_optimizer(optimizer, model, child, report, lr="commute")
    assert len(grown.param_groups) > 2
    limit = LIMIT * sensitivity(model, optimizer, make)
    train(model, optimizer, 10, start=5)
    train(child, grown, 10, start=5)
    assert relative(outputs(child), outputs(model)) <= limit


@pytest.mark.parametrize("wrong", ["momentum", "rows", "eps", "lr"])
def test_commutation_notices_mistakes(wrong: str) -> None:
    make, model = OPTIMIZERS["adamw"], build("residual")
    optimizer = make(model.parameters())
    train(model, optimizer, 5)
    child, report = widen(model, X.double(), doubled(model), split="kraft")
    grown = grow_optimizer(optimizer, model, child, report, lr="commute")
    for p, state in grown.state.items():
        if wrong == "momentum":
            state["exp_avg"] *= 1.01
        if wrong == "rows" and p.ndim > 1:
            state["exp_avg_sq"] *= 2
    for group in grown.param_groups:
        group["eps"] *= 2 if wrong == "eps" else 1
        group["lr"] *= 1.01 if wrong == "lr" else 1
    train(model, optimizer, 10, start=5)
    train(child, grown, 10, start=5)
    assert relative(outputs(child), outputs(model)) > 1e-7


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 999))
def test_gradients_follow_the_adjoint_rule(name: str, seed: int) -> None:
    """g' = diag(s_o) g[ro][:, ri] for uneven counts, with Kraft shares; so do momenta by construction."""
    model, groups = build(name), "wider" if name == "groups" else "more"
    rng = torch.Generator().manual_seed(seed)
    counts = {}
    for s in find_spaces(copy.deepcopy(model).float(), X, groups=groups).growable():
        counts[s.key] = torch.randint(1, 5, (len(s.order),), generator=rng).tolist()
        if len(s.order) == 1:  # a statistic over channels: its gradient reaches all copies alike
            counts[s.key] = [2 ** (counts[s.key][0] % 3)]
    child, report = widen(model, X.double(), counts, split="kraft", seed=seed, groups=groups)
    for network in (model, child):
        train(network, SGD(network.parameters(), lr=0.0), 1)
    maps = report.step.tensor_maps(copy.deepcopy(model).float())
    theirs = dict(child.named_parameters())
    scale = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for key, p in model.named_parameters():
        want, made = p.grad, maps.get(key)
        assert want is not None
        if made is not None and made.columns is not None and made.columns_axis is not None:
            want = want.index_select(made.columns_axis, made.columns)
        shares = gradient_shares(made, "kraft") if made is not None else None
        if shares is not None and made is not None and made.axis is not None and made.parents is not None:
            want = want.index_select(made.axis, made.parents)
            want = want * shares.reshape([-1 if a == made.axis else 1 for a in range(want.ndim)])
        assert (theirs[key].grad - want).abs().max() <= 1e-10 * scale, key


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.sampled_from(["kraft", "sterbenz"]))
def test_shares_add_up_to_one(counts: list[int], split: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, len(counts), 1), nn.ReLU(), nn.Conv2d(len(counts), 2, 1))
    if len(counts) == 1 or counts == [1] * len(counts):
        return
    _, report = widen(model, X, {"0.weight:0": counts}, split=split)
    made = report.step.tensor_maps(model)["0.weight"]
    shares = gradient_shares(made, split)
    assert shares is not None and made.parents is not None
    totals = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, made.parents, shares)
    assert (totals == 1).all() if split == "kraft" else torch.allclose(totals, torch.ones_like(totals), atol=1e-15)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_plain_keeps_state_and_parts_the_copies(kind: str) -> None:
    make, model = OPTIMIZERS[kind], build("residual")
    optimizer = make(model.parameters())
    train(model, optimizer, 30)
    child, report = widen(model, X.double(), doubled(model))
    grown = grow_optimizer(optimizer, model, child, report)
    assert [g["lr"] for g in grown.param_groups] == [g["lr"] for g in optimizer.param_groups]
    parent_step, child_step, fresh_step = copy.deepcopy(model), copy.deepcopy(child), copy.deepcopy(child)
    pairs = ((parent_step, model, optimizer), (child_step, child, grown))
    before = outputs(model)
    changes = []
    for network, source, state in pairs:
        again = make(network.parameters())
        index = {id(p): i for i, p in enumerate(source.parameters())}
        own = list(network.parameters())
        for p, entries in state.state.items():
            again.state[own[index[id(p)]]] = copy.deepcopy(entries)
        train(network, again, 1, start=30)
        changes.append((outputs(network) - before).reshape(-1))
    train(fresh_step, make(fresh_step.parameters()), 1, start=30)
    changes.append((outputs(fresh_step) - before).reshape(-1))
    kept, reset = (F.cosine_similarity(changes[0], c, dim=0).item() for c in changes[1:])
    assert kept > 0.9 and kept > reset + 0.05  # goes on in the direction in which the parent was going
    rows = child_step.get_parameter("stem.weight").detach()
    assert torch.equal(child.get_parameter("stem.weight")[0], child.get_parameter("stem.weight")[1])
    assert (rows[0] - rows[1]).abs().max() > 1e-6


def test_new_channels_start_without_momentum() -> None:
    model = build("chain")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, 3)
    child, report = widen(model, X.double(), free={"0.weight:0": 2})
    grown = grow_optimizer(optimizer, model, child, report)
    first, second = child.get_parameter("0.weight"), child.get_parameter("3.weight")
    old = optimizer.state[model.get_parameter("3.weight")]
    assert torch.equal(grown.state[second]["exp_avg"][:, :4], old["exp_avg"])
    assert (grown.state[second]["exp_avg"][:, 4:] == 0).all() and (grown.state[first]["exp_avg"][4:] == 0).all()
    assert torch.allclose(grown.state[second]["exp_avg_sq"][:, 4:], old["exp_avg_sq"].mean())
    assert grown.state[first]["step"] == 3
    grown.state[first]["step"] += 1
    assert optimizer.state[model.get_parameter("0.weight")]["step"] == 3  # a copy
    moved = second.detach().clone()
    train(child, grown, 1, start=3)
    assert (second - moved)[:, 4:].abs().max() > 0


def test_groups_names_and_schedules_are_kept() -> None:
    model = build("residual")
    weights = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("stem")]
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    optimizer = SGD([{"params": weights}, {"params": vectors, "weight_decay": 0.0, "lr": 0.01}], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    train(model, optimizer, 2)
    counts = doubled(model)
    child, report = widen(model, X.double(), counts)
    grown = grow_optimizer(optimizer, model, child, report)
    assert [g["param_names"] for g in grown.param_groups] == [g["param_names"] for g in optimizer.param_groups]
    assert [(g["lr"], g["initial_lr"], g["momentum"]) for g in grown.param_groups] == [
        (0.1, 0.1, 0.9),
        (0.01, 0.01, 0.9),
    ]
    own = {id(p) for p in child.parameters()}
    assert all(id(p) in own for g in grown.param_groups for p in g["params"])
    assert "stem.weight" not in grown.param_groups[0]["param_names"]  # it was not trained
    commuting, report = widen(model, X.double(), counts, split="kraft")
    groups = grow_optimizer(optimizer, model, commuting, report, lr="commute").param_groups
    of = {n: g for g in groups for n in g["param_names"]}
    assert of["head.weight"]["lr"] == of["head.weight"]["initial_lr"] == 0.05
    assert of["bn.weight"]["lr"] == 0.02 and of["a.0.weight"]["lr"] == 0.1


def test_other_morphs_keep_the_state_of_what_is_still_there() -> None:
    model = build("chain")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, 3)
    child, report = insert_identity(model, X.double(), "3")
    grown = grow_optimizer(optimizer, model, child, report)
    theirs = dict(child.named_parameters())
    assert "3.weight" not in theirs
    state = grown.state[theirs["3.0.weight"]]
    assert torch.equal(state["exp_avg"], optimizer.state[model.get_parameter("3.weight")]["exp_avg"])
    kept = {id(p) for p in grown.state}
    added = [n for n, p in theirs.items() if id(p) not in kept]
    assert added and all(n.startswith("3.") for n in added)
    assert {id(p) for g in grown.param_groups for p in g["params"]} == {id(p) for p in child.parameters()}
    with pytest.raises(MorphError, match="widening only"):
        grow_optimizer(optimizer, model, child, report, lr="commute")
    train(child, grown, 1)
    with pytest.raises(MorphError, match="before either network is trained"):  # the state would be lost in silence
        grow_optimizer(optimizer, model, child, report)


@pytest.mark.parametrize("morph", ["kernel", "identity"])
def test_a_child_that_was_cast_is_refused(morph: str) -> None:
    net = small()
    child, report = MORPHS[morph](net)
    with pytest.raises(MorphError, match=r"'stem.weight' of the child has other values"):
        grow_optimizer(SGD(net.parameters(), lr=0.1), net, child.bfloat16(), report)


@pytest.mark.parametrize("kind", ["lambda", "one cycle", "cosine", "restarts"])
def test_a_schedule_goes_on_with_the_grown_optimizer(kind: str) -> None:
    makes: dict[str, Callable[[Optimizer], Any]] = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
        "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    }

    def begun() -> tuple[nn.Module, Optimizer, Any]:
        net = small()
        groups = [{"params": net.get_submodule(part).parameters()} for part in ("stem", "block")]
        optimizer = SGD(groups, lr=0.1, momentum=0.9)
        return net, optimizer, makes[kind](optimizer)

    def rates(optimizer: Optimizer, schedule: Any, steps: int) -> list[list[float]]:
        found = []
        for _ in range(steps):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return found

    _, alone, schedule = begun()
    want = rates(alone, schedule, 12)
    net, optimizer, schedule = begun()
    have = rates(optimizer, schedule, 5)
    child, report = widen(net, X, factor=2)
    grown = grow_optimizer(optimizer, net, child, report)
    schedule.optimizer = grown
    assert have + rates(grown, schedule, 7) == want


def test_after_a_merge_what_was_not_folded_keeps_its_state() -> None:
    wide, _ = widen(small(), X, {"stem.weight:0": 8})
    optimizer = Adam(wide.parameters(), lr=0.0)  # copies stay copies
    wide(X).square().mean().backward()
    optimizer.step()
    child, report = merge(wide, X)
    grown = grow_optimizer(optimizer, wide, child, report)
    mine = child.get_parameter("fc.weight")
    assert torch.equal(grown.state[mine]["exp_avg"], optimizer.state[wide.get_parameter("fc.weight")]["exp_avg"])
    assert child.get_parameter("stem.weight") not in grown.state
    assert {id(p) for g in grown.param_groups for p in g["params"]} == {id(p) for p in child.parameters()}


def test_groups_without_parameters_keep_their_place() -> None:
    net = small()
    optimizer = SGD([{"params": []}, {"params": net.parameters(), "lr": 0.2}], lr=0.1)
    for child, report in (widen(net, X, factor=2), MORPHS["identity"](net)):
        grown = grow_optimizer(optimizer, net, child, report)
        rates = [(len(group["params"]), group["lr"]) for group in grown.param_groups]
        assert rates == [(0, 0.1), (len([*child.parameters()]), 0.2)]


def small() -> nn.Module:
    layers = OrderedDict(
        stem=nn.Conv2d(3, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        act=nn.ReLU(),
        block=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(4, 3),
    )
    return nn.Sequential(layers)


MORPHS: dict[str, Callable[[nn.Module], tuple[nn.Module, Report]]] = {
    "head": lambda net: grow_head(net, X, "fc", 5),
    "split_class": lambda net: split_class(net, X, "fc", 1),
    "kernel": lambda net: grow_kernel(net, X, "block.0", 5),
    "decompose": lambda net: decompose(net, X, "block.0", (1, 3), act="ReLU"),
    "parallel": lambda net: split_parallel(net, X, "stem"),
    "stages": lambda net: front(net, X, 2, act="ReLU"),
    "residual": lambda net: front(net, X, 2, "residual"),
    "identity": lambda net: insert_identity(net, X, "block"),
    "module": lambda net: insert_module(net, X, "block.0"),
}
# These stand for nothing of the parent's: they are trained whatever the optimizer had left out.
NEW = {
    "stages": "stem.front.",
    "residual": "stem.front.",
    "identity": "block.1.",
    "module": "block.0.1.",
    "decompose": "block.0.1.",  # the activation between the two layers
}


@pytest.mark.parametrize("morph", MORPHS)
def test_every_parameter_of_the_child_is_in_the_group_of_its_part(morph: str) -> None:
    torch.manual_seed(0)
    net = small()
    child, report = MORPHS[morph](net)
    net(X).square().mean().backward()
    for left_out in ("", "stem", "block", "fc"):
        assert_groups_stay(net, child, report, morph, left_out)


def assert_groups_stay(net: nn.Module, child: nn.Module, report: Report, morph: str, left_out: str) -> None:
    parts = [part for part in ("stem", "bn", "block", "fc") if part != left_out]
    groups = [
        {"params": list(net.get_submodule(part).parameters()), "lr": 10.0 ** -(1 + number)}
        for number, part in enumerate(parts)
    ]
    optimizer = SGD(groups, momentum=0.9)
    state = copy.deepcopy(net.state_dict())
    optimizer.step()  # for its momentum: the weights are still those of which the child was made
    net.load_state_dict(state)
    grown = grow_optimizer(optimizer, net, child, report)
    rates = {id(p): group["lr"] for group in grown.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in grown.param_groups)
    for name, p in child.named_parameters():
        part = name.split(".")[0]
        new = name.startswith(NEW.get(morph, "none"))
        if part != left_out:
            assert rates.get(id(p)) == 10.0 ** -(1 + parts.index(part)) or (new and p.ndim == 3), (name, left_out)
        else:
            assert (id(p) in rates) == new, (name, left_out)
    unmoved = {n for n, p in net.named_parameters() if n in dict(child.named_parameters())}
    for name in unmoved:
        mine = child.get_parameter(name)
        if mine in grown.state and mine.shape == net.get_parameter(name).shape:
            momentum = optimizer.state[net.get_parameter(name)]["momentum_buffer"]
            assert torch.equal(grown.state[mine]["momentum_buffer"], momentum)


def test_a_front_before_the_whole_network_keeps_all_state() -> None:
    class Upsampled(nn.Module):  # goes by the image's own size, so that the front stands before all of it
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.body(x), x.shape[2:])

    net = Upsampled()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(X).square().mean().backward()
    optimizer.step()
    with torch.no_grad():  # equal values, which alone do not tell one norm from the other
        for norm in (net.body[1], net.body[2]):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    child, report = front(net, X, 2, "keep")
    grown = grow_optimizer(optimizer, net, child, report)
    for name, p in net.named_parameters():
        mine = child.get_parameter(f"body.{name}")
        assert torch.equal(grown.state[mine]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]), name


@pytest.mark.parametrize("split", ["kraft", "sterbenz"])
def test_average_of_the_grown_is_the_grown_average(split: str) -> None:
    model = build("depthwise")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    states, wanted = [], None
    counts = doubled(model)
    for step in range(4):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
        child, report = widen(model, X.double(), counts, split=split)
        states.append(child.state_dict())
        wanted = states[0] if wanted is None else {k: (v + states[-1][k]) / 2 for k, v in wanted.items()}
    grown = grow_ema(average, model, child, report)
    assert grown.n_averaged == average.n_averaged and wanted is not None
    have = grown.module.state_dict()
    for key, value in wanted.items():
        assert not have[key].is_floating_point() or relative(have[key], value) < 1e-13, key
    assert not torch.equal(have["project.weight"], states[-1]["project.weight"])
    assert relative(outputs(grown.module), outputs(average.module)) < 1e-12
    grown.update_parameters(child)


def test_average_gets_new_channels_from_the_child() -> None:
    model = build("chain")
    average = copy.deepcopy(model)
    train(model, SGD(model.parameters(), lr=0.1), 2)
    child, report = widen(model, X.double(), free={"0.weight:0": 2})
    grown = grow_ema(average, model, child, report)
    assert torch.equal(grown.get_parameter("0.weight")[4:], child.get_parameter("0.weight")[4:])
    assert torch.equal(grown.get_parameter("0.weight")[:4], average.get_parameter("0.weight"))


def test_refusals() -> None:
    model = build("chain")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    even, uneven = doubled(model), {"0.weight:0": [1, 2, 1, 3]}
    kraft, report = widen(model, X.double(), even, split="kraft")
    with pytest.raises(MorphError, match="always stay equal"):
        grow_optimizer(optimizer, model, kraft, report)
    coupled = Adam(model.parameters(), weight_decay=0.1)
    with pytest.raises(MorphError, match="coupled"):
        grow_optimizer(coupled, model, kraft, report, lr="commute")
    with pytest.raises(MorphError, match="RMSprop: lr='commute'"):
        grow_optimizer(torch.optim.RMSprop(model.parameters()), model, kraft, report, lr="commute")
    with pytest.raises(MorphError, match="not the parent's"):
        grow_optimizer(optimizer, copy.deepcopy(model), kraft, report, lr="commute")
    with pytest.raises(MorphError, match="its own child"):
        grow_optimizer(optimizer, model, copy.deepcopy(model), report, lr="commute")
    with pytest.raises(MorphError, match="unknown"):
        grow_optimizer(optimizer, model, kraft, report, lr="fast")  # pyright: ignore[reportArgumentType]
    for counts in (uneven, {"0.weight:0": 12}):
        child, report = widen(model, X.double(), counts, split="kraft")
        with pytest.raises(MorphError, match=r"copies of channels of '\d.weight'"):
            grow_optimizer(optimizer, model, child, report, lr="commute")
    child, report = widen(model, X.double(), even)
    with pytest.raises(MorphError, match="split='kraft'"):
        grow_optimizer(optimizer, model, child, report, lr="commute")
    with pytest.raises(MorphError, match="other parameters"):
        grow_ema(nn.Linear(2, 2), model, child, report)
    deeper, report = insert_identity(model, X.double(), "3")
    with pytest.raises(MorphError, match="'identity'"):
        grow_ema(copy.deepcopy(model), model, deeper, report)


# Of each optimizer, the largest relative differences of its state that docs/morph.md gives, by the split.
APPROXIMATE: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (partial(torch.optim.SGD, momentum=0.9), {"momentum_buffer": 0.50}),
    "Adam": (partial(torch.optim.Adam, amsgrad=True), {"exp_avg": 0.37, "exp_avg_sq": 0.48, "max_exp_avg_sq": 0.48}),
    "Adamax": (torch.optim.Adamax, {"exp_avg": 0.38, "exp_inf": 0.39}),
    "RMSprop": (
        partial(torch.optim.RMSprop, momentum=0.9, centered=True),
        {"square_avg": 0.64, "momentum_buffer": 1.90, "grad_avg": 0.40},
    ),
    "Adagrad": (torch.optim.Adagrad, {"sum": 0.58}),
    "Adadelta": (torch.optim.Adadelta, {"square_avg": 0.79, "acc_delta": 1.07}),
}
FIRST = {"exp_avg", "grad_avg"}  # means of gradients


def _states(kind: str, split: str) -> tuple[WidenStep, nn.Module, Any, Any, Any]:
    """The step, the child, and the state of the parent's, the grown and the reference optimizer, in float64.

    The reference is the state that the child's optimizer would have, had the network been as wide in all steps.
    """
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double()
    make = APPROXIMATE[kind][0]
    optimizer = make(model.parameters(), lr=1e-2)
    step, reference, wide = None, None, None
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        x, y = torch.randn(8, 1, 10, 10, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator)
        step = step or widen(model, x, factor=2, split=split)[1].step
        assert isinstance(step, WidenStep)
        child, _ = step.grow(step.spaces_of(model))
        F.cross_entropy(child.train()(x), y).backward()
        wide = wide or copy.deepcopy(child)
        reference = reference or make(wide.parameters(), lr=1e-300)
        for p, q in zip(wide.parameters(), child.parameters(), strict=True):
            p.grad = q.grad
        reference.step()
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    child, report = widen(model, x, factor=2, split=split)
    grown = grow_optimizer(optimizer, model, child, report, "commute" if split == "kraft" else "plain")
    assert wide is not None and reference is not None and step is not None
    states = ([o.state[p] for p in m.parameters()] for o, m in ((optimizer, model), (grown, child), (reference, wide)))
    return step, model, *states


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_state_is_exact_with_equal_powers_of_two(kind: str) -> None:
    _, _, _, grown, reference = _states(kind, "kraft")
    for have, want in zip(grown, reference, strict=True):
        for key in APPROXIMATE[kind][1]:
            torch.testing.assert_close(have[key], want[key], rtol=1e-12, atol=1e-15 * float(want[key].abs().max()))


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_state_is_approximate_with_random_shares(kind: str) -> None:
    step, model, parent, grown, reference = _states(kind, "sterbenz")
    maps = step.tensor_maps(model)
    for key, bound in APPROXIMATE[kind][1].items():
        pairs = [(have[key], want[key]) for have, want in zip(grown, reference, strict=True)]
        off = max(float((have - want).abs().max() / want.abs().max()) for have, want in pairs)
        assert 0.8 * bound < off < bound + 0.01, f"docs/morph.md gives {bound:.2f} for {key}"
        if key not in FIRST:
            continue
        for (name, _), old, *states in zip(model.named_parameters(), parent, grown, reference, strict=True):
            made = maps.get(name)
            if made is not None and made.parents is not None and made.columns is None:
                for state in states:  # the sum over the copies of a channel is the parent's
                    total = torch.zeros_like(old[key]).index_add_(made.axis or 0, made.parents, state[key])
                    torch.testing.assert_close(total, old[key], rtol=1e-10, atol=1e-14)
