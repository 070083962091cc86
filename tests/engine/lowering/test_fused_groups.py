"""GroupNorm, InstanceNorm and gates of one image by the kernels, with the sums and activations after them."""

from __future__ import annotations

import pytest
import torch
from exactness import FLOOR, assert_exact, assert_near_under_autocast, randomize
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

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU}
NORMS = {
    "groups": lambda channels: nn.GroupNorm(2, channels),
    "bare groups": lambda channels: nn.GroupNorm(2, channels, affine=False),
    "instances": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "bare instances": nn.InstanceNorm2d,
}


class Gate(nn.Module):
    """A factor for each channel of each image."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.ReLU(), nn.Conv2d(3, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True))


class Block(nn.Module):
    """A norm before a convolution of a pixel, one before a padded one, one before a gate, a sum, an activation."""

    def __init__(self, channels: int, out: int, stride: int, norm: str, act: type[nn.Module], gated: bool):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, 6, 3, stride, 1, bias=False),
            NORMS[norm](6),
            act(),
            nn.Conv2d(6, 8, 1),
            NORMS[norm](8),
            act(),
            nn.Conv2d(8, out, 3, padding=1, bias=False),
            NORMS[norm](out),
            *([Gate(out)] if gated else []),
        )
        self.skip = nn.Identity() if stride == 1 and out == channels else nn.Conv2d(channels, out, 1, stride)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + self.skip(x))


class Net(nn.Module):
    def __init__(self, norm: str, act: str):
        super().__init__()
        self.stem, kind = nn.Conv2d(1, 6, 3, 2, 1), ACTIVATIONS[act]
        self.blocks = nn.Sequential(
            Block(6, 6, 1, norm, kind, True), Block(6, 10, 2, norm, kind, False), Block(10, 10, 1, norm, kind, False)
        )
        self.last, self.head = NORMS[norm](10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))
        return self.head((x + x.sin()).mean((2, 3)))


def build(norm: str = "groups", act: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(norm, act)).double()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


@settings(deadline=None, max_examples=6, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    norm=st.sampled_from(list(NORMS)),
    act=st.sampled_from(list(ACTIVATIONS)),
    images=st.sampled_from([1, 1, 2]),
    size=st.tuples(st.integers(16, 44), st.integers(16, 44)),
    tile=st.tuples(st.integers(8, 48), st.integers(8, 48)),
    still=st.sampled_from(["", "blocks.0.main.1", "blocks.0.main.8", "blocks.1", "stem"]),
)
def test_equals_stock(
    fused_with_stock_ops: None,
    norm: str,
    act: str,
    images: int,
    size: tuple[int, int],
    tile: tuple[int, int],
    still: str,
) -> None:
    """Outputs, gradients of parameters (all, or all but some) and of the image."""
    model = build(norm, act)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not still or not name.startswith(still))
    assert_exact(model, image(images, 1, *size), tile=tile)


def names(images: int) -> list[str]:
    staged = lower(capture(build(), (images, 1, 64, 64), torch.float64, "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "enabled", lambda device: True)
        prepare(staged, training=True)
    return [local.op.name for stage in staged.stages for local in stage.locals]


def test_what_is_taken_together() -> None:
    """Ten norms, of which three take a convolution of a pixel and two a sum and an activation; a gate with both."""
    found = names(1)
    assert not {"scale_shift", "mul", "relu"} & set(found)
    assert found.count("fused_norm_conv") == 3 and found.count("fused_normalize") == 8


def test_several_images_have_numbers_of_their_own() -> None:
    assert names(2).count("scale_shift") == 10


@pytest.mark.parametrize("norm", ["groups", "bare instances"])
def test_with_triton_kernels(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    monkeypatch.setattr(kernels, "enabled", lambda device: True)
    with choice.override("triton"):
        assert_exact(build(norm), image(1, 1, 24, 17), tile=(16, 24))


@pytest.mark.parametrize("norm", list(NORMS))
def test_under_autocast(fused_with_stock_ops: None, norm: str) -> None:
    """As near to float64 as stock PyTorch comes, whose norms give float32."""
    assert_near_under_autocast(build(norm), image(1, 1, 96, 80), tile=32, floor=FLOOR)


def test_kernels_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of 16 bits beside those of 32."""
    monkeypatch.setattr(kernels, "enabled", lambda device: True)
    with choice.override("triton"):
        assert_near_under_autocast(build(), image(1, 1, 24, 20), tile=16, floor=FLOOR)


def test_parameters_that_change_between_steps(fused_with_stock_ops: None) -> None:
    model = build()
    net, x = accelerate(model, tile=24), image(1, 1, 40, 33)
    for _ in range(2):
        torch.testing.assert_close(net(x), model(x), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            model.last.weight.mul_(2.0)
            model.blocks[0].main[8].fc[0].bias.add_(1.0)
