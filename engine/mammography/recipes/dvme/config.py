"""Settings of the recipe with the published defaults; `configs/dvme.toml` lists their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....errors import GigamorphError
from ..defaults import published
from ..splits import ImagesConfig

Protocol = Literal["linear", "dvme", "no_attention", "concat", "single", "finetune", "finetune_dvme"]
"""On embeddings: linear layer on each; DVME head on all; the same without attention; linear layer on the
concatenation; head without attention on each. On images, training all layers: of each, and of all with the head."""


@dataclass(frozen=True)
class ExtractorConfig:
    """One frozen network and the definition of its embedding."""

    name: str
    model: str
    weights: str = "random"
    """A file, or "random"."""
    blocks: int = 0
    """0: the network without its classifier; n: the class tokens of the last n blocks of a vision transformer."""
    fused: bool = True
    """Whether it is part of the fusion; otherwise it is only compared."""


@dataclass(frozen=True)
class DvmeConfig(ImagesConfig):
    """Extractors, the protocols on their embeddings, and the numbers of training images."""

    extractors: tuple[ExtractorConfig, ...] = published("dvme", "extractors", ExtractorConfig)
    resize: tuple[int, ...] = (256,)
    crop: int = 224

    protocols: tuple[Protocol, ...] = ("linear", "dvme", "no_attention")
    subsets: tuple[int, ...] = (50, 500, 0)
    folds: int = 5
    metric: Literal["auc", "kappa"] = "auc"

    p: int = 512
    hidden: int = 512
    dropout: float = 0.2
    tokens: Literal["scalar", "block"] = "scalar"
    heads: int = 1

    epochs: int = 50
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    plateau: int = 5
    patience: int = 10
    augment: str = "flip"
    transformers: tuple[str, ...] = ("dino",)
    transformer_lr: float = 1e-4
    transformer_batch: int = 16

    def __post_init__(self) -> None:
        names = [extractor.name for extractor in self.extractors]
        if not names or len(set(names)) < len(names):
            raise GigamorphError("extractors must have different names, and there must be at least one")
        if any(not name.replace("_", "").isalnum() for name in names):
            raise GigamorphError("names of extractors must be letters, digits and underscores: they become folders")
        if not any(extractor.fused for extractor in self.extractors):
            raise GigamorphError("no extractor has fused = true; at least one must have it")
        if not self.subsets or min(self.subsets) < 0 or self.folds < 1:
            raise GigamorphError("subsets must be numbers of images, 0 for all, and folds 1 or more")
