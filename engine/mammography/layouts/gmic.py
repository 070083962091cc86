"""GMIC (nyukat/GMIC): only the global network, a ResNet-22 with saliency maps, which needs no crops.

The second half of GMIC cuts crops at high saliency, so its computation depends on the image; its weights are ignored.
The remaining prediction, y_global of its authors, is the mean of the largest t percent of each of the two saliency
maps (benign, malignant; sigmoids). t differs among the five published networks (0.02, 0.03, 0.03, 0.05, 0.1); the
file's name, such as sample_model_3.p, identifies the network. Images are cropped to 2944 x 1920 and standardised to
mean 0 and standard deviation 1. Source: src/modeling and src/constants.py, AGPL-3.0; the code here is our own.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ...errors import GigamorphError
from ...models.checkpoints import WeightFile
from ...models.folder import Preprocessing
from ...models.outputs import Head, Outputs
from ...published.layout import Part

_PERCENT = {"1": 0.02, "2": 0.03, "3": 0.03, "4": 0.05, "5": 0.1}


class _Block(nn.Module):
    """Pre-activation residual block; a skip with a convolution gets the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        skip = x if self.downsample is None else self.downsample(y)
        return self.conv2(torch.relu(self.bn2(self.conv1(y)))) + skip


class _ResNet22(nn.Module):
    """(N, channels, H, W) -> (N, 256, h, w)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.first_conv = nn.Conv2d(in_channels, 16, 7, 2, 3, bias=False)
        self.first_pool = nn.MaxPool2d(3, 2)
        self.layer_list = nn.ModuleList()
        channels = 16
        for number in range(5):
            outputs, stride = 16 * 2**number, 1 if number == 0 else 2
            blocks = _Block(channels, outputs, stride, True), _Block(outputs, outputs, 1, False)
            self.layer_list.append(nn.Sequential(*blocks))
            channels = outputs
        self.final_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_pool(self.first_conv(x))
        for layer in self.layer_list:
            x = layer(x)
        return torch.relu(self.final_bn(x))


class GlobalNetwork(nn.Module):
    """(N, in_channels, H, W) -> probabilities (N, num_classes): the mean of the largest values of saliency maps.

    Args:
        percent_t: the share of these values, 0 to 1.
        logits: return log-odds of the probabilities, for losses.
    """

    def __init__(
        self, num_classes: int = 2, in_channels: int = 1, percent_t: float = 0.02, logits: bool = False
    ) -> None:
        super().__init__()
        self.percent_t, self.logits = percent_t, logits
        self.ds_net = _ResNet22(in_channels)
        self.left_postprocess_net = nn.ModuleDict({"gn_conv_last": nn.Conv2d(256, num_classes, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.sigmoid(self.left_postprocess_net["gn_conv_last"](self.ds_net(x))).flatten(2)
        # At least one: GMIC's own images have maps of 46 x 30, smaller images might have none left.
        count = max(1, round(maps.shape[2] * self.percent_t))
        probabilities = maps.topk(count, 2)[0].mean(2)
        return torch.logit(probabilities) if self.logits else probabilities


def recognises(state: WeightFile) -> bool:
    """Whether it contains GMIC's global network."""
    return {"ds_net.first_conv.weight", "left_postprocess_net.gn_conv_last.weight"} <= state.tensors.keys()


def parts(state: WeightFile) -> list[Part]:
    """Return the global network.

    Raises:
        GigamorphError: the file's name does not identify the t of its training.
    """
    number = re.fullmatch(r"sample_model_([1-5])\.\w+", state.path.name)
    if number is None:
        known = ", ".join(f"sample_model_{name}.p {share}" for name, share in _PERCENT.items())
        raise GigamorphError(
            f"{state.path}: its name does not identify the t of its predictions ({known}); keep the published name"
        )
    percent = _PERCENT[number[1]]
    return [
        Part(
            name="gmic-global",
            model=f"{__name__}:GlobalNetwork?percent_t={percent}&logits=true",
            outputs=Outputs((Head(("benign", "malignant"), "sigmoid", 2),)),
            preprocessing=Preprocessing(1, per_image="standard", size=(2944, 1920), fit="pad"),
            ignored=("dn_resnet.", "mil_attn_", "classifier_linear.", "fusion_network."),
            licence="AGPL-3.0",
            size=(384, 320),
        )
    ]
