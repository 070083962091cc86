"""Images of several sizes as one batch with live BatchNorm, against stock PyTorch on all their pixels."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from exactness import LIMIT, plan_again, randomize, step, step_errors, take_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import Listed, several_sizes
from split_image import NETS
from split_image import network as residual_network
from torch import Tensor, nn

from gigamorph import Accelerated, BudgetError, GigamorphError, UnsupportedError, accelerate
from gigamorph.engine.planning.strategy import strategies

PLAN = sys.modules["gigamorph.engine.planning.multi_size"]
Shape = tuple[int, int, int, int]
SIZES: list[Shape] = [(1, 2, 61, 43), (2, 2, 20, 37), (1, 2, 9, 30)]


def pixels(shapes: Sequence[Shape]) -> Tensor:
    parts = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n, shape in enumerate(shapes)
    ]
    return torch.cat([(part + n).flatten() for n, part in enumerate(parts)])  # images of other means


def assert_exact(model: nn.Module, shapes: Sequence[Shape], fast: Accelerated, tile: int) -> None:
    """Compare a step with stock's.

    Args:
        fast: an accelerated copy of the model; it gets the model's state.
    """
    flat = pixels(shapes)
    fast.tile = (tile, tile)
    take_state(fast, model)
    stock = step(Listed(copy.deepcopy(model), shapes, True), flat)
    found = step_errors(stock, step(Listed(fast, shapes, False), flat))
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("name", ["live", "cumulative", "excite, live", "amax"])
def test_networks(name):
    model = residual_network(name)
    fast = accelerate(copy.deepcopy(model))
    for tile in (11, 100):
        assert_exact(model, SIZES, fast, tile)


class Shared(nn.Module):
    """Norms used twice, without affine part, without running statistics, frozen; a norm of each image; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 4, 3, 2, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)])
        self.twice, self.frozen = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4).eval()
        self.plain, self.own = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
        self.groups = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.convs[0](x)).relu()
        y = self.twice(self.convs[1](x)) + self.plain(x)
        y = self.groups(self.frozen(y).relu())
        return torch.cat([self.own(y).square().mean((2, 3)), y.amax((2, 3))], 1)


def shared() -> nn.Module:
    torch.manual_seed(0)
    model = randomize(Shared().double()).train()
    model.frozen.eval()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return model


@functools.cache
def networks() -> dict[str, tuple[nn.Module, Accelerated]]:
    """By name, with accelerated copies, which are not recorded again for each example."""
    models = {name: residual_network(name) for name in NETS if "live" in name} | {"shared": shared()}
    return {name: (model, accelerate(copy.deepcopy(model))) for name, model in models.items()}


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["excite, live", "live", "shared"]),
    st.lists(
        st.tuples(st.integers(1, 2), st.just(2), st.integers(17, 45), st.integers(17, 45)), min_size=2, max_size=3
    ),
    st.integers(7, 45),
    st.integers(0, 30),
)
def test_any_sizes_tiles_and_stored_maps(name, shapes, tile, number):
    """Whatever is stored or computed again; lists of one size are a batch, if they can be one."""
    if len({shape[1:] for shape in shapes}) == 1:
        shapes[0] = (*shapes[0][:3], shapes[0][3] + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLAN, "strategies", lambda *a: (found := list(strategies(*a)))[number % len(found) :][:1])
        model, fast = networks()[name]
        plan_again(fast)
        assert_exact(model, shapes, fast, tile)


def test_every_choice_of_stored_maps():
    """They are several, and each is taken for all images."""
    model, taken = residual_network("live"), []
    fast = accelerate(copy.deepcopy(model))

    def only(number: int) -> Any:
        def choose(*args: Any) -> Any:
            found = list(strategies(*args))
            taken.append(len(found))
            return found[number : number + 1]

        return choose

    for number in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PLAN, "strategies", only(number))
            plan_again(fast)
            assert_exact(model, SIZES, fast, tile=16)
    assert min(taken) >= 3


def test_three_steps_and_inference():
    """Running statistics are updated once per step, also without a backward."""
    stock = residual_network("cumulative")
    fast = accelerate(copy.deepcopy(stock), tile=16)
    for number in range(3):
        xs = [torch.randn(shape, dtype=torch.float64) + number for shape in SIZES]
        with torch.set_grad_enabled(number != 1):
            wanted, got = several_sizes(stock, xs), fast(xs)
        assert (got - wanted).norm() < LIMIT * wanted.norm()
        for name, buffer in stock.named_buffers():
            assert (fast.get_buffer(name) - buffer).double().norm() <= LIMIT * buffer.double().norm(), name
    assert fast.get_buffer("norm.num_batches_tracked") == 3


class Source:
    def __init__(self, shape: Shape):
        self.pixels = torch.randn(shape[1:], generator=torch.Generator().manual_seed(shape[2]))
        self.shape, self.name = shape[1:], "a source"

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.pixels[:, top:bottom, left:right].clone()


def test_pixel_sources_within_a_budget():
    model = residual_network("live")
    sources = [Source((1, 2, side, 100)) for side in (160, 90, 230)]
    fast = accelerate(copy.deepcopy(model), memory_budget="24MiB")
    wanted = several_sizes(model, [source.pixels[None].double() for source in sources])
    got = fast(sources)
    assert (got - wanted).norm() < LIMIT * wanted.norm()
    prepared = max((one for known in fast._runner.programs.kept.values() for one in known.values()), key=len)
    assert len(prepared) == 3
    together = sum(p.plan.stored_bytes for p in prepared) + max(
        p.plan.peak_bytes - p.plan.stored_bytes for p in prepared
    )
    assert together <= 24 << 20


def test_images_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).train()
    images = [torch.randn(shape) for shape in [(1, 2, 120, 120), (1, 2, 121, 120)]]
    with pytest.raises(BudgetError, match="the budget is"):
        accelerate(model, tile=32, memory_budget="100KiB")(images)


class BySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (self.norm(x) if x.shape[2] < 20 else self.norm(self.norm(x))).mean((2, 3))


def test_sizes_that_take_other_steps_are_refused():
    with pytest.raises(UnsupportedError, match=r'different steps.*batch_norm="frozen"'):
        accelerate(BySize().train(), tile=16)([torch.randn(shape) for shape in [(1, 2, 30, 30), (1, 2, 12, 30)]])


@dataclass
class Found:
    logits: Tensor


class Returns(nn.Module):
    """A network whose outputs for images of several sizes cannot be concatenated."""

    def __init__(self, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(2, 4, 3), norm, kind

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        rows = y.mean((2, 3))
        return {"map": (rows, y), "number": (rows, rows.sum()), "none": (rows, None), "object": Found(rows)}[self.kind]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("map", r"rows have the shapes .* for an image of .*; call it for each image"),
        ("number", "returns a number; call it for each image"),
        ("none", "returns NoneType; call it for each image"),
        ("object", "returns Found; call it for each image"),
    ],
)
def test_outputs_that_cannot_be_concatenated(norm, kind, reason):
    model = Returns(norm(4), kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GigamorphError, match=reason):
        accelerate(model, tile=16)([torch.randn(shape) for shape in SIZES])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
