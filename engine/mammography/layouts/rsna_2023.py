"""First place of the RSNA 2023 mammography competition (dangnh0611/kaggle_rsna_breast_cancer): timm's ConvNeXt-S.

A checkpoint of timm's training script, with one sigmoid output after a global maximum; the submission averages the
probabilities of four such networks (one per fold), which `gigamorph import A B C D` does. Images are cropped to the
breast, windowed, resized to 2048 x 1024 with black borders, and repeated in three channels with ImageNet's mean and
standard deviation. As in timm, averaged weights (state_dict_ema) are preferred. Source: src/submit, MIT.
"""

from __future__ import annotations

from ...models.checkpoints import WeightFile
from ...models.folder import Preprocessing
from ...models.outputs import Outputs
from ...published.layout import Part

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def recognises(state: WeightFile) -> bool:
    """Whether it is timm's ConvNeXt-S with a single output."""
    head, third = state.tensors.get("head.fc.weight"), state.tensors.get("stages.2.blocks.26.gamma")
    return head is not None and tuple(head.shape) == (1, 768) and third is not None


def parts(state: WeightFile) -> list[Part]:
    """Return the network."""
    return [
        Part(
            name="convnext",
            model="timm:convnext_small.fb_in22k_ft_in1k_384?global_pool=max",
            outputs=Outputs.of("sigmoid", 1),
            preprocessing=Preprocessing(3, _MEAN, _STD, size=(2048, 1024), fit="pad"),
            licence="MIT",
        )
    ]
