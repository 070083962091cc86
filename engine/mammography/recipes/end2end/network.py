"""The patch network, and its conversion into a whole-image network (Shen et al., 2017, 2019).

Both have submodules with the same names, which stages refer to: ``features`` (the backbone up to its last maps),
``top`` (the new blocks of the whole-image network), ``heatmap`` (its variant) and ``head`` (the classifier).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ....errors import GigamorphError
from ....models import build_model
from ....models.resnet import ResNet
from ....morph.running import eval_mode
from ..features import UpTo
from ..weights import load_pretrained
from .config import CLASSES, Model, TopBlock


class FeatureMaps(nn.Module):
    """A network up to its last maps, by its ``forward_features`` (as in timm)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for name in ("fc", "head", "classifier", "pre_logits"):  # parameters without a gradient
            if isinstance(getattr(net, name, None), nn.Module):
                setattr(net, name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)  # pyright: ignore[reportCallIssue]


def features(spec: str, channels: int, weights: str | Path | None = None, layer: str | None = None) -> nn.Module:
    """Build the backbone ``spec`` up to its last maps, or up to a module: (N, channels, H, W) -> (N, C, h, w)."""
    net = build_model(spec, 2, channels)
    if layer is not None:
        maps, named = UpTo(net, layer), net
    elif isinstance(net, ResNet):
        parts = [(name, part) for name, part in net.named_children() if name not in ("avgpool", "fc")]
        named = maps = nn.Sequential(OrderedDict(parts))
    elif hasattr(net, "forward_features"):
        maps, named = FeatureMaps(net), net
    else:
        raise GigamorphError(f"backbone {spec!r} does not define its features; set layer to a module")
    if weights is not None:
        load_pretrained(named, weights)
    return maps


class PatchNet(nn.Module):
    """(N, channels, h, w) -> (N, 5): features, their mean, and a classifier."""

    def __init__(self, maps: nn.Module, width: int, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.features = maps
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class StridedBottleneck(nn.Module):
    """1x1 (with the stride), 3x3, 1x1 convolutions; the skip is a strided projection in a block's first unit."""

    def __init__(self, inputs: int, depth: int, expand: int, stride: int) -> None:
        super().__init__()
        out = depth * expand
        self.body = nn.Sequential(
            nn.Conv2d(inputs, depth, 1, stride),
            nn.BatchNorm2d(depth),
            nn.ReLU(),
            nn.Conv2d(depth, depth, 3, padding=1),
            nn.BatchNorm2d(depth),
            nn.ReLU(),
            nn.Conv2d(depth, out, 1),
            nn.BatchNorm2d(out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != out:
            self.skip = nn.Sequential(nn.Conv2d(inputs, out, 1, stride), nn.BatchNorm2d(out))
        self.relu, self.dropout = nn.ReLU(), nn.Dropout2d(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.relu(self.body(x) + self.skip(x)))


def top_blocks(inputs: int, blocks: Sequence[TopBlock]) -> tuple[nn.Sequential, int]:
    """Build the blocks on top of the features with He's initialisation; return them and their number of maps."""
    layers = nn.Sequential()
    for block in blocks:
        if block.kind == "residual":
            for unit in range(block.repeat):
                layers.append(StridedBottleneck(inputs, block.depth, block.expand, 2 if unit == 0 else 1))
                inputs = block.depth * block.expand
        else:
            for _ in range(block.repeat):
                layers += nn.Sequential(
                    nn.Conv2d(inputs, block.depth, 3, padding=1),
                    nn.BatchNorm2d(block.depth),
                    nn.ReLU(),
                    nn.Dropout2d(0.0),
                )
                inputs = block.depth
            layers.append(nn.MaxPool2d(2))
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return layers, inputs


class Connected(nn.Module):
    """Maps of one size, flattened, through fully connected layers: (N, inputs) -> (N, widths[-1])."""

    def __init__(self, inputs: int, widths: Sequence[int], shortcut: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.0)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Linear(inputs, 2) if shortcut else None
        """Directly to the two outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WholeNet(nn.Module):
    """(N, channels, H, W) -> (N, 2): the patch network's features, optionally its class maps, blocks, a classifier."""

    def __init__(self, maps: nn.Module, heatmap: nn.Module | None, top: nn.Sequential | Connected, width: int) -> None:
        super().__init__()
        self.features, self.heatmap, self.top = maps, heatmap, top
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.heatmap is not None:
            x = self.heatmap(x)
        if not isinstance(self.top, Connected):
            return self.head(self.top(x).mean((2, 3)))
        x = x.flatten(1)
        logits = self.head(self.top(x))
        return logits if self.top.shortcut is None else logits + self.top.shortcut(x)


def convert(patch: PatchNet, model: Model, size: tuple[int, ...] = (), channels: int = 3) -> WholeNet:
    """Build a whole-image network from a trained patch network, which stays unchanged.

    Args:
        size: height and width of the images, which fully connected layers need.
        channels: of the images.

    With ``heatmap``, the patch network's classifier becomes a 1x1 convolution with the same weights on the maps, and
    only its classes (ReLU, max-pooled) are passed on.
    """
    maps, classifier = copy.deepcopy(patch.features), patch.head[-1]
    assert isinstance(classifier, nn.Linear)
    width, heatmap = classifier.in_features, None
    if model.heatmap:
        conv = nn.Conv2d(width, classifier.out_features, 1)
        with torch.no_grad():
            conv.weight.copy_(classifier.weight[:, :, None, None])
            conv.bias.copy_(classifier.bias)  # pyright: ignore[reportOptionalMemberAccess]
        mean, largest = model.heatmap_pool
        heatmap = nn.Sequential(
            OrderedDict(mean=nn.AvgPool2d(mean, 1), classes=conv, relu=nn.ReLU(), pool=nn.MaxPool2d(largest))
        )
        width = classifier.out_features
    if not model.fc:
        top, width = top_blocks(width, model.blocks)
        return WholeNet(maps, heatmap, top, width).to(classifier.weight)
    parts = nn.Sequential(maps, nn.Identity() if heatmap is None else heatmap)
    with eval_mode(parts), torch.no_grad():
        inputs = parts(torch.zeros(1, channels, *size).to(classifier.weight))[0].numel()
    return WholeNet(maps, heatmap, Connected(inputs, model.fc, model.shortcut), model.fc[-1]).to(classifier.weight)
