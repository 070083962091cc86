"""Merging: the round trip through widening is exact bit for bit, and only what is proved to be a copy is folded."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from morph_networks import NETWORKS, X, build, doubled, outputs, relative, train
from morph_programs import Program, programs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models import resnet
from gigamorph.engine.morph.fold import add_columns
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.optimizer import grow_optimizer
from gigamorph.engine.morph.spaces import GROUPS, find_spaces
from gigamorph.engine.morph.splits import SPLITS
from gigamorph.engine.morph.step import Report, Step, from_json, to_json
from gigamorph.engine.morph.widen import widen

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
PROGRAMS = int(os.environ.get("GIGAMORPH_PROGRAMS", 12))
REORDERS = ("flip", "shuffle", "chunk", "gate")  # a class may lie on its tensors in different orders
tally = {"seen": 0, "merged": 0}


def random_counts(model: nn.Module, seed: int, most: int = 4, groups: str = "more") -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    x = X.to(next(model.parameters()).dtype)
    return {
        s.key: torch.randint(1, most + 1, (len(s.order),), generator=generator).tolist()
        for s in find_spaces(model, x, groups=groups).growable()
    }


def read_again(report: Report) -> Step:
    """The step after a round trip through JSON."""
    return from_json(json.loads(json.dumps(to_json(report.step))))


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """The same weights, bit for bit, and the same sizes in the modules' attributes."""
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key
    assert repr(first) == repr(second)


def scrambled(network: nn.Module, seed: int) -> nn.Module:
    """Random statistics and scales, so that no two channels agree in them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*network.parameters(), *network.buffers()]:
            if t.is_floating_point() and t.ndim == 1:
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return network.eval()


@settings(max_examples=7, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(
    st.sampled_from([*sorted(NETWORKS), "groups"]),
    st.integers(0, 999),
    st.sampled_from(SPLITS),
    st.booleans(),
    st.lists(st.sampled_from(GROUPS), min_size=2, max_size=2),
)
def test_round_trip_is_exact(name: str, seed: int, split: str, double: bool, groups: list[str]) -> None:
    """Random counts, twice over: the merged network is the parent, weights and all."""
    first, second = groups
    parent = scrambled(build(name), seed)
    parent = parent if double else parent.float()
    x = X.to(next(parent.parameters()).dtype)
    child, _ = widen(parent, x, random_counts(parent, seed, groups=first), split=split, seed=seed, groups=first)
    try:
        counts = random_counts(child, seed + 1, 2, second)
        wider, _ = widen(child, x, counts, split=split, seed=seed, groups=second)
    except MorphError:
        wider = child
    if wider.state_dict().keys() and all(
        a.shape == b.shape for a, b in zip(wider.parameters(), parent.parameters(), strict=True)
    ):
        return  # all counts were one
    before = copy.deepcopy(wider.state_dict())
    merged, report = merge(wider, x)
    assert all(torch.equal(v, before[k]) for k, v in wider.state_dict().items())
    assert report.certificate is not None and report.certificate.violations == 0 and report.changes
    assert_same(merged, parent)
    with pytest.raises(MorphError, match="nothing to merge"):
        merge(merged, x)


@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=QUIET)
@given(programs(), st.integers(0, 99), st.sampled_from(SPLITS))
def test_random_programs(program: Program, seed: int, split: str) -> None:
    """Sound; and exactly the parent, where no channels are reordered."""
    parent = program.build().double()
    tally["seen"] += 1
    reorders = any(kind in REORDERS for kind, _, _ in program.lines)
    try:
        child, report = widen(parent, X.double(), random_counts(parent, seed, 3), split=split, seed=seed)
    except MorphError:
        return
    grown = len(report.changes)
    try:
        merged, report = merge(child, X.double())
    except MorphError as error:
        assert not grown or reorders, error
        return
    tally["merged"] += 1
    if not reorders:
        assert_same(merged, parent)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        assert relative(merged(x), child(x)) < 1e-9


def test_many_programs_are_merged() -> None:
    """The properties above are not empty."""
    if tally["seen"] >= 12:
        assert tally["merged"] >= 0.3 * tally["seen"]


def test_resnet() -> None:
    torch.manual_seed(0)
    parent = scrambled(resnet.resnet18(num_classes=3, width=8), 1)
    x = torch.zeros(1, 3, 32, 32)
    child, _ = widen(parent, x, factor=1.3)
    merged, report = merge(child, x)
    assert_same(merged, parent)
    assert report.parameters[1] < report.parameters[0]


def test_groups_that_got_wider_are_merged() -> None:
    parent = scrambled(build("groups").float(), 2)
    child, _ = widen(parent, X, factor=2, groups="wider")
    merged, report = merge(child, X)
    assert_same(merged, parent)
    assert "wider" in report.step.groups
    again = read_again(report).repeat(child)
    assert repr(again) == repr(parent)


def test_embeddings_are_merged() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patches, self.norm, self.head = nn.Conv2d(3, 4, 4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
            self.token, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
            return self.head(self.norm(x)[:, 0])

    parent = Tokens()
    child, _ = widen(parent, X, factor=3)
    merged, _ = merge(child, X)
    assert_same(merged, parent)


def test_a_norm_over_concatenated_maps_is_merged() -> None:
    """Swin's patch merging: each channel lies on the norm's vectors in four places that are far apart."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm, self.mix = nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Linear(4, 4)
            self.wide, self.down, self.head = nn.LayerNorm(16), nn.Linear(16, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).permute(0, 2, 3, 1)
            x = x + self.mix(self.norm(x))
            x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], 3)
            return self.head(torch.relu(self.down(self.wide(x))).mean((1, 2)))

    parent = scrambled(Merging(), 1)
    child, report = widen(parent, X, {"stem.weight:0": 12, "down.weight:0": 9})
    assert child.wide.weight.shape == (48,) and len(report.changes) == 2
    merged, report = merge(child, X)
    assert_same(merged, parent)
    assert sorted(report.changes) == ["space 0 (stem.weight:0): 12 -> 4", "space 1 (down.weight:0): 9 -> 6"]
    again = read_again(report).repeat(child)
    assert repr(again) == repr(parent)


def test_tied_channels_of_a_space_that_cannot_grow_are_merged() -> None:
    """A shuffle of an even number of channels: whether the space is found free depends on the widths that are tried."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Conv2d(3, 9, 1), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x, self.a(x)], 1)
            n, c, h, w = x.shape
            return self.head(torch.relu(self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))))

    parent = Shuffled()
    child, _ = widen(parent, X, {"a.weight:0": 21, "b.weight:0": 6})
    assert "'view'" in find_spaces(child, X)["a.weight:0"].frozen
    merged, _ = merge(child, X)
    assert_same(merged, parent)


def test_tied_training_can_be_undone() -> None:
    """A child that was trained with commuting rates is folded back to a network that computes the same."""
    model = build("residual")
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, 3)
    child, report = widen(model, X.double(), doubled(model), split="kraft")
    train(child, grow_optimizer(optimizer, model, child, report, lr="commute"), 1)
    try:
        merged, report = merge(child, X.double())
    except MorphError:  # rounding of sums in another order has parted the copies
        rows = child.get_parameter("stem.weight")
        assert not torch.equal(rows[0], rows[1])
        return
    assert relative(outputs(merged), outputs(child)) < 1e-12


def test_copies_in_any_order() -> None:
    """Copies appended at the end, as other tools do it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    scrambled(net, 3)
    order = torch.tensor([0, 1, 2, 3, 4, 2, 0])
    wide = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 2, 1)).eval()
    state = net.state_dict()
    for key, value in state.items():
        if key.startswith(("0", "1")) and value.ndim:
            state[key] = value[order]
    state["3.weight"] = state["3.weight"][:, order] * torch.tensor([0.25, 1, 0.5, 1, 1, 0.5, 0.75])[:, None, None]
    wide.load_state_dict(state)
    merged, report = merge(wide, X)
    assert report.certificate is None or report.certificate.violations == 0
    assert torch.equal(merged[0].weight, net[0].weight) and torch.equal(merged[1].running_var, net[1].running_var)
    assert torch.allclose(merged[3].weight, net[3].weight, rtol=1e-6)


@pytest.mark.parametrize("key", ["1.running_mean", "1.running_var", "1.weight", "1.bias", "0.weight", "0.bias"])
def test_a_difference_anywhere_parts_channels(key: str) -> None:
    torch.manual_seed(0)
    net = scrambled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), 3)
    child, _ = widen(net, X, {"0.weight:0": [2, 1, 1, 1]})
    merge(child, X)
    with torch.no_grad():
        value = child.state_dict()[key].reshape(5, -1)
        value[0, 0] = torch.nextafter(value[0, 0], torch.tensor(9.0))
    with pytest.raises(MorphError, match="nothing to merge"):
        merge(child, X)


class Softmax(nn.Module):
    """Softmax over channels: equal ones cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.softmax(self.a(x), 1))


def test_equal_channels_that_are_no_copies_stay() -> None:
    net = Softmax()
    with torch.no_grad():
        net.a.weight[1], net.a.bias[1] = net.a.weight[0], net.a.bias[0]
    with pytest.raises(MorphError, match="would change the function"):
        merge(net, X)
    uneven = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        uneven[0].weight[1], uneven[0].bias[1] = uneven[0].weight[0], uneven[0].bias[0]
    before = copy.deepcopy(uneven.state_dict())
    with pytest.raises(MorphError, match="would change the function"):
        merge(uneven, X)
    assert all(torch.equal(v, before[k]) for k, v in uneven.state_dict().items())


def test_what_cannot_be_folded_does_not_keep_the_rest() -> None:
    net = scrambled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)), 2)
    with torch.no_grad():
        for t in (net[0].weight, net[0].bias, net[1].weight, net[1].bias):
            t[1] = t[0]
    child, _ = widen(net, X, {"2.weight:0": [1, 3, 1, 2, 1]})
    merged, report = merge(child, X)
    assert_same(merged, net)
    assert len(report.changes) == 1


def test_rounded_sums_are_said() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    child, _ = widen(net, X, {"0.weight:0": 8})
    with torch.no_grad():
        child[2].weight.mul_(1.1)
    merged, report = merge(child, X)
    assert report.certificate is None and "rounded" in report.changes[-1]
    assert torch.allclose(merged[2].weight, net[2].weight * 1.1)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_sums_are_exact_in_any_order(copies: int, seed: int) -> None:
    """Parts of very different size whose sum is a float64: plain summation misses it."""
    generator = torch.Generator().manual_seed(seed)
    want = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    big = torch.randn(3, copies, generator=generator, dtype=torch.float64) * 1e8
    parts = torch.cat([want, big, -big], 1)[:, torch.randperm(2 * copies + 1, generator=generator)]
    columns = torch.zeros(2 * copies + 1, dtype=torch.int64)
    have, certificate = add_columns(parts, columns, 1)
    assert torch.equal(have, want) and certificate.violations == 0 and certificate.entries == 3


def test_shared_parameters_stay_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
            self.again = self.conv

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.head(self.again(torch.relu(self.conv(x)) + x) + x)

    torch.manual_seed(0)
    net = Twice().double()
    child, _ = widen(net, X.double(), random_counts(net, 1))
    merged, _ = merge(child, X.double())
    assert_same(merged, net)
    assert merged.again is merged.conv


def test_step_rebuilds_the_architecture() -> None:
    net = scrambled(build("layernorm"), 1)
    child, _ = widen(net, X.double(), random_counts(net, 2))
    merged, report = merge(child, X.double())
    fresh = copy.deepcopy(child)
    for p in fresh.parameters():
        nn.init.normal_(p)
    shape = read_again(report).repeat(fresh)
    shape.load_state_dict(merged.state_dict())
    assert_same(shape, merged)
    with pytest.raises(MorphError):
        report.step.repeat(net)


def test_in_place() -> None:
    net = scrambled(build("depthwise"), 1)
    child, _ = widen(net, X.double(), random_counts(net, 5))
    same, _ = merge(child, X.double(), inplace=True)
    assert same is child
    assert_same(child, net)
