"""The stage with fused convolutions and kernels gives what it gives without, which is what stock PyTorch gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exactness import assert_each_exact, assert_exact, assert_near_under_autocast, errors, randomize, step
from hypothesis import HealthCheck, assume, given, settings
from random_net import Program, examples, programs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gigamorph import GigamorphError, accelerate, kernels
from gigamorph.engine import verify as self_check
from gigamorph.engine.lowering.fused.conv import FusedConv
from gigamorph.engine.tiling.saved_tensors import SavedTensors
from gigamorph.kernels import choice, conv2d

if not torch.cuda.is_available():
    import interpreter

    interpreter.install()


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    with choice.override("triton"):
        yield


class Block(nn.Module):
    """A residual block with a strided 3 x 3 convolution."""

    def __init__(self, channels: int, middle: int, out: int, stride: int, act: type[nn.Module] = nn.ReLU):
        super().__init__()

        def conv(c: int, k: int, size: int, s: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(c, k, size, s, size // 2, bias=False), nn.BatchNorm2d(k)]

        self.main = nn.Sequential(
            *conv(channels, middle, 1), act(), *conv(middle, middle, 3, stride), act(), *conv(middle, out, 1)
        )
        same = stride == 1 and channels == out
        self.skip = nn.Identity() if same else nn.Sequential(*conv(channels, out, 1, stride))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + self.skip(x))


class Net(nn.Module):
    """Stem with max-pooling, two residual blocks, a depthwise convolution, pooling, linear."""

    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), act(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(8, 8, 8, 1, act), Block(8, 8, 16, 2, act))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.depthwise(self.blocks(self.stem(x)))).mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    """Of an (N, C, H, W) map, over its channels."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """With linear layers between permutes, as in torchvision, or with 1x1 convolutions, as timm can have it."""

    def __init__(self, channels: int, convolutions: bool, act: type[nn.Module] = nn.GELU):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = (LayerNorm2d if convolutions else nn.LayerNorm)(channels, eps=1e-6)
        layer = (lambda c, k: nn.Conv2d(c, k, 1)) if convolutions else nn.Linear
        self.mlp = nn.Sequential(layer(channels, 4 * channels), act(), nn.Dropout(0.0), layer(4 * channels, channels))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.convolutions = convolutions

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        y = self.mlp(self.norm(y if self.convolutions else y.permute(0, 2, 3, 1)))
        return x + (y if self.convolutions else y.permute(0, 3, 1, 2)) * self.gamma.reshape(1, -1, 1, 1)


class ConvNext(nn.Module):
    """Patches, two kinds of blocks, downsampling in between, a norm after the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 4, 4), LayerNorm2d(8))
        self.first = ConvNextBlock(8, False)
        self.down = nn.Sequential(LayerNorm2d(8, elementwise_affine=False), nn.Conv2d(8, 12, 2, 2))
        self.second = nn.Sequential(ConvNextBlock(12, True), ConvNextBlock(12, False, nn.ReLU))
        self.head = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.down(self.first(self.stem(x)))).mean((2, 3)))


def build_convnext() -> nn.Module:
    torch.manual_seed(0)
    return randomize(ConvNext()).double()


def build(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(act)).double().eval()


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ops_of(net: nn.Module) -> list[str]:
    (prepared,) = net._runner.programs
    (stage,) = prepared.staged.stages  # pyright: ignore
    return [local.op.name for local in stage.locals]


@settings(
    max_examples=examples(8),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(programs(max_steps=12))
def test_random_networks(fused_with_stock_ops: None, program: Program) -> None:
    model = program.build()
    x = torch.randn(program.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assume(all(leaf.isfinite().all() for leaf in tree_leaves(model(x))))
    assert_exact(model, x, tile=program.tile, halos=program.halos)


@pytest.mark.parametrize(
    ("act", "tiles"),
    [
        *((act, [24]) for act in (nn.ReLU6, nn.SiLU, nn.Hardswish)),
        *((act, [16, 200, 24]) for act in (nn.ReLU, nn.GELU)),
    ],
)
def test_blocks(fused_with_stock_ops: None, act: type[nn.Module], tiles: list[int]) -> None:
    assert_each_exact(build(act), [(image(75, 58), tile) for tile in tiles])


@pytest.mark.parametrize(("size", "tiles"), [((75, 58), (24, 200)), ((33, 64), (8, 24)), ((7, 5), (8, 200))])
def test_blocks_without_a_gradient_of_the_image(
    fused_with_stock_ops: None, size: tuple[int, int], tiles: tuple[int, ...]
) -> None:  # with the fused stem
    assert_like_stock(build(), image(*size), *tiles)


def test_inference(fused_with_stock_ops: None) -> None:
    model, x = build(), image(75, 58)
    fast = accelerate(model)
    with torch.no_grad():
        for fast.tile in ((8, 8), (24, 24), (200, 200)):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-13)


def test_inference_of_a_pair_that_adds_its_own_input(fused_with_stock_ops: None) -> None:
    """The first convolution reads a window of it, the sum its pixels."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return (self.b(self.a(x).relu()) + x).mean((2, 3))

    model, x = Sum().double(), image(40, 33)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(model, tile=24)(x), model(x), rtol=1e-12, atol=1e-13)


def assert_like_stock(model: nn.Module, x: Tensor, *tiles: int) -> None:
    """Outputs and parameter gradients; the image wants none."""
    expected, fast = step(model, x, image_gradient=False), accelerate(model)
    for tile in tiles:
        fast.tile = (tile, tile)
        got = step(fast, x, image_gradient=False)
        torch.testing.assert_close(got.outputs, expected.outputs, rtol=1e-12, atol=1e-13)
        wrong = {name: error for name, error in errors(expected.gradients, got.gradients).items() if error > 1e-12}
        assert not wrong, tile


@pytest.mark.parametrize("size", [(75, 58), (64, 64)])
def test_convnext(fused_with_stock_ops: None, size: tuple[int, int]) -> None:
    assert_each_exact(build_convnext(), [(image(*size), tile) for tile in (12, 24, 200)])


def test_convnext_with_triton_kernels(triton_kernels: None) -> None:
    assert_exact(build_convnext(), image(24, 17), tile=(16, 24))


def test_a_norm_before_a_padded_convolution_of_a_pixel(fused_with_stock_ops: None) -> None:
    """The padding is not normalised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), LayerNorm2d(8), nn.Conv2d(8, 4, 1, padding=1), nn.AdaptiveAvgPool2d(1))
    assert_exact(model.double(), image(50, 41), tile=(24, 24))


def test_frozen_parameters_of_a_norm(fused_with_stock_ops: None) -> None:
    """Each of the four may want no gradient."""
    model = build_convnext()
    model.first.norm.weight.requires_grad_(False)
    model.second[0].norm.bias.requires_grad_(False)
    model.second[0].mlp[0].weight.requires_grad_(False)
    model.second[1].mlp[0].bias.requires_grad_(False)
    assert_exact(model, image(50, 41), tile=(24, 24))


def test_convnext_under_autocast(fused_with_stock_ops: None) -> None:
    """As near to float64 as stock PyTorch comes: norms in float32, products in bfloat16."""
    assert_near_under_autocast(build_convnext(), image(96, 80), tile=32)


def test_blocks_with_triton_kernels(triton_kernels: None) -> None:
    model, x = build(nn.SiLU), image(28, 21)
    assert_like_stock(model, x, 20)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(model, tile=20)(x), model(x), rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("fused_with_stock_ops")
class TestFusing:
    def test_every_convolution_takes_what_follows_it(self) -> None:
        net = accelerate(build(), tile=32)
        net(image(64, 64))
        assert ops_of(net) == ["fused_stem", *["fused_conv2d"] * 8]

    def test_where_the_image_wants_a_gradient_the_stem_stays_apart(self) -> None:
        net = accelerate(build(), tile=32)
        net(image(64, 64).requires_grad_())
        assert ops_of(net) == ["fused_conv2d", "max_pool2d", *["fused_conv2d"] * 8]

    def test_a_norm_takes_the_linear_layer_behind_it(self) -> None:
        net = accelerate(build_convnext(), tile=32)
        net(image(64, 64))
        names = [name for name in ops_of(net) if name not in ("permute", "dropout", "mul", "add", "fused_normalize")]
        block = ["fused_conv2d", "fused_norm_linear", "fused_conv2d"]
        assert names == ["fused_conv2d", "layer_norm", *block, "layer_norm", "fused_conv2d", *block, *block]

    def test_who_masks(self) -> None:
        """Readers apply the slope where all of them are convolutions or pools, or the first gathers their gradients."""
        model = nn.Sequential(build().stem, Block(8, 8, 8, 1), Block(8, 8, 8, 1), Block(8, 8, 16, 2)).double().eval()
        x = image(64, 64)
        masked: list[bool] = []
        plain = FusedConv.forward

        def spy(ctx, *args):
            masked.append(args[4].masked)
            return plain(ctx, *args)

        FusedConv.forward = staticmethod(spy)
        try:
            accelerate(model, tile=64)(x.requires_grad_())
        finally:
            FusedConv.forward = staticmethod(plain)
        # stem; block 1: a, b, c (a summand of block 2, gathered); block 2: a, b, c; block 3: a, b, skip, c (the output)
        assert masked == [True, True, True, True, True, True, True, True, True, False, False]

    def test_a_window_in_its_margin_is_no_copy(self) -> None:
        """Where a convolution leaves room, the window of the next lies in the same memory."""
        net = accelerate(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).double(), tile=16)
        storages: list[tuple[int, int]] = []
        plain = FusedConv.forward

        def spy(ctx, x, *args):
            y = plain(ctx, x, *args)
            storages.append((x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()))
            return y

        FusedConv.forward = staticmethod(spy)
        try:
            with torch.no_grad():
                net(image(32, 32))
        finally:
            FusedConv.forward = staticmethod(plain)
        assert len(storages) == 8
        for (_, made), (read, _) in zip(storages[::2], storages[1::2], strict=True):
            assert made == read

    def test_sums_are_float32_for_16_bit_weights(self) -> None:
        """Twelve tiles of bfloat16: their weight gradients are added up before they are rounded."""
        torch.manual_seed(0)
        stock = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1)).bfloat16()
        x = image(48, 64).bfloat16()
        kept: list[torch.dtype] = []
        plain = kernels.conv2d.conv2d_wgrad_  # pyright: ignore

        def spy(dw, *args):
            kept.append(dw.dtype)
            return plain(dw, *args)

        kernels.conv2d.conv2d_wgrad_ = spy  # pyright: ignore
        try:
            accelerate(stock, tile=16)(x).sum().backward()
        finally:
            kernels.conv2d.conv2d_wgrad_ = plain  # pyright: ignore
        assert kept and set(kept) == {torch.float32}

    def test_one_op_on_what_stock_keeps_twice(self) -> None:
        """Nothing but y is saved for the backward: less than without."""
        x = image(256, 256)

        def held(enabled: bool) -> int:
            kernels.enabled = lambda device: enabled
            net = accelerate(build(), tile=256)
            saved: dict[int, int] = {}
            plain = SavedTensors._pack

            def pack(self: SavedTensors, t: Tensor):
                saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
                return plain(self, t)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SavedTensors, "_pack", pack)
                net(x).sum().backward()
            return sum(saved.values())

        assert held(True) < held(False)


def test_verify_runs_the_kernels_whatever_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the choice may fall on a kernel for other sizes than the small ones that are checked."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(kernels, "enabled", lambda device: True)
    monkeypatch.setattr(self_check, "_SIZES", ((21, 17),))
    verify = lambda: accelerate(model.eval(), verify=True)  # noqa: E731
    verify()
    launch = conv2d.dense_forward.launch

    def wrong(x: Tensor, weight: Tensor, y: Tensor, *more: Any, **options: Any) -> Any:
        result = launch(x, weight, y, *more, **options)
        y.mul_(1 + 1e-6)
        return result

    monkeypatch.setattr(conv2d.dense_forward, "launch", wrong)
    with pytest.raises(GigamorphError, match=r"with all kernels\); .* or set GIGAMORPH_KERNELS=stock"):
        verify()
