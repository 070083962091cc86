"""Options of end2end; the defaults are those of ``configs/end2end.toml``, which lists their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....errors import GigamorphError
from ....train.stages import Stage
from ..defaults import published
from ..splits import ImagesConfig

CLASSES = ("background", "calc_mal", "calc_ben", "mass_mal", "mass_ben")
"""Classes of patches, in the order of the patch network's outputs."""


@dataclass(frozen=True)
class Sampling:
    """Sampling of patches; of the published sets, S1 has 1 and 1, S10 has 10 and 10, S30 has 30 and 30."""

    side: int = 224
    per_lesion: int = 10
    """1 uses the patch around the lesion's centroid."""
    background: int = 10
    """Patches per image."""
    positive: float = 0.9
    """Minimal overlap with the lesion, as a share of the lesion or of the patch."""
    negative: float = 0.35
    """Maximal overlap of a background patch with any lesion, as a share."""

    def __post_init__(self) -> None:
        if self.side < 1 or self.per_lesion < 1 or self.background < 0:
            raise GigamorphError("side and per_lesion must be 1 or more, background 0 or more")
        if not 0 < self.positive <= 1 or not 0 <= self.negative < 1:
            raise GigamorphError(f"overlaps positive = {self.positive}, negative = {self.negative} must be shares")


@dataclass(frozen=True)
class TopBlock:
    """A block on top of the whole-image network; each halves the resolution."""

    kind: Literal["residual", "vgg"]
    """"residual": `repeat` units of 1x1, 3x3, 1x1 convolutions; "vgg": `repeat` 3x3 convolutions and max-pooling."""
    depth: int
    repeat: int = 1
    expand: int = 4
    """A residual block has expand x depth output channels: [512-512-2048] is depth 512, expand 4."""


@dataclass(frozen=True)
class Model:
    """A whole-image network: the features of a patch network, and the layers on top."""

    name: str = "resnet50"
    backbone: str = "resnet50"
    weights: str = "resnet50-0676ba61.pth"
    """Weights file from which the patch network's backbone starts, or "random"."""
    layer: str | None = None
    """The module whose output is the features; None if the backbone defines them (a `forward_features`)."""
    blocks: tuple[TopBlock, ...] = (TopBlock("residual", 512, 2, 2), TopBlock("residual", 512, 2, 2))
    heatmap: bool = False
    """Whether the patch network's class maps (five) are inserted between features and blocks."""
    heatmap_pool: tuple[int, int] = (7, 5)
    """Sides of the mean pooling (stride 1) before the classes, and of the max pooling after them."""
    fc: tuple[int, ...] = ()
    """Widths of fully connected layers that replace the blocks (which must be empty): 64 and 32 on the poster, on the
    heat map."""
    shortcut: bool = False
    """Whether the two outputs also get the input of the fully connected layers."""
    front: int = 0
    """Above 1: the trained network gets MorphHR's front, which makes it the same function of images this many times
    as large along each side, and is trained further on them (`native`)."""
    patch: tuple[Stage, ...] = ()
    """Stages of this backbone's patch network; empty for those of the configuration. If several models share backbone
    and weights, the first one has them."""


@dataclass(frozen=True)
class End2EndConfig(ImagesConfig):
    """Shen's all convolutional design: patch network, whole-image network, ensemble, transfer."""

    resize: tuple[int, ...] = (1152, 896)
    """Height and width of the images; empty for native resolution."""
    mean: tuple[float, ...] = (52.18 / 255,)
    std: tuple[float, ...] = (0.226,)
    fractions: tuple[float, float, float] = (0.765, 0.085, 0.15)
    sampling: Sampling = Sampling()
    models: tuple[Model, ...] = (Model(),)
    """Several models form an ensemble, whose probabilities are averaged; a backbone's patches are learnt once."""
    augment: str = "flip,rotate=25,scale=0.2,shear=11.5,brightness=0.078"
    flips: bool = True
    """Average predictions over the mirrored images that the augmentation draws."""
    patch: tuple[Stage, ...] = published("end2end", "patch", Stage)
    whole: tuple[Stage, ...] = published("end2end", "whole", Stage)
    native: tuple[Stage, ...] = published("end2end", "native", Stage)
    """Stages of networks with a front."""
    start: str | None = None
    """Folder of a finished run on another data set, whose whole-image networks are transferred without patches."""
    transfer: tuple[Stage, ...] = published("end2end", "transfer", Stage)
    patients: tuple[int, ...] = ()
    """Numbers of training patients in the transfer's learning curve; empty for all."""

    def __post_init__(self) -> None:
        if len(self.resize) not in (0, 2):
            raise GigamorphError(f"resize = {list(self.resize)} must be height and width, or empty")
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise GigamorphError("models must have different names, and there must be at least one")
        for model in self.models:
            if model.fc and (model.blocks or not self.resize):
                raise GigamorphError(f"model {model.name!r}: fc needs blocks = [] and images of one size (resize)")
            if model.front and (model.front < 2 or model.fc or not self.resize):
                raise GigamorphError(f"model {model.name!r}: front must be 2 or more, with blocks on one image size")
            if model.shortcut and not model.fc:
                raise GigamorphError(f"model {model.name!r}: shortcut bypasses fully connected layers; set fc")
        learnt = [(model.backbone, model.weights, model.layer) for model in self.models]
        for number, model in enumerate(self.models):
            if model.patch and learnt[number] in learnt[:number]:
                raise GigamorphError(
                    f"model {model.name!r}: its patch network is that of an earlier model; remove patch"
                )
        if self.patients and self.start is None:
            raise GigamorphError("patients define the transfer's learning curve; set start to the run to transfer")
