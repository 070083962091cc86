"""Van Vorst and Shen: networks learn without labels which contralateral patches differ (arXiv 2401.05570)."""

from ..recipe import MethodRecipe
from .config import SiameseConfig
from .synthetic import SYNTHETIC
from .train import train

RECIPE = MethodRecipe(
    name="siamese",
    title="Siamese networks with soft labels",
    paper="Van Vorst, Shen: Siamese Networks with Soft Labels for Unsupervised Lesion Detection and Patch Pretraining "
    "on Screening Mammograms. arXiv 2401.05570, 2024",
    config=SiameseConfig,
    train=train,
    synthetic=SYNTHETIC,
)

__all__ = ["RECIPE", "SiameseConfig", "train"]
