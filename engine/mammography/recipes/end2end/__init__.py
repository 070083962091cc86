"""End-to-end training for whole images by an all convolutional design (Shen et al., 2017, 2019)."""

from ..recipe import MethodRecipe
from .config import End2EndConfig
from .synthetic import SYNTHETIC
from .train import restore, train

RECIPE = MethodRecipe(
    name="end2end",
    title="End-to-end training of a patch classifier into a whole-image classifier",
    paper="Shen, arXiv 1708.09427 (2017); Shen, Margolies, Rothstein, Fluder, McBride, Sieh, Sci. Rep. 9:12495 (2019)",
    config=End2EndConfig,
    train=train,
    synthetic=SYNTHETIC,
    restore=restore,
)
