"""Truong et al.: how transferable are self-supervised features; their fusion by attention (arXiv 2108.10048)."""

from ..recipe import Recipe
from .config import DvmeConfig, ExtractorConfig
from .synthetic import SYNTHETIC
from .train import restore, train

RECIPE = Recipe(
    name="dvme",
    title="Dynamic visual meta-embedding",
    paper="Truong, Mohammadi, Lenga: How Transferable Are Self-supervised Features in Medical Image Classification "
    "Tasks? ML4H 2021, PMLR 158:54-74, arXiv 2108.10048",
    summary="Frozen extractors with self-supervised weights, compared by linear evaluation and fine-tuning on few and "
    "many images, and fused by self-attention.",
    config=DvmeConfig,
    train=train,
    synthetic=SYNTHETIC,
    restore=restore,
)

__all__ = ["RECIPE", "DvmeConfig", "ExtractorConfig", "train"]
