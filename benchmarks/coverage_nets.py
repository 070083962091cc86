"""The census's own networks: small U-Nets with transposed and interpolated upsampling, an FPN; parts of timm's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def double_conv(inside: int, outside: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [nn.Conv2d(channels, outside, 3, padding=1, bias=False), norm(outside), nn.ReLU(True)]
    return nn.Sequential(*layers)


class TimmFeatures(nn.Module):
    """The features of a timm model, or their pooled form before the classifier."""

    def __init__(self, model: nn.Module, what: str):
        super().__init__()
        self.model, self.what = model, what

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.forward_features(x)  # pyright: ignore[reportCallIssue]
        return x if self.what == "features" else self.model.forward_head(x, pre_logits=True)  # pyright: ignore[reportCallIssue]


class ThreeLevelUNet(nn.Module):
    """A U-Net with three levels; `ups` has the upsampling of each: "transposed", "nearest" or "bilinear"."""

    def __init__(self, ups: tuple[str, str], width: int = 8, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.ups = ups
        self.down = nn.ModuleList([double_conv(3, width, norm), double_conv(width, 2 * width, norm)])
        self.bottom = double_conv(2 * width, 4 * width, norm)
        lifts = zip((4 * width, 2 * width), (2 * width, width), ups, strict=True)
        self.transposed = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, 2) if how == "transposed" else nn.Conv2d(a, b, 1) for a, b, how in lifts
        )
        self.up = nn.ModuleList([double_conv(4 * width, 2 * width, norm), double_conv(2 * width, width, norm)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for how, lift, block in zip(self.ups, self.transposed, self.up, strict=True):
            x = lift(x)
            if how == "nearest":
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            if how == "bilinear":
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([skips.pop(), x], 1))
        return self.head(x)


class FPN(nn.Module):
    """Four stages with frozen norms, a top-down path that upsamples to the finer map's size, five output maps."""

    def __init__(self, width: int = 8, out: int = 8):
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), FrozenBatchNorm2d(width), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), FrozenBatchNorm2d(b), nn.ReLU())
            for a, b in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(channels, out, 1) for channels in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top = self.lateral[-1](maps[-1])
        pyramid = [top]
        for lateral, x in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            top = lateral(x) + F.interpolate(top, size=x.shape[-2:], mode="nearest")
            pyramid.insert(0, top)
        results = {f"p{i}": smooth(x) for i, (smooth, x) in enumerate(zip(self.smooth, pyramid, strict=True))}
        results["pool"] = F.max_pool2d(results["p3"], 1, 2, 0)
        return results


NETWORKS = {
    "unet_t": lambda: ThreeLevelUNet(("transposed", "transposed")),
    "unet_i": lambda: ThreeLevelUNet(("nearest", "bilinear")),
    "unet_in": lambda: ThreeLevelUNet(("transposed", "transposed"), norm=lambda n: nn.InstanceNorm2d(n, affine=True)),
    "fpn": FPN,
}
