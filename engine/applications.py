"""Applications built on the engine, and what they add to it: layouts of published checkpoints, and recipes.

The engine never imports an application by name in its code. It imports the modules listed in `APPLICATIONS` when it
needs what they register:

- ``LAYOUTS``: name -> module with ``recognises(state)`` and ``parts(state)``, see `gigamorph.engine.published.layout`;
- ``RECIPES``: name -> function without arguments that returns the recipe; its ``restore`` opens checkpoints.
"""

from __future__ import annotations

import importlib
from typing import Any

from .errors import GigamorphError

_ENGINE = __name__.removesuffix("applications")
APPLICATIONS = [f"{_ENGINE}mammography.registered"]


def _registered(kind: str) -> dict[str, Any]:
    return {name: one for path in APPLICATIONS for name, one in getattr(importlib.import_module(path), kind).items()}


def layouts() -> dict[str, Any]:
    """Return the modules of all registered layouts by name."""
    return _registered("LAYOUTS")


def is_layout(module: str) -> bool:
    """Return whether ``module`` is the module of a registered layout."""
    return module.startswith(_ENGINE) and any(one.__name__ == module for one in layouts().values())


def recipe_of(name: str) -> Any:
    """Return the recipe of this name.

    Raises:
        GigamorphError: no application has a recipe of this name.
    """
    recipes = _registered("RECIPES")
    if name not in recipes:
        raise GigamorphError(f"unknown recipe {name!r}; use one of {', '.join(recipes)}")
    return recipes[name]()
