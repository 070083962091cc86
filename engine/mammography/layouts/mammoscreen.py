"""ianpan/mammoscreen on Hugging Face: three EfficientNetV2-S at three resolutions; cancer and density.

Each network is timm's without its classifier, an average pooling, and a linear layer with five outputs: a sigmoid for
cancer, a softmax over four densities. Their probabilities are averaged over networks and views. Images are 8-bit grey,
cropped to the breast, [0, 255] to [-1, 1]; two networks pad to an aspect ratio and stretch, the third pads to a square.
Source: config.json and README.md of the model, Apache-2.0.
"""

from __future__ import annotations

import re

from ...models.checkpoints import WeightFile
from ...models.folder import Preprocessing
from ...models.outputs import Head, Outputs
from ...published.layout import Part

_SIZES = ((2048, 1024), (1920, 1280), (1536, 1536))
_OUTPUTS = Outputs((Head(("cancer",), "sigmoid", 1, "cancer"), Head(("A", "B", "C", "D"), "softmax", 4, "density")))


def recognises(state: WeightFile) -> bool:
    """Whether a checkpoint has the names of such an ensemble."""
    return {"net0.backbone.conv_stem.weight", "net0.linear.weight"} <= state.tensors.keys()


def parts(state: WeightFile) -> list[Part]:
    """Return the networks of the ensemble."""
    found = sorted({int(m[1]) for name in state.tensors if (m := re.match(r"net(\d{1,3})\.", name))})
    return [
        Part(
            name=f"net{i}",
            model="timm:tf_efficientnetv2_s",
            outputs=_OUTPUTS,
            preprocessing=Preprocessing(
                1, (0.5,), (0.5,), size=_SIZES[i % 3], fit="pad" if _SIZES[i % 3] == (1536, 1536) else "widen"
            ),
            prefix=f"net{i}.",
            key_map=(("backbone.", ""), ("linear.", "classifier.")),
            licence="Apache-2.0",
        )
        for i in found
    ]
