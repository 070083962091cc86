"""Mammo-CLIP (batmanlab/Mammo-CLIP): the image tower, an EfficientNet-B5 or -B2, alone or with a linear classifier.

A pre-training checkpoint (.tar) has the tower in ``model`` as ``image_encoder.``, next to text encoder and projections.
Its networks are those of EfficientNet-PyTorch, which uses TensorFlow's padding for the network's nominal image size
(456 for B5, 260 for B2) at every size: `Tower` does the same, timm's EfficientNets do not. The tower outputs features.
A checkpoint of the authors' classifier adds a linear layer with one sigmoid output or several. Images are grey,
repeated in three channels, 1520 x 912; each is scaled to [0, 1] by its own minimum and maximum, then minus 0.3089279,
over 0.25053555408335154. Source: src/codebase.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.checkpoints import WeightFile
from ...models.folder import Preprocessing
from ...models.outputs import Outputs
from ...published.layout import Part

# Width factor, depth factor, nominal side of images.
_SCALES = {"b2": (1.1, 1.2, 260), "b5": (1.6, 2.2, 456)}
# Blocks of B0: repeats, kernel, stride, expansion, channels.
_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_TOWER = "image_encoder."


class _NominalConv(nn.Conv2d):
    """A convolution with the "same" padding of images of a nominal side, whatever their size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, side: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        self.before, self.after = total // 2, total - total // 2

    def forward(self, input: Tensor) -> Tensor:
        if self.before or self.after:
            input = F.pad(input, (self.before, self.after, self.before, self.after))
        return super().forward(input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted bottleneck with squeeze and excitation; parameter names are those of EfficientNet-PyTorch."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, side: int) -> None:
        super().__init__()
        inner, squeezed = inputs * expansion, max(1, inputs // 4)
        if expansion != 1:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _NominalConv(inner, inner, kernel, side, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._se_reduce, self._se_expand = nn.Conv2d(inner, squeezed, 1), nn.Conv2d(squeezed, inner, 1)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.expands, self.skips = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.silu(self._bn1(self._depthwise_conv(y)))
        y = torch.sigmoid(self._se_expand(F.silu(self._se_reduce(y.mean((2, 3), keepdim=True))))) * y
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class Tower(nn.Module):
    """(N, 3, H, W) -> (N, features), or (N, num_classes) after a linear layer if that is not 0.

    Args:
        size: "b5" or "b2".
        num_classes: outputs of the linear layer ``classifier``; 0 for the features (2048 of B5, 1408 of B2).
        in_channels: image channels; published towers have 3.
    """

    def __init__(self, size: str = "b5", num_classes: int = 0, in_channels: int = 3) -> None:
        super().__init__()
        width, depth, side = _SCALES[size]

        def scaled(channels: int) -> int:
            rounded = max(8, int(channels * width + 4) // 8 * 8)
            return rounded + 8 if rounded < 0.9 * channels * width else rounded

        channels = scaled(32)
        self._conv_stem, self._bn0 = _NominalConv(in_channels, channels, 3, side, 2), _norm(channels)
        side = -(-side // 2)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, outputs in _BLOCKS:
            for number in range(math.ceil(depth * repeats)):
                stride = stride if number == 0 else 1
                self._blocks.append(_Block(channels, scaled(outputs), kernel, stride, expansion, side))
                channels, side = scaled(outputs), -(-side // stride)
        features = scaled(1280)
        self._conv_head, self._bn1 = nn.Conv2d(channels, features, 1, bias=False), _norm(features)
        self.classifier = nn.Linear(features, num_classes) if num_classes else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.silu(self._bn1(self._conv_head(x))).mean((2, 3))
        return x if self.classifier is None else self.classifier(x)


def recognises(state: WeightFile) -> bool:
    """Whether it contains such a tower."""
    return f"{_TOWER}_conv_stem.weight" in state.tensors


def parts(state: WeightFile) -> list[Part]:
    """Return the tower, with the classifier if there is one."""
    width = len(state.tensors[f"{_TOWER}_bn1.weight"])
    size = "b2" if width == 1408 else "b5"
    # The weight of the linear layer after the tower, if there is one.
    head = next((n for n, t in state.tensors.items() if n.startswith("classifier.") and t.ndim == 2), "")
    others = ("text_encoder.", "image_projection.", "text_projection.", "logit_scale")
    return [
        Part(
            name=f"mammo-clip-{size}",
            model=f"{__name__}:Tower?size={size}",
            outputs=Outputs.of("sigmoid", len(state.tensors[head])) if head else Outputs.of("features", width),
            preprocessing=Preprocessing(
                3, (0.3089279,), (0.25053555408335154,), per_image="minmax", size=(1520, 912), fit="stretch"
            ),
            key_map=((_TOWER, ""), *(((head.removesuffix("weight"), "classifier."),) if head else ())),
            ignored=others,
            licence="Creative Commons: CC BY 4.0 or CC BY-NC-SA 4.0, see batmanlab/Mammo-CLIP",
        )
    ]
