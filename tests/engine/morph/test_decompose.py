"""One layer into two: whole maps compared, for all paddings, strides, dilations and groups; the rank condition."""

import copy
import pickle
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from morph_networks import half_resnet
from torch import Tensor, nn

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models.resnet import ResNet
from gigamorph.engine.morph.decompose import (
    DecomposeStep,
    ParallelStep,
    compose,
    decompose,
    factorise,
    fewest_middle,
    insert_module,
    split_parallel,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def small_resnet() -> ResNet:
    return half_resnet(2, 1, 8, blocks=2)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def conv_case(draw: Any, sizes: tuple[tuple[int, ...], tuple[int, ...]], extra: int) -> tuple[nn.Module, Tensor]:
    dims = len(sizes[0])
    kernel = tuple(a + b - 1 - 2 * extra for a, b in zip(*sizes, strict=True))
    assume(min(kernel) >= 1)
    groups = draw(st.sampled_from([1, 1, 2]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    form = draw(st.sampled_from(["same", "valid", "number", "number"]))
    assume(form != "same" or all(k % 2 for k in kernel))
    stride = 1 if form == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = form if form != "number" else tuple(draw(st.integers(0, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    bias = draw(st.booleans())
    conv = CONVS[dims - 1](inputs, outputs, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)
    x = torch.randn(2, inputs, *[draw(st.integers(15, 18)) for _ in range(dims)], dtype=torch.float64)
    return nn.Sequential(conv).double(), x


@st.composite
def cases(draw: Any) -> tuple[nn.Module, Tensor, tuple[tuple[int, ...], tuple[int, ...]]]:
    """A convolution, its input, and the sizes of its two factors."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    top = 3 if dims < 3 else 2
    first, second = (tuple(draw(st.integers(1, top)) for _ in range(dims)) for _ in range(2))
    model, x = conv_case(draw, (first, second), draw(st.integers(0, 1)))
    return model, x, (first, second)


def check(model: nn.Module, child: nn.Module, x: Tensor) -> None:
    assert relative(child(x), model(x)) <= 1e-12
    if x.ndim > 2:
        other = torch.cat([x, x[..., :3]], -1)  # another image size
        assert relative(child(other), model(other)) <= 1e-12
    child(x).square().sum().backward()
    layers = [m for m in child.modules() if isinstance(m, (*CONVS, nn.Linear))]
    for layer in layers:
        assert layer.weight.grad is not None and (layer.weight.grad != 0).any()


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from([(None, "pact"), ("Tanh", "pact"), ("GELU", "pair"), ("LeakyReLU", "pair")]))
def test_the_whole_map_stays(case: Any, between: tuple[str | None, str]) -> None:
    model, x, kernels = case
    child, report = decompose(model, x, "0", kernels, act=between[0], between=between[1])
    assert report.difference.float64 <= 1e-12
    check(model, child, x)


@st.composite
def stable_cases(draw: Any) -> tuple[nn.Module, Tensor, tuple[tuple[int, ...], tuple[int, ...]]]:
    whole, odd = (draw(st.integers(1, 4)), draw(st.integers(1, 3))), draw(st.sampled_from([1, 3]))
    model, x = conv_case(draw, (whole, (1, 1)), 0)
    kernels = (whole, (odd, odd))
    if draw(st.booleans()):
        kernels = (kernels[1], kernels[0])
    return model, x, kernels


@settings(max_examples=40, deadline=None)
@given(stable_cases(), st.sampled_from([(None, "pact"), ("SiLU", "pair")]))
def test_stable(case: Any, between: tuple[str | None, str]) -> None:
    model, x, kernels = case
    child, report = decompose(model, x, "0", kernels, method="stable", act=between[0], between=between[1])
    check(model, child, x)
    assert report.difference.float64 <= 1e-12
    assert all((p != 0).all() for name, p in child.named_parameters() if name.endswith("weight"))


def test_stable_is_exact_in_stored_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1))
    child, report = decompose(model, torch.randn(1, 5, 12, 12), "0", (3, 3), method="stable")
    one, two = child[0][0].weight.double(), child[0][1].weight.double()
    whole = nn.functional.pad(model[0].weight.double(), [1] * 4)
    assert child[0][1].weight.dtype == torch.float32
    assert torch.equal(two[:, :4] + two[:, 4:], nn.init.dirac_(torch.empty(4, 4, 3, 3, dtype=torch.float64)))
    assert (compose(one, two) - whole).abs().max() < 1e-15
    assert report.difference.float64 < 1e-14  # in the stored numbers, not in float64 copies


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([((1,), (3,)), ((3,), (1,)), ((3, 3), (3, 3)), ((2, 1), (3, 3)), ((1, 1), (1, 1))]),
)
def test_the_condition_is_sharp(outputs: int, inputs: int, sizes: Any) -> None:
    whole = [a + b - 1 for a, b in zip(*sizes, strict=True)]
    kernel = torch.randn(outputs, inputs, *whole, dtype=torch.float64)
    least = fewest_middle(outputs, inputs, *sizes)
    one, two = factorise(kernel, *sizes, least + 1, 0)
    assert relative(compose(one, two), kernel) <= 1e-11
    with pytest.raises(MorphError, match=f"use {least} or more"):
        factorise(kernel, *sizes, least - 1, 0)


def test_known_values_of_the_condition() -> None:
    assert fewest_middle(12, 4, (3, 3), (3, 3)) == 12  # 9 m >= 25 * 4
    assert fewest_middle(64, 64, (1, 1), (3, 3)) == 64
    assert fewest_middle(8, 3, (3, 3), (1, 1)) == 8
    assert fewest_middle(32, 3, (3, 3), (1, 1)) == 27  # 3 * 9 taps are less than 32 outputs


def test_orthogonal_one_by_one_factors_are_as_good_as_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    for kernels in ((1, 3), (3, 1)):
        _, report = decompose(model, torch.randn(1, 32, 14, 14), "0", kernels)
        assert report.difference.float64 < 1e-14 and report.difference.noise_ratio < 8


def test_linear() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 5)).double(), torch.randn(3, 7, dtype=torch.float64)
    for method, middle in (("orthogonal", 5), ("stable", 10)):
        child, _ = decompose(model, x, "0", method=method, act="GELU", between="pair")
        assert child[0][0].out_features == 2 * middle
        check(model, child, x)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_parallel(case: Any) -> None:
    model, x, _ = case
    child, report = split_parallel(model, x, "0")
    assert report.difference.float64 <= 1e-12
    check(model, child, x)
    one, two = child[0].branches
    for name, p in model[0].named_parameters():
        a, b = one.get_parameter(name), two.get_parameter(name)
        assert torch.equal(a + b, p) and not torch.equal(a, b)


def test_parallel_is_exact_in_every_float() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40)).to(dtype)
        ParallelStep("0", 3).edit(child := copy.deepcopy(model))
        one, two = child[0].branches
        assert torch.equal(one.weight.double() + two.weight.double(), model[0].weight.double())


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (3, 1), (1, 3), (3, 3)]),
    st.sampled_from([("Tanh", "pact"), ("GELU", "pair")]),
)
def test_inserted_module(dims: int, channels: int, kernels: tuple[int, int], between: tuple[str, str]) -> None:
    torch.manual_seed(0)
    first = CONVS[dims - 1](2, channels, 1) if dims else nn.Linear(2, channels)
    model, x = nn.Sequential(first).double(), torch.randn(3, 2, *[6] * dims, dtype=torch.float64)
    kernels = kernels if dims else (1, 1)
    sizes = tuple((k,) * dims for k in kernels)
    child, report = insert_module(model, x, "0", sizes, act=between[0], between=between[1])
    assert report.difference.float64 <= 1e-12
    check(model, child, x)


def test_in_a_resnet_and_the_step_on_a_fresh_one() -> None:
    torch.manual_seed(0)
    model = randomize(small_resnet()).eval()
    x = torch.randn(2, 1, 40, 36)
    child, fresh = model, small_resnet()
    for grow, path, options in (
        (decompose, "conv1", {"kernels": (5, 3), "act": "GELU"}),
        (decompose, "layer1.0.conv2", {"kernels": (1, 3), "act": "SiLU", "between": "pair"}),
        (decompose, "layer1.1.conv1", {"kernels": (3, 3), "method": "stable"}),
        (split_parallel, "layer2.0.conv1", {}),
        (decompose, "layer2.0.conv1.branches.1", {"kernels": (3, 1)}),
        (insert_module, "layer1", {"kernels": (3, 1)}),
        (decompose, "fc", {"act": "ReLU", "between": "pair"}),
    ):
        child, report = grow(child, x, path, **options)
        assert report.difference.float64 <= 1e-12
        report.step.edit(fresh)
    fresh.load_state_dict(child.state_dict())
    assert torch.equal(fresh.eval()(x), child.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(child))(x), child(x))
    assert relative(child(x), model(x)) < 1e-4
    assert_exact(child.double(), torch.randn(1, 1, 64, 56, dtype=torch.float64), tile=32)


def test_shapes_alone_on_the_meta_device() -> None:
    step = DecomposeStep("0", (3, 3), None, "GELU", "pair", 0, "orthogonal")
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 4, 5))
    step.edit(model)
    assert model[0][0].weight.is_meta and model[0][0].weight.shape == (2 * 15, 4, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": (3, 3), "middle": 3}, "'0': 3 middle channels are too few.*use 12 or more"),
        ({"kernels": (2, 2)}, r"'0': kernels \(2, 2\) and \(2, 2\) compose to \(3, 3\)"),
        ({"kernels": (5, 2)}, "exceed it by an even number"),
        ({"kernels": (3, 3), "method": "stable"}, r"'0': method 'stable' needs \(5, 5\)"),
        ({"kernels": (5, 1), "method": "stable", "middle": 5}, "has 8 middle channels, not 5"),
        ({"kernels": (3, 3), "act": "Tanh", "between": "pair"}, "not a multiple of x"),
        ({"method": "best"}, "method 'best'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2))
    with pytest.raises(MorphError, match=message):
        decompose(model, torch.randn(1, 4, 9, 9), "0", **options)
    assert isinstance(model[0], nn.Conv2d)


def test_uneven_same_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 4, padding="same"))
    with pytest.raises(MorphError, match="unevenly"):
        decompose(model, torch.randn(1, 4, 9, 9), "0", (2, 3))
