"""A tile's bytes, counted on meta tensors as on fake ones; schedules made once for all choices of stored maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gigamorph import plan
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.errors import BudgetError
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.models import create_model
from gigamorph.engine.models.resnet import BasicBlock, ResNet
from gigamorph.engine.planning import constants, simulate
from gigamorph.engine.tiling import stage as tiling
from gigamorph.engine.tiling.scan import Autocast
from gigamorph.engine.tiling.stage import TiledStage


class Held(nn.Module):
    """A network that blurs by weights of its forward's own, and casts in a part of it."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.conv, self.casts = nn.Conv2d(3, 4, 3, padding=1), casts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv2d(self.conv(x), torch.ones(4, 1, 3, 3) / 9, groups=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.casts):
            return nn.functional.conv2d(x, self.conv.weight[:, :1].repeat(1, 4, 1, 1)).mean((2, 3))


def first(name: str, *parts: str) -> nn.Module:
    """The first layers of one of timm's networks."""
    whole = create_model(f"timm:{name}", in_channels=3, num_classes=2)
    return nn.Sequential(*map(whole.get_submodule, parts), nn.AdaptiveAvgPool2d(1))


NETWORKS = {
    "lesionnet": lambda: create_model("lesionnet", in_channels=3).train(),
    "resnet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), in_channels=3).eval(),
    "mobilenet, live": lambda: first(
        "mobilenetv3_small_050", "conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"
    ).train(),
    "convnext": lambda: first("convnext_atto", "stem", "stages.0", "stages.1").eval(),
    "weights of its own": lambda: Held(casts=False),
    "casts": lambda: Held(casts=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_tensors_count_what_fake_ones_do(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = lower(capture(NETWORKS[name](), (1, 3, 160, 160), torch.float32, "cpu"))
    prepare(staged, training)
    wanted = staged.trainable() if training else set()
    for stage in staged.stages[:: max(1, len(staged.stages) // 3)]:
        tiled, values = TiledStage(stage, (48, 64)), stage.program.values
        with ExitStack() as stack:
            stack.enter_context(simulate.on_devices(None, values))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            fake = simulate._tile_peak(stage, tiled, training, wanted, Autocast.current(torch.device("cpu")))
        if name != "casts":  # which alone needs tensors that know their device
            monkeypatch.setattr(simulate, "FakeTensorMode", None)
        counted = simulate.tile_peak(stage, tiled, training, wanted)
        assert counted == pytest.approx(fake, rel=0.01)
        assert counted[0] > 0 and {value.device.type for value in values} == {"cpu"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*NETWORKS, "unet"])
def test_the_peak_of_stock_is_that_of_a_real_step(name: str, training: bool) -> None:
    net = create_model("unet", in_channels=3).train() if name == "unet" else NETWORKS[name]()
    with torch.set_grad_enabled(training):
        counted = simulate.stock_peak(capture(net, (1, 3, 160, 128), torch.float32, "cpu"), training)
        image, own = torch.randn(1, 3, 160, 128), list(net.parameters())
        with simulate.StorageMeter() as meter:
            meter.ignore(image, own, list(net.buffers()))
            result = net(image).sum()
            if training:
                torch.autograd.grad(result, own)
    # Variables of a forward may keep tensors, which training mostly needs anyway.
    assert (0.99 if training else 0.75) * meter.peak <= counted <= 1.01 * meter.peak


def test_without_a_budget_a_step_takes_no_more_memory_than_stock() -> None:
    made = plan(create_model("resnet18").train(), (1, 1, 1536, 1536))
    assert made.stock_bytes is not None and made.retained > 1
    assert made.peak_bytes <= constants.STOCK_SHARE * made.stock_bytes + constants.STOCK_BYTES


CHANNELS_LAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv": lambda x, w: F.conv2d(x, w),
    "conv of one filter": lambda x, w: F.conv2d(x, w[:1]),
    "strided conv": lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    "pointwise conv": lambda x, w: F.conv2d(x, w[:, :, :1, :1]),
    "depthwise conv": lambda x, w: F.conv2d(x, w[:16, :1], groups=16),
    "transposed conv": lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1).contiguous(), stride=2),
    "channel shuffle": lambda x, _: F.channel_shuffle(x, 4),
    "pixel shuffle": lambda x, _: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x, _: F.pixel_unshuffle(x, 2),
    "reflect": lambda x, _: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x, _: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "roll": lambda x, _: x.roll((1, 2), (2, 3)),
    "cat": lambda x, w: torch.cat([x, F.conv2d(x, w, padding=1)], 1),
    "bilinear": lambda x, _: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pool": lambda x, _: F.max_pool2d(x, 3, 2, 1),
}


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_maps_lie_on_meta_tensors_as_they_do_on_the_cpu(name: str) -> None:
    """Else copies are counted that nobody makes: of a U-Net in inference a third of a tile."""

    def strides(device: str) -> list[tuple[int, ...]]:
        x = torch.rand(1, 16, 12, 12, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = CHANNELS_LAST[name](x, torch.rand(24, 16, 3, 3, device=device))
        grad = torch.rand(y.shape, device=device).contiguous(memory_format=torch.channels_last)
        return [y.stride(), torch.autograd.grad(y, x, grad)[0].stride()]

    with simulate._OnMeta():
        found = strides("meta")
    assert found == strides("cpu")


def test_a_schedule_is_made_once_for_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of stored maps have most of their stages in common; each is tried in every tile."""
    made, wanted = [], []
    schedule_axis = tiling.schedule_axis

    def counted(tile: int, size: int, sources: dict[int, int], reads: object, **more: object) -> object:
        made.append((tile, size, tuple(sources), reads))
        return schedule_axis(tile, size, sources, reads, **more)  # pyright: ignore

    monkeypatch.setattr(tiling, "schedule_axis", counted)
    original = TiledStage._schedule
    monkeypatch.setattr(TiledStage, "_schedule", lambda *given: (wanted.append(1), original(*given))[1])
    net = create_model("resnet18", in_channels=1).train()
    with pytest.raises(BudgetError):
        plan(net, (1024, 1024), "125MiB")
    assert max(Counter(made).values()) == 2 and len(made) < len(wanted) / 4  # rows and columns of a square are two
