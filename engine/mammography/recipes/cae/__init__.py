"""Ahn et al.: convolutional auto-encoders adapt a frozen backbone to images without labels (arXiv 1903.06342)."""

from ..recipe import Recipe
from .config import CaeConfig
from .synthetic import SYNTHETIC
from .train import train

RECIPE = Recipe(
    name="cae",
    title="Unsupervised deep transfer features",
    paper="Ahn, Kumar, Feng, Fulham, Kim: Unsupervised Deep Transfer Feature Learning for Medical Image "
    "Classification. ISBI 2019, arXiv 1903.06342",
    summary="Zero-bias convolutional auto-encoders learn, without labels, on the maps of a frozen backbone; a support "
    "vector machine classifies their codes.",
    config=CaeConfig,
    train=train,
    synthetic=SYNTHETIC,
)

__all__ = ["RECIPE", "CaeConfig", "train"]
