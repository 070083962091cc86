"""Where the cells of maps lie: a bright pixel is found where it is, whatever a network's strides and paddings."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.lowering.geometry import Chain, Gather, Mirror, TransposedWindow, Window
from gigamorph.engine.lowering.receptive_field import ReceptiveField
from gigamorph.engine.models import LesionNet, ResNet, resnet18

PIXEL = ReceptiveField(0.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("access", "first", "stride", "extent"),
    [
        (Window(224, 112, 7, 2, 3), 0, 2, 7),
        (Window(224, 112, 2, 2, 0), 0.5, 2, 2),
        (Window(225, 112, 3, 2, 0), 1, 2, 3),
        (Window(64, 64, 3, 1, 2, 2), 0, 1, 5),
        (Window(64, 16, 4, 4, 0), 1.5, 4, 4),
        (Window(64, 54, pad=-10), 10, 1, 1),
        (Chain(Window(64, 32, 3, 2, 1), Window(32, 16, 3, 2, 1)), 0, 4, 7),
        (TransposedWindow(32, 64, 2, 2, 0), -0.25, 0.5, 1),
        (TransposedWindow(32, 64, 4, 2, 1), -0.25, 0.5, 2),
        (Mirror(64, 66, 1), -1, 1, 1),
        (Gather(8, 16, tuple(o // 2 for o in range(16))), -0.25, 0.5, 1),
        (Gather(20, 5, tuple(4 * o + 1 for o in range(5)), tuple(4 * o + 2 for o in range(5))), 1.5, 4, 2),
    ],
)
def test_of_one_op(access, first, stride, extent):
    found = PIXEL.through(access)
    assert found is not None
    assert (found.first, found.stride, found.extent) == pytest.approx((first, stride, extent), abs=1e-9)
    # As if the image went on: cells inside have the middle and the extent of what they read.
    spans = [access.span(o, o + 1) for o in range(access.size_out)]
    if stride >= 1:
        for o, (lo, hi) in list(enumerate(spans))[4:-4]:
            assert (found.first + found.stride * o, found.extent) == pytest.approx(((lo + hi - 1) / 2, hi - lo))


def test_what_follows_no_axis_has_no_place():
    assert PIXEL.through(Window(1, 64, stride=0)) is None


def conv(ins, outs, kernel, stride=1, padding=None, **more):
    padding = (kernel - 1) // 2 * more.get("dilation", 1) if padding is None else padding
    return nn.Sequential(nn.Conv2d(ins, outs, kernel, stride, padding, **more), nn.BatchNorm2d(outs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, ins, outs, stride=1, shortcut=None):
        super().__init__()
        self.body = nn.Sequential(conv(ins, outs, 3, stride), conv(outs, outs, 3))
        plain = nn.Identity() if stride == 1 else nn.Conv2d(ins, outs, 1, stride)
        self.shortcut = shortcut or plain

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class Dense(nn.Module):
    def __init__(self, ins, growth=4):
        super().__init__()
        self.layer = nn.Sequential(conv(ins, 8, 1), conv(8, growth, 3))

    def forward(self, x):
        return torch.cat([x, self.layer(x)], 1)


class Gated(nn.Module):
    """Depthwise, with a gate of the whole image."""

    def __init__(self, channels, kernel, stride):
        super().__init__()
        self.body = conv(channels, channels, kernel, stride, groups=channels)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.SiLU(inplace=True), nn.Conv2d(2, channels, 1)
        )

    def forward(self, x):
        x = self.body(x)
        return x * torch.sigmoid(self.gate(x))


class Same(nn.Module):
    """TensorFlow's padding: what an even size lacks comes after."""

    def __init__(self, ins, outs, kernel, stride):
        super().__init__()
        self.conv, self.kernel, self.stride = nn.Conv2d(ins, outs, kernel, stride), kernel, stride

    def forward(self, x):
        missing = [max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[-2:]]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
        return F.relu(self.conv(F.pad(x, [left, right, top, bottom])))


class UNet(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.fine, self.coarse = conv(1, 4, 3), nn.Sequential(nn.MaxPool2d(2), conv(4, 4, 3, 2), conv(4, 4, 3))
        self.up = up() if up is not None else nn.Upsample(scale_factor=4)
        self.last = conv(8, 4, 3)

    def forward(self, x):
        x = self.fine(x)
        return self.last(torch.cat([x, self.up(self.coarse(x))], 1))


class LastChannels(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.linear(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Cells(nn.Module):
    """Patches as channels, without a convolution, as in space-to-depth and Swin's merging."""

    def forward(self, x):
        return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


NETWORKS = {
    "ResNet": lambda: [conv(1, 4, 7, 2), nn.MaxPool2d(3, 2, 1), Residual(4, 4), Residual(4, 8, 2), Residual(8, 8)],
    "ResNet-D": lambda: [
        conv(1, 4, 3, 2),
        Residual(4, 4, 2, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 1))),
        Residual(4, 8, 2, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 1))),
    ],
    "VGG": lambda: [conv(1, 4, 3), nn.MaxPool2d(2), conv(4, 4, 3), nn.MaxPool2d(2), conv(4, 4, 3), nn.MaxPool2d(2)],
    "ConvNeXt": lambda: [nn.Conv2d(1, 4, 4, 4), LastChannels(4), nn.Conv2d(4, 4, 2, 2), LastChannels(4)],
    "patches": lambda: [Cells(), nn.Conv2d(4, 4, 1), Cells(), nn.Conv2d(16, 4, 1)],
    "dilated": lambda: [conv(1, 4, 3, 2), conv(4, 4, 3, 2), conv(4, 4, 3, dilation=2), conv(4, 4, 3, dilation=4)],
    "even kernels": lambda: [conv(1, 4, 4, 2, 1), conv(4, 4, 6, 2, 2), conv(4, 4, 4, 2, 0)],
    "no padding": lambda: [conv(1, 4, 5, 2, 0), conv(4, 4, 3, 2, 0), conv(4, 4, 3, 1, 0)],
    "TensorFlow": lambda: [Same(1, 4, 3, 2), Same(4, 4, 5, 2), Same(4, 4, 3, 2)],
    "padding to one side": lambda: [
        nn.ZeroPad2d((3, 0, 3, 0)), conv(1, 4, 4, 2, 0), nn.ZeroPad2d((0, 2, 0, 2)), conv(4, 4, 3, 2, 0)
    ],
    "DenseNet": lambda: [
        conv(1, 4, 7, 2), Dense(4), Dense(8), nn.Conv2d(12, 6, 1), nn.AvgPool2d(2), Dense(6), nn.AvgPool2d(2)
    ],
    "EfficientNet": lambda: [conv(1, 4, 3, 2), Gated(4, 3, 2), Gated(4, 5, 2)],
    "MobileNet": lambda: [
        conv(1, 4, 3, 2), conv(4, 4, 3, 2, groups=4), nn.Conv2d(4, 8, 1), nn.Hardswish(inplace=True),
        conv(8, 8, 3, 2, groups=8),
    ],
    "U-Net": lambda: [UNet(None)],
    "U-Net, bilinear": lambda: [UNet(lambda: nn.Upsample(scale_factor=4, mode="bilinear"))],
    "U-Net, transposed": lambda: [UNet(lambda: nn.ConvTranspose2d(4, 4, 4, 4))],
    "down and up": lambda: [conv(1, 4, 3, 2), conv(4, 4, 3, 2), nn.ConvTranspose2d(4, 4, 2, 2), conv(4, 4, 3)],
    "resized": lambda: [nn.Upsample(scale_factor=0.5, mode="bilinear"), conv(1, 4, 3, 2), conv(4, 4, 3, 2)],
    "reflected": lambda: [nn.ReflectionPad2d(3), conv(1, 4, 7, 2, 0), conv(4, 4, 3, 2)],
    "LesionNet": lambda: [LesionNet()],
    "resnet18": lambda: [resnet18(num_classes=2, in_channels=1)],
}  # fmt: skip


def positive(parts: list[nn.Module]) -> nn.Module:
    """A network of these parts that adds up what is bright, by equal positive weights."""
    net = parts[0]
    if not isinstance(net, (LesionNet, ResNet)):
        body = nn.Sequential(*parts).eval()
        channels = body(torch.zeros(1, 1, 64, 64)).shape[1]
        net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                module.weight.fill_(1 / module.weight[0].numel())
                if module.bias is not None:
                    module.bias.zero_()
    return net.double().eval()


def bright_pixels(height, width, seed, count=8):
    """Images (n, 1, height, width) with a bright pixel each, away from the border, and where it is (n, 2)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 2, generator=generator) * torch.tensor([height - 80, width - 80]) + 40
    places = places.long()
    images = torch.zeros(count, 1, height, width, dtype=torch.float64)
    images[torch.arange(count), 0, places[:, 0], places[:, 1]] = 1
    return images, places


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bright_pixel_is_within_half_a_cell_of_the_strongest_one(name):
    net = accelerate(positive(NETWORKS[name]()), tile=96)
    images, places = bright_pixels(168, 184, 1)
    found = net.evidence_map(images, lambda outputs: outputs[:, 1])
    for values, place in zip(found.values, places.double(), strict=True):
        top = (values >= values.max() * (1 - 1e-9)).nonzero().double().mean(0)
        for axis, cell, pixel in zip((found.rows, found.columns), top.tolist(), place.tolist(), strict=True):
            off = (axis.first + axis.stride * cell - pixel) / max(axis.stride, 1)
            assert abs(off) <= 0.5 + 1e-9, (name, off, axis)
