"""A larger kernel gives the same map, whole map compared, for every padding, stride, dilation and number of axes."""

import copy
from typing import Any

import pytest
import torch
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.kernel_size import grow_kernel, pad_kernel

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@st.composite
def convs(draw: Any) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """A convolution, its input, and a larger kernel."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    growth = draw(st.tuples(*[st.integers(0, 3)] * dims).filter(any))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    form = draw(st.sampled_from(["same", "valid", "number", "number"]))
    stride = 1 if form == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = form if form != "number" else tuple(draw(st.integers(0, 3)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.sampled_from([1, 2]))
    bias = draw(st.booleans())
    torch.manual_seed(0)
    conv = CONVS[dims - 1](4, 6, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)
    sides = [draw(st.integers(22, 26)) if dims < 3 else 22 for _ in range(dims)]
    return conv, torch.randn(1, 4, *sides), tuple(k + g for k, g in zip(kernel, growth, strict=True))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=60, deadline=None)
@given(convs())
def test_the_whole_map_stays(case: tuple[nn.Module, Tensor, tuple[int, ...]]) -> None:
    conv, x, kernel = case
    model = nn.Sequential(conv).double()
    child, report = grow_kernel(model, x, "0", kernel)
    assert report.difference.float64 <= 1e-12
    assert relative(child(x.double()), model(x.double())) <= 1e-12
    (weight,) = [p for p in child.parameters() if p.ndim > 1]
    assert tuple(weight.shape[2:]) == kernel and weight.count_nonzero() == conv.weight.count_nonzero()
    other = torch.randn(2, 4, *[n + 3 for n in x.shape[2:]], dtype=torch.float64)  # another image size
    assert relative(child(other), model(other)) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2))
def test_transposed(dims: int, kernel: int, stride: int, dilation: int, padding: int, half: int) -> None:
    torch.manual_seed(0)
    out = stride - 1
    conv = TRANSPOSED[dims - 1](4, 6, kernel, stride, padding, out, 2, dilation=dilation)
    model, x = nn.Sequential(conv).double(), torch.randn(1, 4, *[9] * dims)
    child, _ = grow_kernel(model, x, "0", kernel + 2 * half)
    assert relative(child(x.double()), model(x.double())) <= 1e-12
    with pytest.raises(MorphError, match="even number"):
        grow_kernel(model, x, "0", kernel + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integers_stay_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, 2, 1, dtype=dtype)
    for p in conv.parameters():
        p.data = torch.randint(-3, 4, p.shape).to(dtype)
    model, x = nn.Sequential(conv), torch.randint(-3, 4, (1, 3, 15, 12)).to(dtype)
    child, _ = grow_kernel(model, x, "0", 7)
    assert torch.equal(child(x), model(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding="same")
    )


def test_several_in_a_network_and_gradients_of_the_new_taps() -> None:
    model, x = net(), torch.randn(2, 2, 16, 14)
    child, report = grow_kernel(model, x, ["0", "3"], 5)
    assert report.changes == ["0: kernel 3 x 3 -> 5 x 5", "3: kernel 3 x 3 -> 5 x 5"]
    assert child[3].padding == "same"
    child(x).square().sum().backward()
    for i in (0, 3):
        ring = child[i].weight.grad.clone()
        ring[..., 1:-1, 1:-1] = 1
        assert (ring != 0).all()
    assert_exact(child.double().eval(), torch.randn(1, 2, 33, 29, dtype=torch.float64), tile=8)


def test_step_repeats_it_on_a_fresh_network() -> None:
    model, x = net(), torch.randn(2, 2, 16, 14)
    child, report = grow_kernel(model, x, "0", 4)
    fresh = net()
    report.step.edit(fresh)
    fresh.load_state_dict(child.state_dict())
    assert torch.equal(fresh.eval()(x), child.eval()(x))


def test_pad_kernel_orders_the_axes() -> None:
    assert pad_kernel(torch.ones(1, 1, 2, 3), [(1, 0), (2, 3)]).shape == (1, 1, 3, 8)


def refused(model: nn.Module, path: str = "0", kernel: int = 5) -> str:
    before = repr(model), copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError) as error:
        grow_kernel(model, torch.randn(1, 2, 6, 6), path, kernel, inplace=True)
    assert repr(model) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1].values(), strict=True))
    return str(error.value)


class Own(nn.Conv2d):
    """Standardises its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((2, 3), keepdim=True), self.bias)


class Reader(nn.Module):
    """Reads an attribute of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv.out_channels


def test_refusals() -> None:
    tied = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    tied[1].weight = tied[0].weight
    assert "module '0' shares a weight with '1'" in refused(tied)
    assert "module '0' (Own) overrides forward" in refused(nn.Sequential(Own(2, 2, 3)))
    assert "module '0'" in refused(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 2, 3))))
    assert "module '0' is a ReLU" in refused(nn.Sequential(nn.ReLU()))
    assert "cannot shrink" in refused(nn.Sequential(nn.Conv2d(2, 2, 3)), kernel=1)
    assert "already has kernel (3, 3)" in refused(nn.Sequential(nn.Conv2d(2, 2, 3)), kernel=3)
    assert "no module '4'" in refused(net(), "4")
    wide = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    assert "the child cannot be run" in refused(wide, kernel=13)  # reflection of more than the image
    assert "to have its old class" in refused(Reader(), "conv", 3)


def test_a_module_with_two_names_grows_once() -> None:
    twice = nn.Sequential(*[nn.Conv2d(2, 2, 2)] * 2)
    child, _ = grow_kernel(twice, torch.randn(1, 2, 9, 9), "0", 3)
    assert child[0] is child[1]
