"""Frozen BatchNorms that no convolution has taken in, as of DenseNet and pre-activation networks, by the kernels."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact, assert_near_under_autocast, randomize
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import accelerate, kernels
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower
from gigamorph.kernels import choice

if not torch.cuda.is_available():
    import interpreter

    interpreter.install()

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "none": nn.Identity}


class Layer(nn.Module):
    """Norm, activation, convolution of a pixel; norm (folded), activation, convolution: joined to its input."""

    def __init__(self, channels: int, act: type[nn.Module], **norm: bool):
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(channels, **norm),
            act(),
            nn.Conv2d(channels, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            act(),
            nn.Conv2d(6, 3, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.main(x)], 1)


class Net(nn.Module):
    """Two dense layers, a transition, a block whose norm is followed by a sum, and a norm that two ops read."""

    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3, 2, 1)
        self.layers = nn.Sequential(Layer(5, act), Layer(8, act, affine=False))
        self.transition = nn.Sequential(nn.BatchNorm2d(11), act(), nn.Conv2d(11, 6, 1), nn.AvgPool2d(2))
        self.pooled, self.norm = nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(6)
        self.act, self.last, self.head = act(), nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self.layers(self.stem(x)))
        x = self.act(self.norm(self.pooled(x)) + x)
        y = self.last(x)
        return self.head((self.act(y) * y).mean((2, 3)))


def build(act: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(ACTIVATIONS[act])).double().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


def names(training: bool) -> list[str]:
    staged = lower(capture(build(), (1, 1, 64, 64), torch.float64, "cpu"))
    prepare(staged, training)
    return [local.op.name for stage in staged.stages for local in stage.locals]


@settings(deadline=None, max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    act=st.sampled_from(list(ACTIVATIONS)),
    images=st.integers(1, 2),
    size=st.tuples(st.integers(12, 44), st.integers(12, 44)),
    tile=st.tuples(st.integers(6, 48), st.integers(6, 48)),
    still=st.sampled_from(["", "layers.0.main.0.weight", "layers.0.main.0", "norm", "stem"]),
)
def test_equals_stock(
    fused_with_stock_ops: None, act: str, images: int, size: tuple[int, int], tile: tuple[int, int], still: str
) -> None:
    """Outputs, gradients of parameters (all, or all but some) and of the image."""
    model = build(act)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not still or not name.startswith(still))
    assert_exact(model, image(images, 1, *size), tile=tile)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_with_triton_kernels(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    monkeypatch.setattr(kernels, "enabled", lambda device: True)
    with choice.override("triton"):
        assert_exact(build(act), image(1, 1, 24, 17), tile=(16, 24))


def test_statistics_that_change_between_steps(fused_with_stock_ops: None) -> None:
    model = build()
    net, x = accelerate(model, tile=24), image(1, 1, 40, 33)
    for _ in range(2):
        torch.testing.assert_close(net(x), model(x), rtol=1e-12, atol=1e-12)
        model.norm.running_mean.add_(1.0)
        model.layers[0].main[0].running_var.mul_(3.0)


@pytest.mark.parametrize("training", [True, False])
def test_norms_take_what_follows_them(fused_with_stock_ops: None, training: bool) -> None:
    found = names(training)
    assert "batch_norm" not in found
    # Of two layers, of the block's sum, and the last; the transition's takes the convolution as well.
    assert found.count("fused_normalize") == 4 and found.count("fused_norm_conv") == 1


def test_under_autocast(fused_with_stock_ops: None) -> None:
    """As near to float64 as stock PyTorch comes."""
    assert_near_under_autocast(build(), image(1, 1, 96, 80), tile=32)
