"""Ahn et al.: convolutional auto-encoders adapt a frozen backbone to images without labels (arXiv 1903.06342)."""

from ..recipe import MethodRecipe
from .config import CaeConfig
from .synthetic import SYNTHETIC
from .train import train

RECIPE = MethodRecipe(
    name="cae",
    title="Unsupervised deep transfer features",
    paper="Ahn, Kumar, Feng, Fulham, Kim: Unsupervised Deep Transfer Feature Learning for Medical Image "
    "Classification. ISBI 2019, arXiv 1903.06342",
    config=CaeConfig,
    train=train,
    synthetic=SYNTHETIC,
)

__all__ = ["RECIPE", "CaeConfig", "train"]
