"""The U-Net (Ronneberger et al., 2015): outputs logits at the image's resolution, for masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(N, in_channels, H, W) -> (N, num_classes, H, W), for images of any size.

    Each resolution has two convolutions with BatchNorm; 2 x 2 max pooling leads down, transposed convolutions up.
    Images are padded with zeros at the lower and right border to a multiple of ``2 ** depth``; the output is cropped.

    Args:
        num_classes: channels of the map.
        in_channels: image channels.
        width: channels at full resolution; doubled at each halving.
        depth: number of halvings of the resolution.
    """

    def __init__(self, num_classes: int = 2, in_channels: int = 1, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(_block(a, b) for a, b in zip([in_channels, *channels], channels, strict=False))
        ways_up = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, own, 2, 2) for below, own in ways_up)
        self.decoder = nn.ModuleList(_block(2 * own, own) for _, own in ways_up)
        self.head, self.pool = nn.Conv2d(width, num_classes, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.up)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
        skips = []
        for block in self.encoder[:-1]:
            skips.append(block(x))
            x = self.pool(skips[-1])
        x = self.encoder[-1](x)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)[..., :height, :width]
