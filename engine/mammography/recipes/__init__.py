"""Published methods, ready to run. A recipe's module is imported on first use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import GigamorphError

if TYPE_CHECKING:
    from .recipe import MethodRecipe

RECIPES: dict[str, str] = {
    "cae": "Zero-bias convolutional auto-encoders on a frozen backbone, and an SVM (Ahn et al., 2019).",
    "dvme": "Frozen self-supervised extractors fused by attention (Truong et al., 2021).",
    "end2end": "A patch classifier becomes a whole-image classifier (Shen et al., 2017, 2019).",
    "morphhr": "A low-resolution network is grown to read high resolution (Wei et al., 2021).",
    "siamese": "Soft labels from the distances of contralateral patches (Van Vorst and Shen, 2024).",
}


def get_recipe(name: str) -> MethodRecipe:
    """Return a recipe by its name.

    Raises:
        GigamorphError: the name is unknown.
    """
    if name not in RECIPES:
        raise GigamorphError(f"unknown recipe {name!r}; use one of {', '.join(RECIPES)}")
    return importlib.import_module(f".{name}", __name__).RECIPE


def default_text(name: str) -> str:
    """Return the TOML file of a recipe: every published hyper-parameter with its source."""
    return (Path(__file__).parent / "configs" / f"{name}.toml").read_text(encoding="utf-8")
