"""BatchNorm with live statistics by the kernels: the stages give what stock PyTorch gives on the whole image."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from exactness import (
    FLOOR,
    assert_each_exact,
    assert_exact,
    assert_near_under_autocast,
    errors,
    plan_again,
    randomize,
    step,
    take_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate, kernels
from gigamorph.engine.lowering.fused import conv as fused_conv
from gigamorph.engine.lowering.fused import normalize as fused_norm
from gigamorph.engine.lowering.stages import ProgramStage
from gigamorph.engine.planning.strategy import strategies
from gigamorph.kernels import choice, moments

if not torch.cuda.is_available():
    import interpreter

    interpreter.install()

PLAN = sys.modules["gigamorph.engine.planning.search"]  # the package's attribute of that name is the function


class Block(nn.Module):
    """Norms with an activation after them, with a sum and an activation, with a sum alone, and with nothing."""

    def __init__(self, channels: int, out: int, stride: int, act: type[nn.Module], **norm: bool):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out, **norm),
            act(),
            nn.Conv2d(out, out, 3, 1, 1),
            nn.BatchNorm2d(out, **norm),
        )
        self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out, **norm))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + self.skip(x))


class Bottleneck(nn.Module):
    """A 1x1 convolution after a norm and its activation, one with a bias after a norm alone, and a padded one."""

    def __init__(self, channels: int, act: type[nn.Module]):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, 6, 3, 1, 1, bias=False),
            nn.BatchNorm2d(6),
            act(),
            nn.Conv2d(6, 10, 1, bias=False),
            nn.BatchNorm2d(10),
            nn.Conv2d(10, 9, 1),
            nn.BatchNorm2d(9),
            act(),
            nn.Conv2d(9, channels, 1, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.AvgPool2d(3, 1),
        )
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.main(x))


class Net(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 7, 2, 3), nn.BatchNorm2d(8), act(), nn.MaxPool2d(3, 2, 1))
        self.first, self.second = Block(8, 8, 1, act), Block(8, 12, 2, act, affine=False)
        self.bottleneck = Bottleneck(12, act)
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bottleneck(self.second(self.first(self.stem(x))))
        return self.head((x + self.depthwise(x)).mean((2, 3)))


def build(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(act)).double().train()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


def stages(net: nn.Module) -> list[ProgramStage]:
    (prepared,) = net._runner.programs
    return prepared.staged.stages  # pyright: ignore


ONE, TWO = (1, 1, 75, 58), (2, 1, 64, 64)


@pytest.mark.parametrize(
    ("act", "cases"),
    [
        (nn.ReLU, [(ONE, 16), (ONE, 200), (TWO, 16)]),
        (nn.SiLU, [(ONE, 16), (TWO, 200)]),
        (nn.ReLU6, [(ONE, 16)]),
    ],
    ids=["ReLU", "SiLU", "ReLU6"],
)
def test_equals_stock(
    fused_with_stock_ops: None, act: type[nn.Module], cases: list[tuple[tuple[int, ...], int]]
) -> None:
    assert_each_exact(build(act), [(image(*shape), tile) for shape, tile in cases])


def test_strategies(fused_with_stock_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is stored, and whatever is computed again."""
    model, taken = build(), []
    fast = accelerate(copy.deepcopy(model), tile=24)
    for number in range(8):

        def one(*args, number=number):
            found = list(strategies(*args))
            taken.append(found[min(number, len(found) - 1)].name)
            yield found[min(number, len(found) - 1)]

        monkeypatch.setattr(PLAN, "strategies", one)
        plan_again(fast)
        take_state(fast, model)
        assert_exact(model, image(1, 1, 56, 42), fast=fast, inference=number == 0)  # which stores nothing
    assert len(set(taken)) > 1


def test_several_images_by_the_kernels_themselves() -> None:
    """The gradients of each image's moments come as columns."""
    convs = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
    model = nn.Sequential(convs[0], nn.BatchNorm2d(8), nn.ReLU(), convs[1], nn.BatchNorm2d(8), nn.ReLU())
    with choice.override("triton"):
        assert_exact(randomize(nn.Sequential(model, nn.AdaptiveAvgPool2d(1))).double(), image(2, 1, 20, 17), tile=16)


def test_one_tile_has_the_whole_gradient(fused_with_stock_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What x does to its statistics takes a pass of its own where tiles share them, and where a map is not normed."""
    calls: list[str] = []
    backward, gradients = moments.moments_backward, fused_norm.normalize_act_gradients
    complete = lambda *given: (calls.append("complete") if given[9] else None) or gradients(*given)  # noqa: E731
    monkeypatch.setattr(moments, "moments_backward", lambda *given: calls.append("moments") or backward(*given))
    monkeypatch.setattr(fused_norm, "normalize_act_gradients", complete)
    fast = accelerate(build())
    for fast.tile, expected in (((8, 8), {"moments"}), ((100, 100), {"complete"})):
        calls.clear()
        step(fast, image(1, 1, 64, 64), image_gradient=False)
        assert set(calls) == expected


class Gated(nn.Module):
    """Squeeze-and-excite behind a norm with an activation, and behind one whose sum and activation come after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.main = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)) for _ in range(2))
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def gated(self, x: Tensor, number: int) -> Tensor:
        return x * torch.sigmoid(self.gates[number](x.mean((2, 3))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.gated(self.stem(x), 0)
        x = F.relu(self.gated(self.main(x), 1) + x)
        return self.last(x).mean((2, 3))


@pytest.mark.parametrize(("shape", "adds"), [((1, 1, 75, 58), 2), ((2, 1, 40, 50), 0)], ids=str)
def test_gradients_of_means_are_added_where_they_are_read(
    fused_with_stock_ops: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], adds: int
) -> None:
    """In each tile, of one image: a kernel takes one number for each channel."""
    found: list[bool] = []
    gradients = fused_norm.normalize_act_gradients
    noted = lambda *given: found.append(given[10] is not None) or gradients(*given)  # noqa: E731
    monkeypatch.setattr(fused_norm, "normalize_act_gradients", noted)
    torch.manual_seed(0)
    model = randomize(Gated()).double().train()
    assert_each_exact(model, [(image(*shape), tile) for tile in (24, 200)])
    found.clear()
    step(accelerate(model, tile=200), image(*shape), image_gradient=False)
    assert sum(found) == adds


def test_several_sizes(fused_with_stock_ops: None) -> None:
    """Images side by side: the statistics are those of all of them, the tiles those of each."""
    model, images = build(), [image(1, 1, 64, 48), image(1, 1, 40, 72)]
    fast, results = accelerate(copy.deepcopy(model)), []
    for tile, enabled in ((24, False), (24, True), (100, True)):
        fast.tile = (tile, tile)
        take_state(fast, model)
        fast.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "enabled", lambda device, enabled=enabled: enabled)
            outputs = torch.cat(list(fast(images)))
            outputs.square().sum().backward()
        results.append((outputs, {name: p.grad for name, p in fast.named_parameters()}))
    expected, *found = results
    for outputs, gradients in found:
        torch.testing.assert_close(outputs, expected[0], rtol=1e-12, atol=1e-12)
        wrong = errors(expected[1], gradients)
        assert max(wrong.values()) < 1e-11, wrong


def test_with_triton_kernels() -> None:
    with choice.override("triton"):
        assert_exact(build(nn.ReLU), image(1, 1, 24, 17), tile=(16, 24))


def test_under_autocast(fused_with_stock_ops: None) -> None:
    """As near to float64 as stock PyTorch comes, where the gradient is not zero in exact arithmetic."""
    assert_near_under_autocast(build(), image(1, 1, 96, 80), tile=32, floor=FLOOR)


class TestFusing:
    """Which ops become one."""

    def test_norms_take_sums_and_activations_and_convolutions_of_a_pixel(self, fused_with_stock_ops: None) -> None:
        net = accelerate(build(), tile=32)
        net(image(1, 1, 64, 64))
        names = [local.op.name for stage in stages(net) for local in stage.locals]
        fused = {"fused_conv2d", "fused_normalize", "fused_norm_conv", "max_pool2d"}
        assert set(names) == {*fused, "avg_pool2d", "add", "relu"}
        assert names.count("add") == names.count("relu") == 1, "after the pooling"
        assert names.count("fused_norm_conv") == 2, "the padded one stays apart"

    def test_an_activation_behind_a_sum_that_does_not_show_its_slope_stays_apart(
        self, fused_with_stock_ops: None
    ) -> None:
        net = accelerate(build(nn.SiLU), tile=32)
        net(image(1, 1, 64, 64))
        names = [local.op.name for stage in stages(net) for local in stage.locals]
        assert names.count("silu") == 3 and names.count("add") == 1

    def test_statistics_come_out_of_convolutions_in_the_first_pass_alone(
        self, fused_with_stock_ops: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[bool] = []
        plain = fused_conv.conv2d_moments
        for module in (fused_conv, fused_norm):
            monkeypatch.setattr(module, "conv2d_moments", lambda *args: calls.append(True) or plain(*args))
        from gigamorph.kernels import moments

        monkeypatch.setattr(moments, "moments_of_each", None)  # nothing is read a second time for its statistics
        net = accelerate(build(), tile=200)
        loss = net(image(1, 1, 64, 64)).square().sum()
        first = len(calls)
        assert first == 12, "one for each norm"
        loss.backward()
        assert len(calls) == first

    def test_norms_without_parameters_and_normalization_by_length(self, fused_with_stock_ops: None) -> None:
        """F.batch_norm without a module, without parameters, in a function."""

        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(F.batch_norm(self.conv(x), None, None, training=True))
                return F.normalize(x, dim=1).mean((2, 3))

        torch.manual_seed(0)
        assert_exact(Bare().double(), image(1, 1, 30, 41), tile=(16, 16))
