"""What every network has: convolutions, pools, norms, activations, residuals, gates."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .piece import Piece, conv


class Conv(Piece):
    weight = 20

    def make(self, width: int, dice: random.Random) -> None:
        self.conv = conv(width, dice)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvNormRelu(Piece):
    weight = 20

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.norm = conv(width, dice), nn.BatchNorm2d(width, momentum=dice.choice([0.1, 0.3]))
        self.act = nn.ReLU(inplace=dice.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bottleneck(Piece):
    weight = 8

    def make(self, width: int, dice: random.Random) -> None:
        self.first, self.second = conv(width), conv(width)
        self.norm = dice.choice([nn.Identity(), nn.BatchNorm2d(width), nn.GroupNorm(1, width)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).relu_()
        y = self.second(y)
        y += x
        return F.relu(y)


class Activation(Piece):
    weight = 6

    def make(self, width: int, dice: random.Random) -> None:
        make = dice.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Softplus, nn.Mish, nn.PReLU, nn.Tanh])
        self.act = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Pool(Piece):
    weight = 8

    def make(self, width: int, dice: random.Random) -> None:
        self.pool = dice.choice(
            [
                nn.MaxPool2d(2),
                nn.MaxPool2d(3, 2, 1),
                nn.AvgPool2d(2),
                nn.AvgPool2d(3, 1, 1),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if min(x.shape[-2:]) > 3 else x


class Up(Piece):
    weight = 4

    def make(self, width: int, dice: random.Random) -> None:
        self.up = dice.choice(
            [
                nn.Upsample(scale_factor=2),
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                nn.ConvTranspose2d(width, width, 2, 2),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if max(x.shape[-2:]) < 24 else x


class Norm(Piece):
    weight = 8

    def make(self, width: int, dice: random.Random) -> None:
        self.norm = dice.choice(
            [
                nn.BatchNorm2d(width),
                nn.BatchNorm2d(width, momentum=None),
                nn.GroupNorm(1, width),
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.BatchNorm2d(width, affine=False),
                nn.InstanceNorm2d(width),
                nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
                nn.LocalResponseNorm(2),
                nn.GroupNorm(width, width),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ChannelNorm(Piece):
    def make(self, width: int, dice: random.Random) -> None:
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


class Gate(Piece):
    """Squeeze and excite, or a gate of a pooled map by other means."""

    weight = 6

    def make(self, width: int, dice: random.Random) -> None:
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)
        self.how = dice.choice(["mean", "amax", "both"])

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        pooled = {"mean": mean, "amax": x.amax((2, 3), keepdim=True), "both": mean + x.amax((2, 3), keepdim=True)}
        return x * self.up(self.down(pooled[self.how]).relu()).sigmoid()


class Dropout(Piece):
    """With nothing random in it: p is 0 or 1, or it is in evaluation mode all the time."""

    def make(self, width: int, dice: random.Random) -> None:
        kind = dice.choice([nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
        self.drop = kind(dice.choice([0.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(x)


class Depthwise(Piece):
    def make(self, width: int, dice: random.Random) -> None:
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return self.point(torch.cat([a.sigmoid() * b, x], 1))


class Shuffle(Piece):
    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        return F.pixel_shuffle(F.pixel_unshuffle(x, 2).flip(1), 2) if min(x.shape[-2:]) else x


class Shift(Piece):
    """Padding, cropping, slices."""

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["pad", "crop", "step", "negative pad"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pad":
            return F.pad(x, (1, 2, 0, 1), value=0.5)
        if min(x.shape[-2:]) < 5:
            return x
        return {"crop": x[:, :, 1:-1, 2:], "step": x[..., ::2, 1::2], "negative pad": F.pad(x, (-1, 1, 1, -1))}[
            self.how
        ]
