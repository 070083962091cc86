"""Widening: random programs (sound, complete where it should be, certified, exact on integers), and what it refuses.

    GIGAMORPH_PROGRAMS=10000 python -m pytest -s tests/engine/morph/test_widen.py -k random_programs

tries as many random programs, prints how many were widened, and (without -k) widens more networks.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exactness import randomize
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from morph_networks import build
from morph_programs import BENIGN, LATTICE, Program, programs
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.decompose import decompose
from gigamorph.engine.morph.deepen import insert_identity
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.recipe import Recipe, apply
from gigamorph.engine.morph.spaces import GROUPS, find_spaces
from gigamorph.engine.morph.splits import SPLITS
from gigamorph.engine.morph.step import Report, from_json, to_json
from gigamorph.engine.morph.verify import compare, count_parameters
from gigamorph.engine.morph.widen import WidenStep, widen

X = torch.zeros(1, 3, 8, 8)
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
PROGRAMS = int(os.environ.get("GIGAMORPH_PROGRAMS", 10))  # 10,000 take a quarter of an hour
quiet = settings(deadline=None, suppress_health_check=QUIET)
fast = settings(quiet, max_examples=7)


def draw_counts(model: nn.Module, seed: int, most: int = 3, groups: str = "more") -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    spaces = find_spaces(model, X.to(next(model.parameters()).dtype), groups=groups)
    return {s.key: rng.integers(1, most + 1, len(s.order)).tolist() for s in spaces.growable()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def is_widened(program: Program, seed: int, split: str, free: bool, groups: str) -> bool:
    """False if refused; else equal on a fresh batch of another size in float64, and true if anything grew."""
    model = program.build().double()
    before = copy.deepcopy(model.state_dict())
    try:
        spaces = find_spaces(model, X.double(), groups=groups)
        spaces.check({})  # widening nothing always passes, or its refusals would mean nothing
        rng = np.random.default_rng(seed)
        counts = {s.key: rng.integers(1, 4, len(s.order)).tolist() for s in spaces.growable()}
        extra = {s.key: s.width // len(s.order) for s in spaces.growable()[:1]} if free else None
        child, report = widen(model, X.double(), counts, split=split, seed=seed, free=extra, groups=groups)
    except MorphError as error:
        assert "differs" not in str(error) and "violate" not in str(error), f"the check was deceived: {error}"
        return False
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        assert relative(child(x), model(x)) < 1e-9
    return bool(report.changes)


def test_random_programs_are_never_silently_wrong() -> None:
    outcomes: list[bool] = []

    @settings(quiet, max_examples=PROGRAMS)
    @given(programs(), st.integers(0, 99), st.sampled_from(SPLITS), st.booleans(), st.sampled_from(GROUPS))
    def run(program: Program, seed: int, split: str, free: bool, groups: str) -> None:
        outcomes.append(is_widened(program, seed, split, free, groups))

    run()
    print(f"{len(outcomes)} programs, {sum(outcomes)} widened")
    assert sum(outcomes) > 0.3 * len(outcomes)


def only(*kinds: str) -> st.SearchStrategy[Program]:
    line = st.tuples(st.sampled_from(kinds), st.integers(0, 9), st.integers(0, 9))
    lines = st.lists(line, min_size=2, max_size=10).map(tuple)
    return st.builds(Program, lines, st.sampled_from(["gap", "flatten"]), st.integers(0, 99))


def benign() -> st.SearchStrategy[Program]:
    return only(*(k for k in BENIGN if k != "grouped")) | only(*(k for k in BENIGN if k != "cat"))


@fast
@given(benign())
def test_benign_programs_can_always_be_doubled(program: Program) -> None:
    """Whatever unites the classes. Not promised: a group of a convolution that reads parts of two concatenated maps."""
    model = program.build()
    spaces = find_spaces(model, X)
    assert {s.frozen for s in spaces if s.frozen} <= {"an output of the network"}
    _, report = widen(model, X, factor=2)
    assert report.difference.float64 < 1e-11
    assert report.certificate is not None and report.certificate.violations == 0 < report.certificate.entries


@fast
@given(only(*LATTICE), st.integers(0, 99), st.sampled_from(GROUPS))
def test_integer_programs_are_equal_to_the_bit(program: Program, seed: int, groups: str) -> None:
    for dtype in (torch.float64, torch.float32):
        model = program.build(integers=True).to(dtype)
        x = torch.randint(-1, 2, (2, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).to(dtype)
        with torch.no_grad():
            want = model(x)
            if want.abs().max() * 2**9 > 2**22:  # partial sums would round
                return
            counts = draw_counts(model, seed, groups=groups)
            child, _ = widen(model, X.to(dtype), counts, split="kraft", groups=groups)
            assert torch.equal(child(x), want)


def times(model: nn.Module, factors: dict[str, int]) -> nn.Module:
    """Each space as many times as wide, in powers of two."""
    spaces = find_spaces(model, X)
    copies = {key: (factor,) * len(spaces[key].order) for key, factor in factors.items()}
    return WidenStep((tuple(X.shape),), copies, {}, "kraft", 0.0, 0, "more").repeat(model)


@settings(quiet, max_examples=7)
@given(benign(), st.randoms(use_true_random=False))
def test_widenings_compose(program: Program, order: random.Random) -> None:
    """One space after the other, in any order, is all at once; by two and by two is by four."""
    model = program.build()
    keys = [s.key for s in find_spaces(model, X).growable()]
    assume(not any("@" in key for key in keys))  # it counts channels, and another space on its axis moves them
    once, single = times(model, dict.fromkeys(keys, 2)), model
    order.shuffle(keys)
    for key in keys:
        single = times(single, {key: 2})
    assert_same(once, single)
    assert_same(times(model, dict.fromkeys(keys, 4)), times(once, dict.fromkeys(keys, 2)))


def assert_same(one: nn.Module, two: nn.Module) -> None:
    states = one.state_dict(), two.state_dict()
    assert repr(one) == repr(two) and states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_counts_widths_and_factor() -> None:
    model = small()
    child, report = widen(model, X, {"0.weight:0": 7})
    assert child[0].weight.shape == (7, 3, 3, 3) and child[0].out_channels == 7 and child[1].num_features == 7
    assert child[3].weight.shape == (6, 7, 3, 3) and child[3].in_channels == 7
    assert report.changes == ["space 0 (0.weight:0): 4 -> 7"]
    child, _ = widen(model, X, {"0.weight:0": [1, 3, 1, 2]})
    assert torch.equal(child[0].weight, model[0].weight[[0, 1, 1, 1, 2, 3, 3]])
    child, _ = widen(model, X, factor=1.5)
    assert child[0].out_channels == 6 and child[3].out_channels == 9 and child[-1].in_features == 9


def small() -> Any:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    "options, why",
    [
        ({"counts": {"0.weight:0": 3}}, "narrower"),
        ({"counts": {"0.weight:0": [1, 2]}}, "needs 4 counts"),
        ({"counts": {"0.weight:0": [1, 2, 0, 1]}}, "at least 1"),
        ({"counts": {"7.weight:0": 4}}, "output of the network"),
        ({"counts": {"nothing": 4}}, "no channel space"),
        ({"factor": 0.5}, "narrower"),
        ({"factor": 2, "split": "thirds"}, "thirds"),
        ({"factor": 2, "groups": "fewer"}, "fewer"),
        ({}, "give counts"),
        ({"free": {"0.weight:0": -1}}, "must be a multiple of 1, not -1"),
    ],
)
def test_bad_requests_change_nothing(options: dict[str, Any], why: str) -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=why):
        widen(model, X, inplace=True, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_norm_over_channels_grows_by_whole_multiples() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with pytest.raises(MorphError, match="steps of 4"):
        widen(model, X, {"0.weight:0": 6})
    child, report = widen(model, X, {"0.weight:0": 12})
    assert child[1].num_channels == 12 and report.difference.float64 < 1e-13


def test_groups_get_more_or_wider() -> None:
    """32x4d to 64x4d, or to 32x8d; depthwise convolutions have nothing inside their groups to copy."""
    model = build("groups").float()
    for groups, want in (("more", (8, 3, 2)), ("wider", (4, 6, 4))):
        child, report = widen(model, X, factor=2, groups=groups)
        assert (child.b.groups, child.b.weight.shape[1], child.b.out_channels // child.b.groups) == want
        assert report.difference.float64 < 1e-13 and report.certificate is not None
        assert report.certificate.violations == 0 < report.certificate.entries
    spaces = find_spaces(model, X, groups="wider")
    assert len(spaces["a.weight:0"].order) == 3 and len(spaces["b.weight:0"].order) == 2
    assert spaces["stem.weight:0"].order != spaces["a.weight:0"].order and len(spaces["stem.weight:0"].order) == 1
    with pytest.raises(MorphError, match="steps of 4"):
        widen(model, X, {"a.weight:0": 18}, groups="wider")
    child, report = widen(model, X, {"a.weight:0": [1, 3, 2], "b.weight:0": [2, 1]}, groups="wider", split="kraft")
    places = torch.tensor([0, 1, 1, 1, 2, 2])
    assert torch.equal(child.n.weight, model.n.weight[(torch.arange(4)[:, None] * 3 + places).reshape(-1)])
    assert child.b.weight.shape == (12, 6, 3, 3) and child.b.in_channels == 24 and child.b.groups == 4
    again = apply(json_recipe(report, model, child), build("groups").float())
    again.load_state_dict(child.state_dict())
    assert compare(child, again, X).float64 == 0
    depthwise = build("depthwise").float()
    one, two = (widen(depthwise, X, factor=2, groups=g)[0].state_dict() for g in ("more", "wider"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def json_recipe(report: Report, model: nn.Module, child: nn.Module) -> Recipe:
    recipe = Recipe()
    recipe.add(report, model, child)
    return Recipe.from_json(recipe.to_json())


def test_free_channels_inside_groups() -> None:
    child, report = widen(build("groups"), X.double(), free={"a.weight:0": 4, "b.weight:0": 8}, groups="wider")
    kept = child.b.weight.reshape(4, 4, 4, 3, 3)[:, :2]  # of each group the last two of four channels are new
    assert not kept[:, :, 3:].any() and kept[:, :, :3].all()
    assert report.difference.float64 < 1e-15


def test_in_place() -> None:
    model = small()
    same, _ = widen(model, X, factor=2, inplace=True)
    assert same is model and model[0].out_channels == 8 and not model[0]._forward_hooks
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 2)


def test_nothing_is_shared_with_the_parent() -> None:
    model = small()
    child, _ = widen(model, X, {"0.weight:0": 5})
    shared = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not shared & {p.data_ptr() for p in [*child.parameters(), *child.buffers()]}


def test_new_channels_add_nothing_and_learn() -> None:
    model = small().double()
    child, report = widen(model, X.double(), free={"0.weight:0": 3}, seed=4)
    assert child[0].out_channels == 7 and not child[3].weight[:, 4:].any() and child[0].weight[4:].std() > 0.01
    assert report.difference.float64 < 1e-15
    child(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert (child[3].weight.grad[:, 4:].abs().amax((0, 2, 3)) > 0).any()


def test_sterbenz_parts_the_copies_in_one_step() -> None:
    model = small().double()
    for split, apart in (("sterbenz", True), ("kraft", False)):
        child, _ = widen(model, X.double(), {"0.weight:0": [2, 2, 2, 2]}, split=split)
        child(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        gradient = child[0].weight.grad
        assert bool((gradient[::2] - gradient[1::2]).abs().max() > 1e-6 * gradient.abs().max()) == apart


def test_noise_keeps_the_function_up_to_rounding() -> None:
    model = small().double()
    child, report = widen(model, X.double(), factor=2, noise=0.5)
    plain, _ = widen(model, X.double(), factor=2)
    assert report.difference.float64 < 1e-13 and report.certificate is None
    assert (child[3].weight - plain[3].weight).abs().max() > 0.01


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.c.weight = self.b.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x)).relu()).mean((2, 3)))

    child, report = widen(Tied(), X, factor=2)
    assert report.difference.float64 < 1e-13 and child.c.weight is child.b.weight


def test_widening_twice() -> None:
    model = small().double()
    once, _ = widen(model, X.double(), factor=2)
    twice, _ = widen(once, X.double(), factor=1.5, seed=3)
    assert twice[0].out_channels == 12 and compare(model, twice, X).float64 < 1e-13


def test_the_step_repeats_the_widening_and_single_tensors() -> None:
    model = small()
    child, report = widen(model, X, {"0.weight:0": 9}, free={"3.weight:0": 2}, seed=7)
    step = from_json(json.loads(json.dumps(to_json(report.step))))
    assert step == report.step and isinstance(step, WidenStep)
    again = step.repeat(model)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in child.state_dict().items())
    fresh = step.repeat(small())
    fresh.load_state_dict(child.state_dict())
    maps = step.tensor_maps(small())
    for name, made in maps.items():
        assert torch.equal(step.grow_tensor(name, model.state_dict()[name], made)[0], child.state_dict()[name])
    assert set(maps) == {k for k, v in child.state_dict().items() if v.shape != model.state_dict()[k].shape}


def test_the_step_of_a_float64_network_repeats() -> None:
    model = small().double()
    child, report = widen(model, X.double(), factor=2)
    recipe = Recipe()
    recipe.add(report, model, child)
    for grown in (report.step.repeat(model), apply(recipe, model)):
        assert grown[0].weight.dtype == torch.float64
        assert all(torch.equal(v, grown.state_dict()[k]) for k, v in child.state_dict().items())
    assert report.step.repeat(small())[0].weight.dtype == torch.float32


def test_following_a_copy_gives_the_same_child(monkeypatch: pytest.MonkeyPatch) -> None:
    from gigamorph.engine.morph import spaces

    model = small()
    plain, _ = widen(model, X, factor=2)
    monkeypatch.setattr(spaces, "_is_off_cpu", lambda _: True)
    child, _ = widen(model, X, factor=2)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in child.state_dict().items())
    assert child[3].in_channels == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_on_a_gpu_stays_there() -> None:
    model = small().cuda()
    child, report = widen(model, X.cuda(), factor=2)
    assert {t.device.type for t in [*model.state_dict().values(), *child.state_dict().values()]} == {"cuda"}
    assert report.difference.float64 < 1e-13
    expected = widen(small(), X, factor=2)[0].state_dict()
    assert all(torch.equal(v.cpu(), expected[k]) for k, v in child.state_dict().items())


# -- networks -----------------------------------------------------------------------------------------------------

# One per family of ops; the others would repeat them, or are lattice networks below.
NETWORKS = "convnextv2_atto ecaresnet26t vit_tiny_patch16_224".split()
MORE_NETWORKS = """eca_resnet33ts hrnet_w18_small dpn48b regnetx_002 regnety_002 efficientnet_b0 inception_v3 dla34
cspresnet50 res2net50_26w_4s skresnet18 ghostnet_100 poolformer_s12 swin_tiny_patch4_window7_224""".split()


# What is repeated less often computes the same.
OPTIONS: dict[str, dict[str, Any]] = {
    "convnextv2_atto": {"depths": (1, 1, 1, 1)},
    "densenet121": {"block_config": (2, 3, 2, 2)},
    "resnet18": {"layers": (1, 1, 1, 1)},
    "mobilenetv2_100": {"depth_multiplier": 0.5},
    "ecaresnet26t": {"layers": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64},
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    size = 128 if name == "inception_v3" else 64  # at 96 its last maps are 1x1: statistics of 4 values magnify rounding
    torch.manual_seed(0)
    if name == "googlenet":
        torchvision = pytest.importorskip("torchvision")
        model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False)
    else:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, pretrained=False, **OPTIONS.get(name, {}))
    return randomize(model).eval(), torch.zeros(1, 3, size, size)


@pytest.mark.parametrize("name", NETWORKS + (MORE_NETWORKS if "GIGAMORPH_PROGRAMS" in os.environ else []))
def test_networks(name: str) -> None:
    model, x = network(name)
    _, report = widen(model, x, factor=1.5)  # random channels get a copy; a LayerNorm's get one each
    assert report.changes
    assert report.difference.float64 <= 1e-12 and report.difference.float64_ratio < 8, report
    assert report.certificate is not None and report.certificate.violations == 0


def lattice(model: nn.Module) -> nn.Module:
    """Small integers everywhere: no operation rounds (acceptance A1)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 2.0**-10
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.zero_()
                module.running_var.fill_(1 - 2.0**-10)
        for p in model.parameters():
            keep = torch.rand(p.shape, generator=generator) < min(1.0, 2 / max(p[0].numel(), 1))
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator) * keep if p.ndim > 1 else torch.ones_like(p))
    return model


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv2_100"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in "densenet121 googlenet regnetx_002".split()],
)
def test_lattice_networks_are_equal_to_the_bit(name: str) -> None:
    model, x = network(name)
    lattice(model)
    x = torch.randint(-1, 2, (1, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).double()
    model.double()
    spaces = find_spaces(model, x)
    rng = np.random.default_rng(2)
    drawn = {s.key: rng.choice([1, 1, 1, 2, 3], len(s.order)).tolist() for s in spaces.growable()}
    free = {key: [i % 7 == 0 for i in range(len(counts))] for key, counts in drawn.items()}
    child, certificate = WidenStep((), drawn, free, "kraft", 0.0, 0, "more").grow(spaces)
    assert certificate.violations == 0 and count_parameters(child) > 1.5 * count_parameters(model)
    for dtype in (torch.float64, torch.float32):
        model, child = model.to(dtype), child.eval().to(dtype)
        with torch.no_grad():
            want = model(x.to(dtype))
            assert want.abs().max() > 0 and torch.equal(child(x.to(dtype)), want)


# -- mutations: each must be stopped by a check -------------------------------------------------------------------


class Shortcut(nn.Module):
    """A residual block with a shortcut of its own, under BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)
        self.shortcut, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.b(self.bn(self.a(x)).relu()) + self.shortcut(x)).relu().mean((2, 3)))


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def mutate(child: Any) -> None:
        tensor = child.state_dict()[name]
        tensor.copy_(change(tensor))

    return mutate


def _later(tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0)


MUTATIONS: dict[str, Callable[[Any], None]] = {
    "split times 1.01": changed("b.weight", lambda t: t * 1.01),
    "rolled statistics": changed("bn.running_var", _later),
    "rolled scale": changed("bn.weight", _later),
    "rows swapped": changed("a.weight", _later),
    "bias dropped": changed("a.bias", torch.zeros_like),
    "columns not split": changed("b.weight", lambda t: t * 2),
    "one wrong entry": changed("b.weight", lambda t: t + 1e-4 * (torch.arange(t.numel()) == 5).view(t.shape)),
    "shortcut forgotten": changed("shortcut.weight", _later),
    "eps dropped": lambda child: setattr(child.bn, "eps", 1e-30),
    "momentum dropped": lambda child: setattr(child.bn, "momentum", 0.2),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_children_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, original = randomize(Shortcut()), WidenStep.fill

    def wrong(step: WidenStep, child: nn.Module, *more: Any) -> Any:
        certificate = original(step, child, *more)
        with torch.no_grad():
            MUTATIONS[name](child)
        return certificate

    counts = {"a.weight:0": [2, 1, 3, 1], "b.weight:0": [1, 2, 1, 1, 3, 2]}
    assert widen(model, X, counts)[1].changes
    monkeypatch.setattr(WidenStep, "fill", wrong)
    with pytest.raises(MorphError, match="differs"):
        widen(model, X, counts)


@pytest.mark.parametrize("kind", ["layer_norm", "response_norm"])
def test_a_discovery_and_a_check_without_the_rule_for_norms_are_stopped(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gigamorph.engine.morph.atoms import Atoms
    from gigamorph.engine.morph.lookup import Bags

    model = Program((("conv1", 0, 3), ("batch_norm", 1, 1), (kind, 2, 2), ("relu", 3, 3)), "gap", 0).build().double()
    unite = Atoms.unite
    monkeypatch.setattr(Atoms, "unite", lambda *a, statistic=False, **o: None if statistic else unite(*a, **o))
    counts = {"parts.0_conv1.weight:0": [1, 1, 3, 1, 2]}
    with pytest.raises(MorphError, match="equal counts"):
        widen(model, X.double(), counts)
    monkeypatch.setattr(Bags, "find", lambda _, rows: torch.arange(len(rows)))
    with pytest.raises(MorphError, match="differs"):
        widen(model, X.double(), counts)


@pytest.mark.parametrize("kind", ["layer_norm", "add", "grouped", "response_norm", "chunk"])
def test_a_discovery_that_unites_and_freezes_nothing_is_never_believed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gigamorph.engine.morph.atoms import Atoms

    monkeypatch.setattr(Atoms, "unite", lambda *_, **__: None)
    monkeypatch.setattr(Atoms, "freeze", lambda *_: None)
    refused = 0
    for seed in range(2):
        lines = (("conv1", 0, seed), ("conv3", 1, 2), (kind, 1, 2), (kind, 2, 1))
        model = Program(lines, "gap", seed).build().double()
        try:
            child, _ = widen(model, X.double(), draw_counts(model, seed))
        except MorphError as error:
            assert "differs" not in str(error)
            refused += 1
            continue
        assert compare(model, child, X).float64 < 1e-10
    assert refused


@pytest.mark.parametrize("morph", ["widen", "kernel", "decompose", "identity", "front"])
def test_channels_last_stays(morph: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    net = net.append(nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    child, _ = {
        "widen": lambda: widen(net, x, factor=2),
        "kernel": lambda: grow_kernel(net, x, "2", 5),
        "decompose": lambda: decompose(net, x, "2"),
        "identity": lambda: insert_identity(net, x, "2"),
        "front": lambda: front(net, x, 2),
    }[morph]()
    weights = [p for p in child.parameters() if p.ndim == 4]
    assert len(weights) > 2 and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
