"""Which maps are stored and which are computed again changes nothing but time and memory."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator

import pytest
import torch
from exactness import FLOOR, LIMIT, Step, compare_each, randomize, step
from grid_modules import MODULES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_net import Program, examples, programs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gigamorph import accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.lowering.stages import Divider, ProgramStage
from gigamorph.engine.models.resnet import resnet18
from gigamorph.engine.planning import lifetimes
from gigamorph.engine.planning.lifetimes import stored_peak
from gigamorph.engine.planning.strategy import (
    Strategy,
    cut_maps,
    program_cost,
    segments_between,
    strategies,
)

PLAN = sys.modules["gigamorph.engine.planning.search"]  # the package's attribute of that name is the function
CHECKS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def sorted_program(net: nn.Module, shape: tuple[int, ...] = (2, 1, 97, 83)):
    return sort(capture(net.double(), shape, torch.float64, "cpu"))


def arbitrary(seed: int):
    """A stand-in for `strategies`: any maps stored, any cuts, any ranges."""

    def choose(maps, nodes, training: bool, _image_grad: bool) -> Iterator[Strategy]:
        dice = random.Random(seed)
        local = [v for node in nodes if hasattr(node, "axes") for v in node.op.outputs]
        cuts = [v for v in local if dice.random() < 0.2]
        drawn = {v for node in nodes if getattr(node, "random", False) for v in node.op.outputs}
        divider = Divider(maps, nodes)
        stored = [v for v in divider.crossing(cuts) if v in cuts or v in drawn or dice.random() < 0.5]
        network = divider.split(stored, cuts)
        if training:
            stages = [n for n, step in enumerate(network.steps) if isinstance(step, ProgramStage)]
            ends = sorted({dice.choice(stages) for _ in range(3)})
            network.segments = [range(a, b) for a, b in zip([stages[0], *ends], ends, strict=False) if b > a]
        yield Strategy("arbitrary", network, 0.0, 0)

    return choose


class Gated(nn.Module):
    """Blocks that reduce maps to rows, columns and grids, one after the other."""

    def __init__(self):
        super().__init__()
        names = "coordinate attention", "pyramid", "strip pooling", "triplet attention"
        self.first = nn.Conv2d(2, 4, 3, 2, 1)
        self.blocks = nn.Sequential(*(MODULES[name]() for name in names))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.blocks(self.first(x))
        return x.mean((2, 3)), F.adaptive_max_pool2d(x, 3), x.amax(3)


def test_rows_columns_and_grids_with_any_maps_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Gated().double()
    image = torch.randn(3, 2, 27, 22, dtype=torch.float64)
    with bias_terms(net) as terms:
        stock = step(net, image)
    changes = [lambda n=n: monkeypatch.setattr(PLAN, "strategies", arbitrary(n)) for n in range(4)]
    for found in compare_each(net, image, changes, tile=(9, 7)):
        assert not wrong(found, stock, terms)


@settings(max_examples=examples(4), **CHECKS)
@given(programs(statistics=True, strips=True), st.integers(0, 10**6))
def test_random_networks_with_strips(program: Program, seed: int) -> None:
    check(program, seed)


@settings(max_examples=examples(5), **CHECKS)
@given(programs(max_steps=12, statistics=True), st.integers(0, 10**6))
def test_random_networks_with_any_maps_stored(program: Program, seed: int) -> None:
    check(program, seed)


def check(program: Program, seed: int) -> None:
    model = program.build()
    image = torch.randn(program.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assume(all(leaf.isfinite().all() for leaf in tree_leaves(model(image))))
    # Norms of maps whose values are all equal: every gradient is rounding.
    with bias_terms(model) as terms:
        stock = step(model, image)
    sizes = [t.norm() for t in (stock.image, *stock.gradients.values()) if t is not None]
    assume(sizes[0] > 1e-6 and max(sizes) < 1e6)
    options = {"tile": program.tile, "halos": program.halos, "inference": sum(image.shape) % 2 == 0}
    with pytest.MonkeyPatch.context() as patch:
        changes = [lambda n=n: patch.setattr(PLAN, "strategies", arbitrary(n)) for n in (seed, seed + 1, seed + 2)]
        for found in compare_each(model, image, changes, **options):
            assert not wrong(found, stock, terms)


def wrong(found: dict[str, float], stock: Step, terms: dict[str, Tensor]) -> dict[str, float]:
    """The errors that are too large, by name.

    The gradient of a bias in front of a norm is zero: its terms cancel, and what is left is rounding of them.
    """
    largest = max((g.norm() for g in stock.gradients.values() if g is not None), default=0.0)
    for name, size in terms.items():
        gradient = stock.gradients[name]
        if gradient is not None and gradient.norm() < 1e-12 * size:
            found[name] *= float(max(gradient.norm(), FLOOR * largest) / size)
    return {name: error for name, error in found.items() if not error <= 1e-12}


@contextlib.contextmanager
def bias_terms(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By name of a bias, the absolute values of the terms of its gradient added up, of the steps run meanwhile."""
    terms: dict[str, Tensor] = {}

    def look(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: terms.update({name: terms.get(name, 0) + grad.abs().sum()}))

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=f"{name}.bias": look(name, output))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), Tensor)
    ]
    yield terms
    for hook in hooks:
        hook.remove()


class Unet(nn.Module):
    """Skip connections that live long, and a dense output."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([self.block(1, 4), self.block(4, 6), self.block(6, 8)])
        self.up = nn.ModuleList([self.block(14, 6), self.block(10, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)  # before a norm a bias has no gradient
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, skip.shape[2:], mode="bilinear"), skip], 1))
        return self.head(x)


NETS = {
    "resnet18": lambda: resnet18(width=4, in_channels=1),
    "unet": Unet,
    "plain": lambda: nn.Sequential(
        *(
            module
            for c in range(1, 5)
            for module in (nn.Conv2d(c, c + 1, 3, 1 + c % 2, bias=False), nn.BatchNorm2d(c + 1), nn.SiLU())
        ),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
    ),
}


@pytest.mark.parametrize("name", ["unet", "plain"])
def test_every_choice_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomize(NETS[name]()).double().train()
    if name == "plain":
        net.get_submodule("12").eval()  # its draws depend on the tile
    number = len(list(strategies(*sorted_program(net), training=True, image_grad=True)))
    assert number > 3

    def choose(n: int) -> None:
        monkeypatch.setattr(PLAN, "strategies", lambda *a: list(strategies(*a))[: n + 1][-1:])

    image, chosen = torch.randn(2, 1, 65, 61, dtype=torch.float64), range(0, number, -(-number // 6))
    changes = [lambda n=n: choose(n) for n in chosen]  # six of them, from all over the curve
    for n, found in zip(chosen, compare_each(net, image, changes, tile=32), strict=True):
        assert max(found.values()) <= LIMIT, (n, found)


def test_choices_trade_time_for_memory() -> None:
    found = list(strategies(*sorted_program(resnet18(in_channels=1), (1, 1, 256, 256)), True, False))
    costs, sizes = [s.cost for s in found], [s.stored_bytes for s in found]
    assert costs[1:] == sorted(costs[1:]) and costs[0] < 3.5
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
    assert any(s.cost < 4.5 and s.stored_bytes < 0.45 * sizes[0] for s in found)


def test_cuts_of_a_resnet_are_the_outputs_of_its_blocks() -> None:
    maps, nodes = sorted_program(NETS["resnet18"]())
    cuts = cut_maps(Divider(maps, nodes))
    assert len(cuts) == 9  # the stem's and those of eight blocks
    assert not set(cuts) & {v for node in nodes if getattr(node, "kind", "") == "moments" for v in [node.value]}


@pytest.mark.parametrize("row_by_row", [False, True])
def test_what_lives_is_counted(row_by_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two convolutions with live norms, both outputs of 8 x 8 x 4 in float64, 2048 bytes."""
    monkeypatch.setattr(lifetimes, "_GIVES_ROWS_BACK", row_by_row)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
    )
    divider = Divider(*sorted_program(net, (1, 1, 8, 8)))
    network = divider.split(divider.crossing())
    wanted = network.trainable()
    assert len(network.stages) == 3
    pooled = 2 * 4 * 8  # what the pooling gives, and its gradient
    assert 0 <= stored_peak(network, False, wanted) - 2 * 2048 <= pooled  # one is read while the other is written
    # In the backward of the second all four; or the second output and its gradient go while that of the first comes.
    assert 0 <= stored_peak(network, True, wanted) - (3 if row_by_row else 4) * 2048 <= pooled
    network.place = "disk"
    assert stored_peak(network, True, wanted) <= pooled
    cuts = cut_maps(divider)
    ranged = divider.split(divider.crossing(cuts), cuts)
    ranged.segments = segments_between(ranged, cuts)
    assert [type(step).__name__ for step in ranged.steps].count("ProgramStage") == 4
    assert program_cost(ranged, True) > program_cost(network, True)


def test_buffers_change_once() -> None:
    net = NETS["plain"]().double().train()
    net.get_submodule("12").eval()
    stock, fast = copy.deepcopy(net), accelerate(copy.deepcopy(net), tile=16)
    for seed in range(3):
        image = torch.randn(2, 1, 65, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step(stock, image), step(fast, image)
    for (name, want), have in zip(stock.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-14, msg=name)
