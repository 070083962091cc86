"""Measurements that are kept as scripts of the checkout, beside their results."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from ..errors import GigamorphError
from .machine import ROOT


def script(name: str) -> ModuleType:
    """A module of `benchmarks/`.

    Raises:
        GigamorphError: where the package was installed without its checkout.
    """
    folder = ROOT / "benchmarks"
    if not (folder / f"{name}.py").is_file():
        raise GigamorphError(f"benchmarks/{name}.py is not here: run this in a clone of gigamorph (pip install -e .)")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)
