"""MorphHR (Wei et al., arXiv 2101.07945): a low-resolution network is grown to read high resolution."""

from ..recipe import MethodRecipe
from .config import MorphHRConfig
from .synthetic import SYNTHETIC
from .train import restore, train

RECIPE = MethodRecipe(
    name="morphhr",
    title="MorphHR: classifying high-resolution mammograms with function-preserving transformations",
    paper="Wei, Aviles-Rivero, Wang, Huang, Gilbert, Schönlieb, Chen; arXiv 2101.07945 (2021)",
    config=MorphHRConfig,
    train=train,
    synthetic=SYNTHETIC,
    restore=restore,
)
