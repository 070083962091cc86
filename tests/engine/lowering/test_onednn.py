"""Convolutions by oneDNN with packed weights: as exact as stock in float32, of the weights there are, NaN and all."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering import onednn
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower
from gigamorph.kernels.choice import override

pytestmark = pytest.mark.skipif(not onednn.runs(), reason="this build of PyTorch has no packed convolutions")
ACTS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
}


class Sum(nn.Module):
    """act(conv(conv(x)) + x), then a maximum: its gradient goes where both passes have the same bits."""

    def __init__(self, act: str, *, kernel=3, stride=1, dilation=1, groups=1, channels=16, residual=True, between=True):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride, 1)
        pad = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(channels, channels, kernel, 1, pad, dilation, groups, bias=not residual)
        self.between = nn.Conv2d(channels, channels, 3, 1, 1) if between else nn.Identity()
        self.act, self.residual = ACTS[act](), residual
        self.last = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        x = self.act(self.first(x))
        y = self.conv(self.between(x))
        y = self.last(self.act(y + x if self.residual else y))
        return y.amax((2, 3)) + y.mean((2, 3))


def results(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Output, output in inference, gradients of parameters and image, in one vector of float64."""
    image = image.clone().requires_grad_()
    net.zero_grad()
    y = net(image)
    y.square().sum().backward()
    with torch.no_grad():
        again = net(image)
    parts = [y, again, image.grad, *(p.grad for p in net.parameters())]
    return torch.cat([t.detach().double().flatten() / (1e-6 + t.detach().double().norm()) for t in parts])


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_as_near_to_float64_as_stock_in_float32(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    channels, kernel = draw(4, 8, 20), draw(1, 3, 5)
    torch.manual_seed(draw(*range(5)))
    net = Sum(
        draw(*ACTS),
        kernel=kernel,
        stride=draw(1, 2),
        dilation=draw(1, 2),
        groups=draw(1, 2, channels),
        channels=channels,
        residual=draw(False, True),
        between=draw(False, True),
    )
    image = torch.randn(draw(1, 2), 1, draw(37, 48), draw(30, 41))
    exact = results(copy.deepcopy(net).double(), image.double())
    stock = (results(net, image) - exact).abs().max()
    ours = (results(accelerate(net, tile=draw(16, 24, 64)), image) - exact).abs().max()
    assert ours <= 3 * stock + 1e-6


def stage_of(net: nn.Module, dtype: torch.dtype = torch.float32, training: bool = False):
    staged = lower(capture(net, (1, 1, 40, 40), dtype, "cpu"))
    prepare(staged, training)
    (stage,) = staged.stages
    return stage


def network(act: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    return Sum(act).eval()


def test_a_convolution_takes_the_sum_and_activation_after_it():
    assert [local.op.name for local in stage_of(network()).locals] == ["packed_conv2d"] * 4
    assert len(stage_of(network()).packings) == 4
    assert not stage_of(network(), training=True).packings


def test_a_sum_with_its_own_input_keeps_the_window_of_that():
    """An op has one window of a map: of the 3 x 3 convolution here, where the sum reads a pixel."""
    names = [local.op.name for local in stage_of(Sum("relu", between=False)).locals]
    assert "add" in names or "add_" in names


def test_a_sum_of_maps_of_one_pixel():
    """As of a network's last maps where images are small: PyTorch 2.11 "could not create a memory"."""
    net, image = network(), torch.rand(2, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(net)(image), net(image))


def test_nothing_changes_in_float64():
    assert not stage_of(network().double(), torch.float64).packings


class Linear(nn.Module):
    """A linear layer on the channels of a channels-last map, scaled, as ConvNeXt has it."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.back = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(24, 8)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        x = self.stem(x)
        y = self.gamma * self.back(F.gelu(self.wide(x.permute(0, 2, 3, 1))))
        return (x + y.permute(0, 3, 1, 2)).amax((2, 3))


def test_linear_layers_on_channels_are_convolutions_of_a_pixel():
    net, image = Linear(), torch.randn(1, 1, 33, 29)
    assert len(stage_of(net).packings) == 2
    exact = results(copy.deepcopy(net).double(), image.double())
    stock = (results(net, image) - exact).abs().max()
    assert (results(accelerate(net, tile=16), image) - exact).abs().max() <= 3 * stock + 1e-6


@torch.no_grad()
def _step(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _load(net):
    net.load_state_dict({name: 2 * t for name, t in net.state_dict().items()})


def _write(net):
    with torch.no_grad():
        net.conv.weight[0].mul_(3)


def _write_data(net):
    net.conv.weight.data.mul_(3)


def _new_storage(net):
    net.conv.weight.data = 3 * net.conv.weight.data


@pytest.mark.parametrize("change", [_step, _load, _write, _write_data, _new_storage])
def test_packed_weights_follow_the_parameters(change):
    net, image = network(), torch.randn(1, 1, 40, 36)
    fast = accelerate(net, tile=16)
    with torch.no_grad():
        before = fast(image)
        change(net)
        after = fast(image)
        assert not torch.equal(before, after)
        assert torch.equal(after, accelerate(net, tile=16)(image))


class Whole(nn.Module):
    """The map itself, with NaN and infinity where they are."""

    def __init__(self, act: str):
        super().__init__()
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.net = nn.Sequential(first, ACTS[act](), second, ACTS[act]())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("act", sorted(ACTS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_what_they_are(act, value):
    net, image = Whole(act), torch.randn(1, 1, 24, 24)
    image[..., 9, 9] = value
    with torch.no_grad():
        stock, ours = net(image), accelerate(net, tile=16)(image)
    assert value is torch.inf or stock.isnan().any()
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.allclose(ours, stock, atol=1e-5, equal_nan=True)


def test_without_onednn_the_same_is_computed(monkeypatch):
    net, image = network(), torch.randn(1, 1, 40, 36)
    expected = results(net, image)
    packed = []
    make = onednn._pack
    monkeypatch.setattr(onednn, "_pack", lambda *a: packed.append(make(*a)) or packed[-1])
    found = {"packed": results(accelerate(net, tile=16), image)}
    assert all(w.is_mkldnn or w.is_meta for w in packed)  # of a plan
    packed.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        found["off"] = results(accelerate(net, tile=16), image)
    with override("stock"):
        found["stock"] = results(accelerate(net, tile=16), image)
    assert packed
    assert not any(w.is_mkldnn for w in packed)
    monkeypatch.setattr(onednn, "runs", lambda: False)
    assert not stage_of(net).packings
    found["absent"] = results(accelerate(net, tile=16), image)
    for name, result in found.items():
        assert torch.allclose(result, expected, atol=1e-5), name


def test_packed_weights_are_counted():
    from gigamorph.engine.planning.estimate import Estimator

    staged = lower(capture(network(), (1, 1, 40, 40), torch.float32, "cpu"))
    before = Estimator(staged, False, False).parameter_bytes
    prepare(staged, False)
    # They take the place of copies in the memory order of the maps.
    assert Estimator(staged, False, False).parameter_bytes == before + 4 * 32 * 16


class Scaled(nn.Module):
    """A norm, then a layer scale, behind convolutions of which Winograd's filtering takes one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(32)])
        self.gamma = nn.Parameter(torch.rand(1, 32, 1, 1) + 0.5)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)

    def forward(self, x):
        x = F.relu(self.norms[0](self.first(x)))
        return (self.norms[1](self.last(x)) * self.gamma).amax((2, 3))


@pytest.mark.parametrize("way", ["packed", "off", "infinity"])
def test_norms_and_layer_scales_are_multiplied_in_as_weights_are_packed(way):
    """No scaled weight is there besides: neither while tiles are computed, nor in what the plan counts."""
    from gigamorph.engine.planning.estimate import Estimator

    torch.manual_seed(0)
    net, image = Scaled().eval(), torch.randn(1, 1, 50, 60)
    if way == "infinity":
        image[..., 20, 30] = torch.inf
    stage = stage_of(net)
    assert [local.op.name for local in stage.locals] == ["packed_conv2d"] * 2
    values = stage.program.values
    made = [values[v].shape for op in stage.prelude for v in op.outputs]
    assert made == [(32,)] * len(made)
    assert {values[v].name for v in stage.vectors if len(values[v].shape) == 4} == {"first.weight", "last.weight"}
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=way != "off"):
        found, exact = accelerate(net, tile=48)(image), net.double()(image.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    staged = lower(capture(net.float(), (1, 1, 50, 60), torch.float32, "cpu"))
    prepare(staged, False)
    own = sum(t.nbytes for t in net.state_dict().values())
    values, packings = staged.program.values, staged.stages[0].packings
    packed = sum(p.nbytes(values[p.weight].shape, torch.float32) for p in packings)
    assert Estimator(staged, False, False).parameter_bytes <= own + packed + 8 * 32 * 4
