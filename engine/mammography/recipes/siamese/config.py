"""Settings of the recipe; `configs/siamese.toml` says which are from the paper (few) and which are ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....errors import GigamorphError
from ..splits import ImagesConfig

Start = Literal["siamese", "scratch", "weights", "simclr", "byol"]


@dataclass(frozen=True)
class SiameseConfig(ImagesConfig):
    """Settings of pairs, networks, soft labels, and downstream measures."""

    model: str = "resnet18"
    weights: str = "random"
    layer: str = "layer4"
    channels: int = 1
    mean: tuple[float, ...] = (0.3,)
    std: tuple[float, ...] = (0.2,)

    mirror: Literal["auto", "table"] = "auto"
    skip_unpaired: bool = False
    registration: Literal["auto", "simpleitk", "bspline", "gauss_newton", "none"] = "auto"
    patch: int = 224
    stride: int = 224
    tissue: float = 0.5

    dim: int = 128
    dual: bool = True
    labels: Literal["gmm", "exp", "rank", "hard"] = "gmm"
    margin: float = 1.0
    negatives: float = 1.0
    agreement: float = 0.1
    least_share: float = 0.01
    most_share: float = 0.2
    jitter: float = 0.1
    noise: float = 0.02

    warm_up: int = 5
    epochs: int = 50
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 1e-4

    starts: tuple[Start, ...] = ("siamese", "scratch")
    temperature: float = 0.5
    momentum: float = 0.996
    hidden: int = 4096
    crop: float = 0.2
    labelled: tuple[float, ...] = (0.01, 0.1, 1.0)
    probe_epochs: int = 30
    maps: bool = True
    scores: bool = True

    def __post_init__(self) -> None:
        if self.patch < 1 or self.stride < 1 or not 0 <= self.tissue <= 1:
            raise GigamorphError("patch and stride must be at least 1, tissue must be from 0 to 1")
        if not 0 < self.least_share <= self.most_share < 1:
            raise GigamorphError("least_share and most_share must be between 0 and 1, with least_share <= most_share")
        if not self.labelled or not all(0 < f <= 1 for f in self.labelled):
            raise GigamorphError("labelled must be shares of the labelled patches, above 0 and at most 1")
        if len(set(self.starts)) < len(self.starts):
            raise GigamorphError("starts must not contain duplicates")
        if "weights" in self.starts and self.weights == "random":
            raise GigamorphError('starts contains "weights", but they are random; set weights to a file, or to "timm"')
        if not (self.temperature > 0 and 0 <= self.momentum < 1 and 0 < self.crop <= 1 and self.hidden >= 1):
            raise GigamorphError("must hold: temperature > 0, 0 <= momentum < 1, 0 < crop <= 1 and hidden >= 1")
