"""Truong et al.: how transferable are self-supervised features; their fusion by attention (arXiv 2108.10048)."""

from ..recipe import MethodRecipe
from .config import DvmeConfig, ExtractorConfig
from .synthetic import SYNTHETIC
from .train import restore, train

RECIPE = MethodRecipe(
    name="dvme",
    title="Dynamic visual meta-embedding",
    paper="Truong, Mohammadi, Lenga: How Transferable Are Self-supervised Features in Medical Image Classification "
    "Tasks? ML4H 2021, PMLR 158:54-74, arXiv 2108.10048",
    config=DvmeConfig,
    train=train,
    synthetic=SYNTHETIC,
    restore=restore,
)

__all__ = ["RECIPE", "DvmeConfig", "ExtractorConfig", "train"]
