"""Settings of the recipe with the published defaults; `configs/cae.toml` lists their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....errors import GigamorphError
from ....train.stages import Stage
from ..splits import ImagesConfig


@dataclass(frozen=True)
class CaeConfig(ImagesConfig):
    """A backbone, auto-encoders on its maps, and a support vector machine on their features."""

    model: str = "gigamorph.engine.mammography.recipes.cae.alexnet:AlexNet"
    weights: str = "alexnet-owt-7be5be79.pth"
    layer: str = "features"
    resize: tuple[int, ...] = (227, 227)
    crop: int = 0

    unlabelled: str | None = None
    code_channels: tuple[int, ...] = (4096,)
    kernel: int = 3
    pool: int = 2
    mode: Literal["relu_bias", "zero_bias_encode", "trec", "tlin"] = "zero_bias_encode"
    theta: float = 1.0
    tied: bool = False
    feature: Literal["code", "reconstruction"] = "code"
    training: Literal["joint", "greedy"] = "joint"

    epochs: int = 150
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    plateau: int | None = 100

    pyramid: tuple[int, ...] = ()
    standardise: bool = True
    svm: tuple[Literal["linear", "rbf"], ...] = ("linear", "rbf")
    c: tuple[float, ...] = (1.0,)
    folds: int = 5

    finetune: tuple[Stage, ...] = ()
    """Stages of the backbone with a new classifier, the supervised network for comparison; empty: it is not trained."""
    augment: str = ""
    """Augmentation of that network's training images."""

    def __post_init__(self) -> None:
        if not self.code_channels or min(self.code_channels) < 1:
            raise GigamorphError("code_channels must have the channels of at least one auto-encoder")
        if not self.svm or not self.c or min(self.c) <= 0 or self.folds < 2:
            raise GigamorphError("svm and c must have at least one value, c must be positive and folds 2 or more")
        if not self.resize and not self.crop and not self.pyramid:
            raise GigamorphError(
                "images of native resolution have maps of several sizes; set resize, or a pyramid such as [1, 2, 4]"
            )
