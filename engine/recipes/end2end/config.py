"""What end2end can be told; the defaults are those of ``configs/end2end.toml``, which names their sources."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...errors import GigamorphError
from ...train.stages import Stage
from ..splits import SplitOf

CLASSES = ("background", "calc_mal", "calc_ben", "mass_mal", "mass_ben")
"""Of patches, in the order of the patch network's outputs."""


@dataclass(frozen=True)
class Sampling:
    """Patches; of the published sets S1 has 1 and 1, S10 has 10 and 10, S30 has 30 and 30."""

    side: int = 224
    per_lesion: int = 10
    """1 takes the patch around the lesion's centroid."""
    background: int = 10
    """Of each image."""
    positive: float = 0.9
    """Share of the lesion, or of the patch, in which both must overlap."""
    negative: float = 0.35
    """Share in which a background patch may overlap with any lesion at most."""

    def __post_init__(self) -> None:
        if self.side < 1 or self.per_lesion < 1 or self.background < 0:
            raise GigamorphError("side and per_lesion must be 1 or more, background 0 or more")
        if not 0 < self.positive <= 1 or not 0 <= self.negative < 1:
            raise GigamorphError(f"overlaps positive = {self.positive}, negative = {self.negative} are no shares")


@dataclass(frozen=True)
class Block:
    """A block of the whole-image network's top; each halves the resolution."""

    kind: Literal["residual", "vgg"]
    """"residual": `repeat` units of 1x1, 3x3, 1x1 convolutions; "vgg": `repeat` 3x3 convolutions and max-pooling."""
    depth: int
    repeat: int = 1
    expand: int = 4
    """A residual block has expand x depth output channels: [512-512-2048] is depth 512, expand 4."""


@dataclass(frozen=True)
class Model:
    """A whole-image network: the features of a patch network, and what is put on top."""

    name: str = "resnet50"
    backbone: str = "resnet50"
    weights: str = "resnet50-0676ba61.pth"
    """A file of weights that the patch network's backbone starts from, or "random"."""
    layer: str | None = None
    """The module whose output are the features; None where the backbone itself says so (a `forward_features`)."""
    blocks: tuple[Block, ...] = (Block("residual", 512, 2, 2), Block("residual", 512, 2, 2))
    heatmap: bool = False
    """Whether the patch network's classes stand between features and blocks, as five maps."""
    heatmap_pool: tuple[int, int] = (7, 5)
    """Sides of the mean pooling (stride 1) before, and of the max-pooling after the classes."""
    fc: tuple[int, ...] = ()
    """Widths of fully connected layers that take the blocks' place (there are none then): of the poster 64 and 32, on
    the heat map."""
    shortcut: bool = False
    """Whether the two outputs see what the fully connected layers see, too."""
    front: int = 0
    """Above 1: the trained network gets MorphHR's front, which makes it the same function of images this many times as
    large along each side, and is trained on with them (`native`)."""
    patch: tuple[Stage, ...] = ()
    """Stages of this backbone's patch network; those of the configuration where there are none. The first model of
    several that share backbone and weights has them."""


_TUNED = Stage(
    "all", 20, 1e-5, weight_decay=2e-2, undecayed=("features",), batch_size=2, patience=10, batch_norm="eval"
)
"""All layers of a network of whole images."""


@dataclass(frozen=True)
class Config:
    """Shen's all convolutional design: patch network, whole-image network, ensemble, transfer."""

    resize: tuple[int, ...] = (1152, 896)
    """Height and width of the images; empty for native resolution."""
    channels: int = 3
    mean: tuple[float, ...] = (52.18 / 255,)
    std: tuple[float, ...] = (0.226,)
    voi: str = "auto"
    split: SplitOf = "table"
    fractions: tuple[float, float, float] = (0.765, 0.085, 0.15)
    """Of the patients, for train, val and test, where they are drawn."""
    sampling: Sampling = Sampling()
    models: tuple[Model, ...] = (Model(),)
    """More than one make an ensemble, whose probabilities are averaged; a backbone's patches are learnt once."""
    augment: str = "flip,rotate=25,scale=0.2,shear=11.5,brightness=0.078"
    flips: bool = True
    """Average predictions over the mirrored images that the augmentation draws."""
    patch: tuple[Stage, ...] = (
        Stage(
            "head",
            3,
            1e-3,
            trainable=("head",),
            weight_decay=2e-2,
            batch_size=32,
            patience=10,
            dropout=0.5,
            batch_norm="eval",
        ),
        Stage(
            "top",
            10,
            1e-4,
            trainable=("features.layer3.5", "features.layer4", "head"),
            weight_decay=2e-4,
            undecayed=("features",),
            batch_size=32,
            patience=10,
            dropout=0.0,
            batch_norm="trainable",
        ),
        Stage(
            "all",
            37,
            1e-5,
            weight_decay=2e-4,
            undecayed=("features",),
            batch_size=32,
            patience=10,
            dropout=0.0,
        ),
    )
    whole: tuple[Stage, ...] = (
        Stage(
            "top",
            30,
            1e-4,
            trainable=("top", "head"),
            weight_decay=2e-3,
            batch_size=2,
            patience=10,
            batch_norm="trainable",
        ),
        _TUNED,
    )
    native: tuple[Stage, ...] = (replace(_TUNED, name="native", batch_size=1, accumulate=2),)
    """Of networks with a front."""
    start: str | None = None
    """The folder of a finished run on another data set: its whole-image networks are transferred, without patches."""
    transfer: tuple[Stage, ...] = (replace(_TUNED, name="transfer", epochs=50, lr=1e-6, dropout=0.0),)
    patients: tuple[int, ...] = ()
    """Of the transfer's learning curve: numbers of training patients; empty for all of them."""

    def __post_init__(self) -> None:
        if len(self.resize) not in (0, 2):
            raise GigamorphError(f"resize = {list(self.resize)} must be height and width, or empty")
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise GigamorphError("models need different names, and there must be one")
        for model in self.models:
            if model.fc and (model.blocks or not self.resize):
                raise GigamorphError(f"model {model.name!r}: fc needs blocks = [] and images of one size (resize)")
            if model.front and (model.front < 2 or model.fc or not self.resize):
                raise GigamorphError(f"model {model.name!r}: front is 2 or more, with blocks on images of one size")
            if model.shortcut and not model.fc:
                raise GigamorphError(f"model {model.name!r}: shortcut goes past fully connected layers; give fc")
        learnt = [(model.backbone, model.weights, model.layer) for model in self.models]
        for number, model in enumerate(self.models):
            if model.patch and learnt[number] in learnt[:number]:
                raise GigamorphError(
                    f"model {model.name!r}: its patch network is that of a model before it; omit patch"
                )
        if self.patients and self.start is None:
            raise GigamorphError("patients are those of the transfer's learning curve; name the run to start from")
