"""Van Vorst and Shen: contralateral patches teach a network what differs, without labels (arXiv 2401.05570)."""

from ..recipe import Recipe
from .config import SiameseConfig
from .synthetic import SYNTHETIC
from .train import train

RECIPE = Recipe(
    name="siamese",
    title="Siamese networks with soft labels",
    paper="Van Vorst, Shen: Siamese Networks with Soft Labels for Unsupervised Lesion Detection and Patch Pretraining "
    "on Screening Mammograms. arXiv 2401.05570, 2024",
    summary="Pairs of contralateral patches are compared by two networks; how far apart they are tells, softly, which "
    "pairs differ, and that teaches the networks. They find lesions and start patch classifiers.",
    config=SiameseConfig,
    train=train,
    synthetic=SYNTHETIC,
)

__all__ = ["RECIPE", "SiameseConfig", "train"]
