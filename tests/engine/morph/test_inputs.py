"""child(y) = parent(A y + b), borders included: grey, RGB and further planes."""

import copy
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from morph_networks import half_resnet
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.inputs import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OnesChannel,
    add_planes,
    mix_inputs,
    to_grey,
    to_rgb,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def column(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, *[1] * (like.ndim - 2))


@st.composite
def stems(draw: Any) -> tuple[nn.Module, Tensor]:
    """A network that begins with a convolution of the image, and an image of 1 to 4 channels, in float64."""
    dims, channels = draw(st.sampled_from([1, 2, 2, 3])), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, channels]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    kernel, stride, padding = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    bias = draw(st.booleans())
    conv = CONVS[dims - 1](channels, 4, kernel, stride, padding, 1, 1, bias, padding_mode=mode)
    if 4 % groups == 0:
        conv = CONVS[dims - 1](channels, 4, kernel, stride, padding, 1, groups, bias, padding_mode=mode)
    model = nn.Sequential(conv, nn.Tanh(), CONVS[dims - 1](4, 2, 1)).double()
    return model, torch.randn(2, channels, *[draw(st.integers(5, 9)) for _ in range(dims)], dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(stems(), st.data())
def test_any_mixture(case: Any, data: Any) -> None:
    model, x = case
    size, number = data.draw(st.integers(1, 4)), st.floats(-3, 3, width=32)
    matrix = data.draw(
        st.lists(st.lists(number, min_size=size, max_size=size), min_size=x.shape[1], max_size=x.shape[1])
    )
    offset = data.draw(st.one_of(st.none(), st.lists(number, min_size=x.shape[1], max_size=x.shape[1])))
    y = torch.randn(2, size, *x.shape[2:], dtype=torch.float64)
    child, report = mix_inputs(model, y, matrix, offset)
    assert report.difference.float64 <= 1e-12
    mixed = torch.einsum("cj,nj...->nc...", torch.tensor(matrix, dtype=torch.float64), y)
    mixed = mixed + column(offset or [0.0] * x.shape[1], y)
    assert (child(y) - model(mixed)).abs().max() <= 1e-12 * model(mixed).abs().max().clamp(min=1)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(("grey_mean", "grey_std"), [(0.0, 1.0), (0.5, 0.25)])
def test_imagenet_to_grey_is_exact_at_the_borders(padding_mode: str, grey_mean: float, grey_std: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 7, 2, 3, padding_mode=padding_mode), nn.ReLU(), nn.Conv2d(6, 2, 3)).double()
    y = torch.rand(2, 1, 21, 18, dtype=torch.float64)
    child, _ = to_grey(model, y, grey_mean=grey_mean, grey_std=grey_std)
    grey = y * grey_std + grey_mean
    want = model((grey - column(IMAGENET_MEAN, y)) / column(IMAGENET_STD, y))
    assert relative(child(y), want) <= 1e-12
    assert child[0][1].in_channels == 2
    child(y).square().sum().backward()
    assert (child[0][1].weight.grad != 0).all()


def test_one_normalisation_for_all_needs_no_ones() -> None:
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1)).double(), torch.randn(1, 1, 9, 9, dtype=torch.float64)
    child, _ = to_grey(model, y, mean=(0.5,) * 3, std=(0.25,) * 3, grey_mean=0.5, grey_std=0.25)
    assert isinstance(child[0], nn.Conv2d)
    assert relative(child(y), model(y.expand(-1, 3, -1, -1))) <= 1e-12


def test_rgb_in_stored_numbers() -> None:
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1)), torch.randn(1, 3, 9, 9)
    child, report = to_rgb(model, y)
    assert torch.equal(child[0].weight.sum(1, keepdim=True), model[0].weight)
    assert report.difference.float64 < 1e-14  # float32 weights: exact as stored
    assert relative(child(y.mean(1, keepdim=True).expand_as(y)), model(y.mean(1, keepdim=True))) < 1e-6
    child, _ = to_rgb(model, y, weights=(0.299, 0.587, 0.114))
    luma = (y * column((0.299, 0.587, 0.114), y).float()).sum(1, keepdim=True)
    assert relative(child(y), model(luma)) < 1e-6


def test_planes_count_for_nothing_and_learn() -> None:
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Conv2d(2, 6, 3, 1, 1)), torch.randn(1, 5, 9, 9)
    child, _ = add_planes(model, y, 3)
    assert relative(child(y), model(y[:, :2])) < 1e-6
    assert torch.equal(child[0].weight[:, :2], model[0].weight) and not child[0].weight[:, 2:].any()
    child(y).square().sum().backward()
    assert (child[0].weight.grad[:, 2:] != 0).all()


def test_resnet_to_grey_in_both_modes_and_with_the_scan() -> None:
    torch.manual_seed(0)
    model = randomize(half_resnet(2, 3, 8))
    y = torch.rand(2, 1, 40, 36)
    child, report = to_grey(model, y)
    assert report.difference.float64 <= 1e-12 and report.step.paths == ("conv1",)
    assert model.training and isinstance(child.conv1[0], OnesChannel)
    fresh = half_resnet(2, 3, 8)
    report.step.edit(fresh)
    fresh.load_state_dict(child.state_dict())
    assert torch.equal(fresh.eval()(y), copy.deepcopy(child).eval()(y))
    assert_exact(child.double().eval(), torch.rand(1, 1, 61, 52, dtype=torch.float64), tile=32)


class Twice(nn.Module):
    """Two convolutions read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


class Skip(Twice):
    """And the output contains the image."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x.mean(1, keepdim=True) ** 2


def test_all_that_read_the_image_are_found() -> None:
    torch.manual_seed(0)
    _, report = to_grey(Twice(), torch.rand(1, 1, 8, 8))
    assert report.step.paths == ("a", "b")


@pytest.mark.parametrize(
    ("model", "run", "message"),
    [
        (Skip(), lambda m: to_grey(m, torch.rand(1, 1, 8, 8)), "differs from its parent"),
        (nn.Sequential(nn.BatchNorm2d(3)), lambda m: to_grey(m, torch.rand(1, 1, 8, 8)), "no convolution reads"),
        (Twice(), lambda m: to_grey(m, torch.rand(1, 3, 8, 8)), "do not fit"),
        (Twice(), lambda m: to_rgb(m, torch.rand(1, 3, 8, 8)), "cannot be run"),
        (Twice(), lambda m: to_rgb(m, torch.rand(1, 3, 8, 8), paths=["a"]), "'a' reads 3 channels"),
        (Twice(), lambda m: to_grey(m, torch.rand(1, 1, 8, 8), std=(1, 1, 0)), "no std may be zero"),
        (Twice(), lambda m: add_planes(m, torch.rand(1, 3, 8, 8), 3), "too few for 3 new planes"),
    ],
)
def test_refusals(model: nn.Module, run: Any, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=message):
        run(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
